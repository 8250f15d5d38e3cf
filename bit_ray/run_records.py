"""What is in the small files of a run's folder."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from bit_ray.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The content of a run's ``plan.json``."""

    digest: str
    """Digest of the plan."""
    shards: str
    """URI of the shard set that it trained on."""
    plan: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Start:
    """How the steps from one start on were computed: this may change between two starts of a run."""

    first_step: int
    """First step of this start."""
    device: Literal["cpu", "cuda"]
    """Kind of device that trained."""
    precision: Literal["fp32", "bf16"]
    """Precision of the convolutions, as it was resolved on that device."""
    num_workers: int
    """Training workers."""
    micro_batch_size: int
    """Examples per forward and backward pass of the worker that has most."""


@dataclass(frozen=True, kw_only=True)
class RuntimeRecord:
    """The content of a run's ``runtime.json``."""

    starts: tuple[Start, ...]
    """Starts in the order of their steps."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One worker group of a run, from its start to its end."""

    number: int
    """1 for the first."""
    why: str
    """Why it began."""
    num_workers: int
    shares: tuple[int, ...]
    """Examples of each worker in a batch."""
    micro_batch_size: int
    first_step: int
    """Step that it began with."""
    steps_lost: int = 0
    """Steps that are known to have been taken by the attempt before, and were taken again."""
    ended: Literal["running", "finished", "left", "failed"] = "running"
    """``left``: its workers saved and went, as they were asked to."""
    last_step: int = 0
    """Steps taken when it ended."""
    waited_s: float = 0.0
    """Seconds for which there was no room."""
    starting_s: float = 0.0
    """Seconds from there to the first step."""
    productive_s: float = 0.0
    """Seconds of steps that no attempt had taken before."""
    replayed_s: float = 0.0
    """Seconds of steps that were taken again."""
    wall_s: float = 0.0
    """Seconds in all."""


@dataclass(frozen=True, kw_only=True)
class AttemptRecord:
    """The content of a run's ``attempts.json``."""

    attempts: tuple[Attempt, ...]


@dataclass(frozen=True, kw_only=True)
class PlannedTime:
    """The content of a run's ``planned.json``: how long it was expected to take, before most of it was done."""

    seconds: float
    """Without time in which there was no room."""
    low: float
    """Least seconds that were expected."""
    high: float
    """Most seconds that were expected."""
    source: str
    """What it was worked out from."""

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.seconds <= self.high < math.inf:
            raise ConfigError.of("seconds", self.seconds, "above 0, between low and high")


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A batch that a run does not train on, because its step was out of the ordinary."""

    step: int
    """0-based."""
    why: str
    """What was seen, in words."""
    went_back: bool = False
    """Whether it had been applied, so that the run went back behind it."""
    images: tuple[str, ...] = ()
    """Ids of its images in slot order; empty if they could not be read."""

    def __post_init__(self) -> None:
        if self.step < 0:
            raise ConfigError.of("step", self.step, "a whole number of at least 0")


@dataclass(frozen=True, kw_only=True)
class LeftOutRecord:
    """The content of a run's ``left_out.json``."""

    batches: tuple[LeftOut, ...]
    """By step."""


@dataclass(frozen=True, kw_only=True)
class BestCheckpoint:
    """The content of a run's ``best.json``: its best checkpoint so far, by a score of the probes."""

    metric: str
    step: int
    value: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ConfigError.of("value", self.value, "a finite number")


@dataclass(frozen=True, kw_only=True)
class WorkerNow:
    """Where a worker is."""

    rank: int
    host: str
    """Address of its node."""
    step: int
    phase: str
    seconds: float
    """For which it has been in this step and phase."""


@dataclass(frozen=True, kw_only=True)
class Now:
    """The content of a run's ``now.json``: where it is while it runs, or was when its driver ended."""

    unix_s: float
    """When this was so, seconds since 1970."""
    step: int
    """Steps taken."""
    num_steps: int
    attempt: int
    """Number of its worker group; 0: there was none yet."""
    num_workers: int
    """Workers that the group has; 0: there is no room for it yet."""
    num_workers_wanted: int
    """Most workers that it would take."""
    goodput: float
    """Share of its seconds in which steps were taken that had not been taken before."""
    still_s: float
    """Seconds since a step was last taken, or the attempt began."""
    checkpoint_age_s: float
    """Seconds since a checkpoint was last complete, or the run was started."""
    workers: tuple[WorkerNow, ...]
    """Its workers, the one that the others wait for first; in the file only that one."""
    metrics: dict[str, float]
    """What the workers last reported, by the names in MLflow."""
