"""Learning rate against step: linear warm-up, then a staircase or half a cosine."""

import math
from dataclasses import dataclass
from typing import Literal

from bit_ray.errors import ConfigError

BoundaryRule = Literal["upstream", "hyperrule"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate of every optimizer step of one run; steps are counted from 0."""

    base_lr: float
    """Learning rate after warm-up and before the first decay."""
    num_steps: int
    """Length of the run, optimizer steps."""
    warmup_steps: int = 0
    """Steps of linear warm-up; the rate is base_lr * step / warmup_steps, so 0 at step 0. None with 0."""
    boundaries: tuple[int, ...] = ()
    """Steps at which the staircase goes down, ascending."""
    decay: float = 0.1
    """Factor of each stair."""
    kind: Literal["staircase", "cosine"] = "staircase"
    """``cosine`` falls from base_lr at the end of warm-up towards 0 at num_steps and ignores the boundaries
    (big_vision:utils.py)."""
    boundary_rule: BoundaryRule = "upstream"
    """Two sources count differently. ``upstream``: warm-up multiplies the staircase, and step b is the first of the
    lower rate, so that exactly b steps come before it (big_vision:utils.py, "stair"). ``hyperrule``: nothing decays
    during warm-up, and step b still has the higher rate, b + 1 is the first of the lower one
    (big_transfer:bit_hyperrule.py)."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.base_lr) and self.base_lr > 0):
            raise ConfigError.of("base_lr", self.base_lr, "a number above 0", "the paper has 0.003 for transfer")
        if self.num_steps < 1:
            raise ConfigError.of("num_steps", self.num_steps, "at least 1", "train for more steps or epochs")
        if not 0 <= self.warmup_steps < self.num_steps:
            accepted = f"0 to {self.num_steps - 1} in a run of {self.num_steps} steps"
            raise ConfigError.of("warmup_steps", self.warmup_steps, accepted, "shorten the warm-up or train longer")
        if list(self.boundaries) != sorted(self.boundaries):
            raise ConfigError.of("boundaries", self.boundaries, "ascending steps", "sort them")
        if self.boundaries and not 0 <= self.boundaries[0] <= self.boundaries[-1] <= self.num_steps:
            accepted = f"0 to {self.num_steps} in a run of {self.num_steps} steps"
            raise ConfigError.of("boundaries", self.boundaries, accepted, "move them or train longer")
        if not 0 < self.decay <= 1:
            raise ConfigError.of("decay", self.decay, "above 0, at most 1", "the paper divides by ten: 0.1")

    def lr_at(self, step: int) -> float:
        """Return the learning rate of optimizer step ``step``, counted from 0.

        Raises:
            ConfigError: The run has no such step.
        """
        if not 0 <= step < self.num_steps:
            raise ConfigError.of("step", step, f"0 to {self.num_steps - 1}", f"the run has {self.num_steps} steps")
        warm = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        if self.kind == "cosine":
            progress = max(0.0, (step - self.warmup_steps) / (self.num_steps - self.warmup_steps))
            return self.base_lr * warm * 0.5 * (1 + math.cos(math.pi * progress))
        if self.boundary_rule == "hyperrule":
            if step < self.warmup_steps:
                return self.base_lr * step / self.warmup_steps
            stairs = sum(b < step for b in self.boundaries)
        else:
            stairs = sum(b <= step for b in self.boundaries)
        lr = self.base_lr
        for _ in range(stairs):
            lr /= 1 / self.decay  # repeated division by ten, as in the reference, so that all bits are the same
        return lr * warm

    def table(self) -> list[tuple[int, float]]:
        """Return rows (step, lr) to print: the first step, the end of warm-up, and each first step of a lower rate.

        A cosine, which changes at every step, is shown at its quarters and at the last step.
        """
        if self.kind == "cosine":
            length = self.num_steps - 1 - self.warmup_steps
            steps = {0, *(self.warmup_steps + length * i // 4 for i in range(5))}
        elif self.boundary_rule == "hyperrule":
            steps = {0, self.warmup_steps, *(max(b + 1, self.warmup_steps) for b in self.boundaries)}
        else:
            steps = {0, self.warmup_steps, *self.boundaries}
        return [(step, self.lr_at(step)) for step in sorted(steps) if step < self.num_steps]

    def last_change(self, num_done: int) -> int:
        """Return the steps done when the rate last changed, of the first ``num_done`` steps.

        It is 0 as long as the rate changes at every step: during warm-up, and with a cosine.
        """
        if self.kind == "cosine":
            return 0
        return max(step for step, _ in self.table() if step < max(1, num_done))


def epochs_to_steps(epochs: float, num_examples: int, batch_size: int) -> int:
    """Return the nearest whole number of optimizer steps that see ``epochs * num_examples`` images.

    90 epochs of ILSVRC-2012 (1,281,167 images) at batch 4096 are 28,151 steps; epochs 30, 60 and 80 end at steps
    9,384, 18,767 and 25,023. Batches continue over the end of an epoch, so a duration is rounded only once.
    """
    return math.floor(epochs * num_examples / batch_size + 0.5)
