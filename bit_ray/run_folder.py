"""The folder of a run or a study, ``STORAGE/NAME``: the names of its files, and the content of the small ones."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from bit_ray import store
from bit_ray.config import to_dict
from bit_ray.errors import ConfigError, ModelError

TRAINING_FILE = "training.json"
"""The file of a checkpoint with which it is complete: its position and its plan."""


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
    """Steps that had been taken before and were taken again."""
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


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run or study."""

    uri: str
    """Its URI."""

    @classmethod
    def of(cls, storage: str, name: str) -> "RunFolder":
        """Return the folder of a name, with a URI that is valid in every process."""
        return cls(store.join(store.absolute(storage), name))

    @property
    def name(self) -> str:
        """Name of the run or study."""
        return self.uri.rstrip("/").rpartition("/")[2]

    @property
    def plan(self) -> str:
        """URI of the run's plan, a `RunRecord`."""
        return store.join(self.uri, "plan.json")

    @property
    def runtime(self) -> str:
        """URI of the record of how it was carried out, a `RuntimeRecord`; older runs have none."""
        return store.join(self.uri, "runtime.json")

    @property
    def result(self) -> str:
        """URI of the result; it exists once the run is done."""
        return store.join(self.uri, "result.json")

    @property
    def settings(self) -> str:
        """URI of the images and settings that a run on a folder began with."""
        return store.join(self.uri, "settings.json")

    @property
    def study(self) -> str:
        """URI of the settings that a study began with."""
        return store.join(self.uri, "study.json")

    @property
    def group(self) -> str:
        """URI of the id of the placement group that its workers have, or had."""
        return store.join(self.uri, "group.txt")

    @property
    def attempts_file(self) -> str:
        """URI of the record of its worker groups, an `AttemptRecord`."""
        return store.join(self.uri, "attempts.json")

    @property
    def planned_file(self) -> str:
        """URI of how long it was expected to take, a `PlannedTime`."""
        return store.join(self.uri, "planned.json")

    @property
    def best(self) -> str:
        """URI of the record of the best checkpoint, a `BestCheckpoint`."""
        return store.join(self.uri, "best.json")

    @property
    def left_out_file(self) -> str:
        """URI of the record of the batches that it does not train on, a `LeftOutRecord`."""
        return store.join(self.uri, "left_out.json")

    @property
    def now(self) -> str:
        """URI of where it is while it runs, a `Now`."""
        return store.join(self.uri, "now.json")

    def stacks(self, attempt: int) -> str:
        """URI of where the workers of an attempt were when they made no step."""
        return store.join(self.uri, f"stacks-attempt-{attempt}.txt")

    def collectives(self, attempt: int, rank: int) -> str:
        """URI of the collectives that a worker began and ended last, as PyTorch's flight recorder has them."""
        return store.join(self.uri, f"stacks-attempt-{attempt}", f"collectives-rank-{rank:05d}.json")

    @property
    def few_shot(self) -> str:
        """URI of the shard set that a run on few examples has drawn."""
        return store.join(self.uri, "few-shot")

    @property
    def subsets(self) -> str:
        """URI of the folder of index files that a study has drawn."""
        return store.join(self.uri, "subsets")

    def score(self, key: str) -> str:
        """URI of the score of one trial of a study."""
        return store.join(self.uri, "scores", f"{key}.json")

    def checkpoint(self, step: int) -> str:
        """URI of the checkpoint after a number of steps."""
        return store.join(self.uri, checkpoint_name(step))

    def nonfinite(self, step: int) -> str:
        """URI of the weights before a step whose loss was not finite."""
        return store.join(self.uri, f"nonfinite-step-{step:08d}")

    def milestone(self, step: int) -> str:
        """URI of the weights after a step of a study's training; they stay until they are measured."""
        return store.join(self.uri, f"milestone-{step:08d}")

    @property
    def points(self) -> str:
        """URI of what was measured of the milestones so far."""
        return store.join(self.uri, "points.json")

    def checkpoints(self, file: str) -> list[int]:
        """Return the steps of the existing checkpoints that contain a file, ascending."""
        found = [re.fullmatch(rf"step-(\d{{8}})/{re.escape(file)}", name) for name in store.list_files(self.uri)]
        return sorted(int(match[1]) for match in found if match)

    def abandoned(self) -> list[int]:
        """Return the steps of what is left of checkpoints whose writer, or who deleted them, was killed.

        They are older than a complete one, so nobody is at work on them.
        """
        found = {int(match[1]) for name in store.list_files(self.uri) if (match := re.match(r"step-(\d{8})/", name))}
        complete = self.checkpoints(TRAINING_FILE)
        return sorted(step for step in found - {*complete} if complete and step < complete[-1])

    def newest_checkpoint(self) -> int:
        """Return the step of the newest complete checkpoint; 0 without one."""
        return max(self.checkpoints(TRAINING_FILE), default=0)

    def record(self) -> RunRecord:
        """Return what the run recorded of its plan.

        Raises:
            ModelError: There is no run.
            DataError: The file is not a record of a run.
        """
        if not store.exists(self.plan):
            raise ModelError(f"{self.uri}: no plan.json in it; accepted: the folder of a run, STORAGE/NAME; correct it")
        return store.read_record(RunRecord, self.plan)

    def delete_checkpoint(self, step: int) -> None:
        """Delete a checkpoint; killed in between, it leaves none that counts as complete."""
        store.delete_files([store.join(self.checkpoint(step), TRAINING_FILE)])
        store.delete_directory(self.checkpoint(step))

    def starts(self) -> tuple[Start, ...]:
        """Return how the steps were computed, start by start; empty for runs that did not record it.

        Raises:
            DataError: The record is damaged.
        """
        if not store.exists(self.runtime):
            return ()
        return store.read_record(RuntimeRecord, self.runtime).starts

    def attempts(self) -> tuple[Attempt, ...]:
        """Return its worker groups so far; empty for runs that did not record them.

        Raises:
            DataError: The record is damaged.
        """
        if not store.exists(self.attempts_file):
            return ()
        return store.read_record(AttemptRecord, self.attempts_file).attempts

    def planned(self) -> PlannedTime | None:
        """Return how long the run was expected to take; None if that was never said.

        Raises:
            DataError: The record is damaged.
        """
        return store.read_record(PlannedTime, self.planned_file) if store.exists(self.planned_file) else None

    def left_out(self) -> tuple[LeftOut, ...]:
        """Return the batches that it does not train on, by step.

        Raises:
            DataError: The record is damaged.
        """
        if not store.exists(self.left_out_file):
            return ()
        return store.read_record(LeftOutRecord, self.left_out_file).batches

    def leave_out(self, entry: LeftOut) -> None:
        """Record that it does not train on a batch."""
        known = {known.step: known for known in self.left_out()} | {entry.step: entry}
        batches = tuple(known[step] for step in sorted(known))
        store.write_json(self.left_out_file, to_dict(LeftOutRecord(batches=batches)))

    def where(self) -> Now | None:
        """Return where its driver last said it was; None for a run that did not say it.

        Raises:
            DataError: The record is damaged.
        """
        return store.read_record(Now, self.now) if store.exists(self.now) else None

    def record_start(self, start: Start) -> None:
        """Record how the steps from ``start.first_step`` on are computed; it replaces starts from that step on."""
        kept = tuple(known for known in self.starts() if known.first_step < start.first_step)
        store.write_json(self.runtime, to_dict(RuntimeRecord(starts=(*kept, start))))


def first_difference(old: Any, new: Any, where: str = "") -> tuple[str, Any, Any]:
    """Return the dotted name of the first setting in which two nested mappings differ, and both its values."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*old, *new]:
            if old.get(key) != new.get(key):
                return first_difference(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    return where or "plan", old, new


def checkpoint_name(step: int) -> str:
    """Return the name of the checkpoint after a number of steps."""
    return f"step-{step:08d}"
