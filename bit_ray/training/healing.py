"""Which steps are out of the ordinary, and which batch is to blame. No PyTorch, no Ray.

**The rule.** A step is judged before it is applied, by the loss of the whole batch and the norm of its gradient. It is
out of the ordinary if one of them is not finite, or if the loss is more than twice as far above the median of the last
128 steps that were kept as any of these, and above 1.5 times the median, and above 0.5. That needs no scale and no
shape: MixUp, whose loss is far above the others in some steps, widens the band by itself. Where a loss of almost 0 is
usual, one image makes a large factor; therefore the 0.5. Before 32 steps, only what is not finite counts. (OLMo 2
leaves out steps beyond 6 standard deviations of the last 128, arXiv 2501.00656.)

**What is left out.** A step out of the ordinary is not applied. If one of the next two is ordinary again, its own batch
was to blame, and the weights never saw it. If three in a row are out, not their batches are to blame but the weights:
the last step that was applied has broken them, and the run goes back behind it and leaves out its batch.
"""

import math
from collections import deque
from collections.abc import Iterable

from bit_ray.errors import ModelError
from bit_ray.run_records import LeftOut

_WINDOW, _FEWEST = 128, 32
_REACH, _LEAST_RATIO, _LEAST = 2.0, 1.5, 0.5
_IN_A_ROW = 3
_LARGEST = 3.4e38  # of float32; infinity and NaN are above it
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
        self._recent: deque[float] = deque(maxlen=_WINDOW)
        self._undecided: list[LeftOut] = []
        self._news: list[LeftOut] = []
        self.bound = _LARGEST
        """Largest ordinary loss of the next step; what is not finite is above any."""

    @property
    def recent(self) -> tuple[float, ...]:
        """Losses of the last steps that were kept: the rule's only memory."""
        return tuple(self._recent)

    def remember(self, recent: Iterable[float]) -> None:
        """Go on from what `recent` was."""
        self._recent.extend(recent)
        self.bound = self._bound_now()

    @property
    def undecided(self) -> bool:
        """Whether the last steps were not applied, and it is not known yet whether their batches are to blame."""
        return bool(self._undecided)

    def judge(self, step: int, loss: float, norm: float, *, kept: bool) -> None:
        """Note what came of a step; ``kept``: it was ordinary, and was applied.

        Raises:
            GoBackError: The weights are broken.
            DivergedError: Another batch would have to be left out than is allowed.
        """
        if kept:
            self.decide()
            self.remember([loss])
            return
        self._undecided.append(LeftOut(step=step, why=self._why(loss, norm)))
        first = self._undecided[0]
        if len(self._undecided) == _IN_A_ROW:
            blamed = self._last_applied(first.step)
            if blamed < 0:
                raise DivergedError(first.step, f"{first.why}, and no step was applied before it")
            raise GoBackError(LeftOut(step=blamed, why=f"after it, {first.why}", went_back=True))
        steps = [*sorted(self.left_out), *(entry.step for entry in self._undecided)]
        if len(steps) > self.allowed:
            listed = ", ".join(map(str, steps))
            problem = f"{first.why}; steps {listed} would have to be left out, but runtime.heal is {self.allowed}"
            raise DivergedError(first.step, problem)

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

    def _bound_now(self) -> float:
        if not self.allowed or len(self._recent) < _FEWEST:
            return _LARGEST
        losses = sorted(self._recent)
        median = losses[len(losses) // 2]
        return min(_LARGEST, max(median + _REACH * (losses[-1] - median), _LEAST_RATIO * median, _LEAST))

    def _last_applied(self, step: int) -> int:
        step -= 1
        while step in self.left_out:
            step -= 1
        return step

    def _why(self, loss: float, norm: float) -> str:
        if math.isfinite(loss) and math.isfinite(norm):
            return f"the loss was {loss:.3g}, where at most {self.bound:.3g} is ordinary"
        return f"the {'gradient' if math.isfinite(loss) else 'loss'} was not finite"


def step_to_go_back_to(checkpoints: Iterable[int], blamed: int) -> int:
    """Return the checkpoint behind a batch: the newest that is old enough, else the oldest before it, else 0."""
    before = sorted(step for step in checkpoints if step <= blamed)
    old_enough = [step for step in before if step <= blamed - STEPS_BACK]
    return old_enough[-1] if old_enough else before[0] if before else 0
