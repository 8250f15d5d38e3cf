"""The folder of a run or a study, ``STORAGE/NAME``: its files by name, with the content of `run_records`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bit_ray import store
from bit_ray.config import to_dict
from bit_ray.errors import ModelError
from bit_ray.run_records import (
    Attempt,
    AttemptRecord,
    LeftOut,
    LeftOutRecord,
    Now,
    PlannedTime,
    RunRecord,
    RuntimeRecord,
    Start,
)

TRAINING_FILE = "training.json"
"""The file of a checkpoint with which it is complete: its position and its plan."""


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
        """Return the URI of where the workers of an attempt were when they made no step."""
        return store.join(self.uri, f"stacks-attempt-{attempt}.txt")

    def collectives(self, attempt: int, rank: int) -> str:
        """Return the URI of the collectives that a worker began and ended last, from PyTorch's flight recorder."""
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
        """Return the URI of the score of one trial of a study."""
        return store.join(self.uri, "scores", f"{key}.json")

    def checkpoint(self, step: int) -> str:
        """Return the URI of the checkpoint after a number of steps."""
        return store.join(self.uri, checkpoint_name(step))

    def nonfinite(self, step: int) -> str:
        """Return the URI of the weights before a step whose loss was not finite."""
        return store.join(self.uri, f"nonfinite-step-{step:08d}")

    def milestone(self, step: int) -> str:
        """Return the URI of the weights after a step of a study's training; they stay until they are measured."""
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
        """Return the steps of incomplete checkpoints: the process that wrote or deleted them was killed.

        They are older than a complete one, so no process works on them.
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
        """Return the newest record of its driver on where it is; None for a run that has none.

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
