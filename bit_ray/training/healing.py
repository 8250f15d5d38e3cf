"""Which steps are out of the ordinary, and which batch is to blame. No PyTorch, no Ray.

**The rule.** A step is judged by its loss and the norm of its gradient, both of the whole batch, before it is applied.
It is out of the ordinary if one of them is not finite. So it is if one of them is above ``median * (largest / median)
** 2`` of the last 128 steps that were kept, and the loss above 1.5 times or the norm above 3 times their median. In
logarithms: more than twice as far above the median as any of them. That needs neither a scale nor a shape: MixUp, whose
loss is far above the others in some steps, widens the band by itself. (OLMo 2 leaves out steps beyond 6 standard
deviations of as many steps, arXiv 2501.00656.) Before there are 128 steps, only what is not finite counts.

**What is left out.** A step out of the ordinary is not applied. If one of the next two is ordinary again, its own batch
was to blame, and the weights never saw it. If three in a row are out, not their batches are to blame but the weights:
the last step that was applied has broken them, and the run goes back behind it and leaves out its batch.
"""

import math
from collections import deque
from collections.abc import Iterable

from bit_ray.errors import ModelError
from bit_ray.run_folder import LeftOut

_WINDOW = 128
_REACH = 2.0
_LEAST_RATIOS = (1.5, 3.0)
_IN_A_ROW = 3
_LARGEST = 3.4e38  # of float32: infinity and NaN are not at most this
STEPS_BACK = 100
"""Least steps from the checkpoint to go back to until the batch to blame, as in PaLM (arXiv 2204.02311, §5.1)."""


class DivergedError(ModelError):
    """The training cannot go on; the weights are those before the step."""

    def __init__(self, step: int, problem: str):
        super().__init__(
            f"step {step}: {problem}; the weights are those before this step; "
            "lower the learning rate, set clip_norm, or look at the images of this step"
        )
        self.step = step


class NonFiniteError(DivergedError):
    """A step whose gradient is not finite."""

    def __init__(self, step: int):
        super().__init__(step, "the loss or its gradient is not finite")


class GoBackError(Exception):
    """The weights are broken; the run must go back behind ``blamed.step`` and leave its batch out."""

    def __init__(self, blamed: LeftOut):
        super().__init__(f"step {blamed.step}: {blamed.why}")
        self.blamed = blamed


class Healer:
    """Judges the steps of a run one after the other; every worker has one, and sees the same numbers.

    Args:
        allowed: Batches that the run may leave out in all.
        left_out: Those that it has left out so far.
    """

    def __init__(self, allowed: int, left_out: Iterable[LeftOut] = ()):
        self.allowed = allowed
        self.left_out = {entry.step: entry for entry in left_out}
        """By step; these are not computed again."""
        self._recent: deque[tuple[float, float]] = deque(maxlen=_WINDOW)
        self._undecided: list[LeftOut] = []
        self._news: list[LeftOut] = []
        self._bounds = (_LARGEST, _LARGEST)

    @property
    def recent(self) -> tuple[tuple[float, float], ...]:
        """Loss and gradient norm of the last steps that were kept: the rule's only memory."""
        return tuple(self._recent)

    def remember(self, recent: Iterable[tuple[float, float]]) -> None:
        """Go on from what `recent` was."""
        self._recent.extend(recent)
        self._bounds = self._bounds_now()

    @property
    def undecided(self) -> bool:
        """Whether the last steps were not applied, and it is not known yet whether their batches are to blame."""
        return bool(self._undecided)

    @property
    def bounds(self) -> tuple[float, float]:
        """Largest ordinary loss and gradient norm of the next step; what is not finite is above any."""
        return self._bounds

    def judge(self, step: int, loss: float, norm: float, *, kept: bool) -> None:
        """Note what came of a step; ``kept``: it was within `bounds`, and was applied.

        Raises:
            GoBackError: The weights are broken.
            DivergedError: Another batch would have to be left out than is allowed.
        """
        if kept:
            self.decide()
            self._recent.append((loss, norm))
            self._bounds = self._bounds_now()
            return
        self._undecided.append(LeftOut(step=step, why=self._why(loss, norm)))
        first, broken = self._undecided[0], len(self._undecided) == _IN_A_ROW
        blamed = self._last_applied(first.step)
        if (broken and blamed < 0) or (not broken and len(self.left_out) + len(self._undecided) > self.allowed):
            raise self._diverged(first)
        if broken:
            raise GoBackError(LeftOut(step=blamed, why=f"after it, {first.why}", went_back=True))

    def decide(self) -> None:
        """Blame the batches of the last steps for not having been applied."""
        self.left_out |= {entry.step: entry for entry in self._undecided}
        self._news += self._undecided
        self._undecided = []

    def take_news(self) -> list[LeftOut]:
        """Return the batches that were blamed since the last call."""
        news, self._news = self._news, []
        return news

    def num_kept(self, first: int, stop: int) -> int:
        """Return how many of the steps from ``first`` to before ``stop`` are not left out."""
        return stop - first - sum(first <= step < stop for step in self.left_out)

    def _bounds_now(self) -> tuple[float, float]:
        if not self.allowed or len(self._recent) < _WINDOW:
            return _LARGEST, _LARGEST
        columns = zip(*self._recent, strict=True)
        loss, norm = (_bound(values, ratio) for values, ratio in zip(columns, _LEAST_RATIOS, strict=True))
        return loss, norm

    def _last_applied(self, step: int) -> int:
        step -= 1
        while step in self.left_out:
            step -= 1
        return step

    def _why(self, loss: float, norm: float) -> str:
        for name, value, bound in zip(("loss", "gradient norm"), (loss, norm), self._bounds, strict=True):
            if not math.isfinite(value):
                return f"the {name} was not finite"
            if value > bound:
                return f"the {name} was {value:.3g}, where at most {bound:.3g} is ordinary"
        return "the loss or its gradient was out of the ordinary"

    def _diverged(self, entry: LeftOut) -> DivergedError:
        steps = ", ".join(map(str, sorted(self.left_out))) or "none"
        return DivergedError(
            entry.step,
            f"{entry.why}, and no other batch may be left out (runtime.heal {self.allowed}; left out: {steps})",
        )


def _bound(values: Iterable[float], least_ratio: float) -> float:
    """Largest ordinary value after these; see the rule above."""
    logs = sorted(math.log(max(value, 1e-30)) for value in values)
    median = logs[len(logs) // 2]
    return min(_LARGEST, math.exp(min(88.0, median + max(_REACH * (logs[-1] - median), math.log(least_ratio)))))


def step_to_go_back_to(checkpoints: Iterable[int], blamed: int) -> int:
    """Return the checkpoint behind a batch: the newest that is old enough, else the oldest before it, else 0."""
    before = sorted(step for step in checkpoints if step <= blamed)
    old_enough = [step for step in before if step <= blamed - STEPS_BACK]
    return old_enough[-1] if old_enough else before[0] if before else 0
