"""A study while it is run: its folder and name, its MLflow run, its trainings, and what its report is made from."""

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from bit_ray import store
from bit_ray.claim import claimed_run
from bit_ray.cluster.session import cluster
from bit_ray.cluster.slots import num_local_cores
from bit_ray.config import to_dict
from bit_ray.errors import ConfigError
from bit_ray.progress import console, print_table
from bit_ray.run_folder import RunFolder, first_difference
from bit_ray.studies.cells import Cell, CellScore, load_cell
from bit_ray.studies.display import Display, Goal
from bit_ray.studies.engine import Study, room_for
from bit_ray.studies.hosted import Host, carry_out_hosted, need
from bit_ray.studies.in_memory import carry_out
from bit_ray.studies.outcome import CellOutcome, Kind, Outcome
from bit_ray.studies.report import Report, render
from bit_ray.studies.spaces import shown
from bit_ray.studies.study_config import CompareConfig, GridConfig, SweepConfig
from bit_ray.studies.tuner import Trial
from bit_ray.tracking.identity import code_revision
from bit_ray.tracking.runs import TrackedRun
from bit_ray.training.config import Runtime
from bit_ray.training.estimate import measure_speed
from bit_ray.training.goodput import as_duration

OUTCOME_FILE = "study.json"
SETTINGS = "settings"
"""Among what decides a study: does not decide, but names what differs where a digest does."""
# The record of a study that goes on is written again at most this often: it grows with the study.
_RECORD_EVERY_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training that a study wants."""

    key: str
    """Unique in the study; can name a file."""
    params: dict[str, Any]
    """What distinguishes it."""
    cell: Cell
    """The training."""


@dataclass(kw_only=True)
class Conduct:
    """Runs the trainings of one study and records them."""

    kind: Kind
    config: GridConfig | SweepConfig | CompareConfig
    name: str
    make_report: Callable[[Outcome], Report]
    run: TrackedRun
    study: Study[CellScore]
    tensors: Mapping[str, Mapping[str, torch.Tensor]]
    """Initial weights by their digest."""
    runtime: Runtime
    """How each training is carried out that is a Ray Train run of its own."""
    goal: Goal
    """What they are compared by."""
    missing: tuple[str, ...] = ()
    _recorded: float = field(default=0.0)

    def carry_out(
        self, jobs: Sequence[Job], *, title: str, more: Callable[[], Job | None] | None = None, num_more: int = 0
    ) -> dict[str, CellScore]:
        """Run the trainings that are not finished, and return the scores of all by key.

        Args:
            jobs: The trainings.
            title: What they are, for the display.
            more: Proposes one more, when there is room; see `Study.run`.
            num_more: How many it will propose.

        Raises:
            BitRayError: anything the user can fix.
        """
        done_before = sum(self.study.add(self._trial(job)) is not None for job in jobs)
        if done_before:
            console.print(f"{self.name}: {done_before} of {len(jobs)} {title} are done already")
        hosted = self.config.where == "cluster"
        display = Display(f"{self.name}: {title}", self.goal, self.config.price, self.study)

        def record(trial: Trial, score: CellScore) -> None:
            if time.monotonic() - self._recorded > _RECORD_EVERY_S:
                self.run.log_text(json.dumps(to_dict(self.outcome())), OUTCOME_FILE)
                self._recorded = time.monotonic()

        self.study.run(
            carry_out_hosted if hosted else carry_out,
            {name: dict(tensors) for name, tensors in self.tensors.items()},
            self.run,
            display,
            side_by_side=self.config.side_by_side,
            num_threads=1,  # a score must not depend on which of the others are done
            more=(lambda: None if (job := more()) is None else self._trial(job)) if more is not None else None,
            num_more=num_more,
            need=(lambda resources: need(self.runtime, resources.most_gpus)) if hosted else None,
            on_score=record,
        )
        return self.study.scores

    def outcome(self) -> Outcome:
        """Return all that the report is made from, as of now."""
        cells = tuple(
            CellOutcome(key=key, params=dict(trial.params), score=self.study.scores.get(key))
            for key, trial in self.study.trials.items()
        )
        return Outcome(kind=self.kind, config=to_dict(self.config), facts=_facts(), cells=cells, missing=self.missing)

    def report(self) -> Report:
        """Return the report of what is finished."""
        return self.make_report(self.outcome())

    def record(self) -> None:
        """Record everything so far in MLflow and in the study's folder, with the report."""
        self._recorded = time.monotonic()
        outcome = self.outcome()
        report = self.make_report(outcome)
        self.run.log_text(json.dumps(to_dict(outcome)), OUTCOME_FILE)
        for name, content in render(report).items():
            store.write_bytes(store.join(self.study.folder.uri, "report", name), content)
            self.run.log_bytes(content, f"report/{name}")
        self.run.set_tags({"mlflow.note.content": "\n\n".join(report.findings)[:4000]})

    def _trial(self, job: Job) -> Trial:
        folder = store.join(self.study.folder.uri, "cells", job.key)
        arguments: tuple[Any, ...] = (job.cell, folder, self.config.save_every_s)
        if self.config.where == "cluster":
            host = Host(
                study=self.name,
                runtime=self.runtime,
                storage=store.absolute(self.config.storage),
                tracking=self.config.tracking,
                parent_run_id=self.run.run_id,
            )
            arguments = job.cell, job.key, host
        return Trial(
            key=job.key,
            identity=job.cell.identity,
            params=job.params,
            arguments=arguments,
            size=float(job.cell.plan.schedule.num_steps * job.cell.plan.global_batch_size),
        )


@contextmanager
def conducted(
    kind: Kind,
    config: GridConfig | SweepConfig | CompareConfig,
    name: str,
    make_report: Callable[[Outcome], Report],
    *,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    decides: Mapping[str, Any],
    runtime: Runtime,
    goal: Goal,
) -> Iterator[Conduct]:
    """Hold the name of a study while it is run; at the end, whatever it is, all that is done is recorded.

    Args:
        kind: What it is.
        config: The user's settings.
        name: Of the study.
        make_report: From its outcome.
        tensors: Initial weights by their digest.
        decides: Settings that stay what they were when the study began; others may join them.
        runtime: How each training is carried out that is a Ray Train run of its own.
        goal: What they are compared by.

    Raises:
        ConfigError: the name belongs to a study with other settings, or another process runs it.
    """
    folder = RunFolder.of(config.storage, name)
    plain = json.loads(json.dumps(dict(decides)))
    with claimed_run(config.storage, name), ExitStack() as held:
        _check_settings(folder, plain)
        if config.where == "cluster" and not store.exists(folder.study):
            # What has no room is refused before the name belongs to its settings; the Ray stays for the trainings.
            resources = held.enter_context(cluster())
            room_for(resources, need(runtime, resources.most_gpus))
        with TrackedRun.open(
            config.tracking,
            run_name=name,
            storage=store.absolute(config.storage),
            params=to_dict(config),
            tags={"bit_ray.study": kind},
            kind="study",
        ) as run:
            store.write_json(folder.study, plain)
            study = Study(folder, (), load_cell)
            conduct = Conduct(
                kind=kind,
                config=config,
                name=name,
                make_report=make_report,
                run=run,
                study=study,
                tensors=tensors,
                runtime=runtime,
                goal=goal,
            )
            try:
                yield conduct
            finally:
                conduct.record()


def _check_settings(folder: RunFolder, plain: dict[str, Any]) -> None:
    if not store.exists(folder.study):
        if store.exists(folder.plan):
            raise ConfigError.of("name", f"{folder.uri} holds a training run", "a new name", "choose another")
        return
    recorded = store.read_json(folder.study)
    settings, had = plain.get(SETTINGS), recorded.pop(SETTINGS, None)
    # A study may grow: more seeds, more trials.
    if any(plain.get(name) != value for name, value in recorded.items()):
        what, old, new = first_difference(recorded, {name: plain.get(name) for name in recorded})
        if had and had != settings:
            what, old, new = first_difference(had, settings)
        differ = f"{what} {old}, this one has {new}"
        if what in recorded and re.fullmatch("[0-9a-f]{64}", str(old)):
            differ = f"other settings, data or measures for {what}" if new else f"the training {what}, this one has not"
        raise ConfigError.of(
            "name",
            f"the study in {folder.uri} has {differ}",
            "the settings that the study began with",
            "choose another name, or restore the setting",
        )


def _facts() -> dict[str, str]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{num_local_cores()} CPU cores"
    return {"device": device, "PyTorch": torch.__version__, "code": code_revision()}


def print_plan(
    config: GridConfig | SweepConfig | CompareConfig, jobs: Sequence[Job], name: str, more: Sequence[str]
) -> None:
    """Print the trainings of a study, with the time they take: what ``--dry-run`` shows.

    Args:
        config: The user's settings.
        jobs: The trainings that are known now.
        name: Of the study.
        more: What comes in addition, in words; empty texts are left out.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    speeds: dict[tuple[str, int, int, str], float] = {}
    rows, total_images, total_s = [], 0, 0.0
    for job in jobs:
        plan = job.cell.plan
        same = (plan.model, plan.view.crop_size, plan.global_batch_size, plan.train)
        if same not in speeds:
            speeds[same] = measure_speed(plan, "auto", device, plan.global_batch_size).images_per_s
        images = plan.schedule.num_steps * plan.global_batch_size
        total_images, total_s = total_images + images, total_s + images / speeds[same]
        rows.append((shown(job.params), f"{plan.schedule.num_steps:,}", f"{images:,}", f"{images / speeds[same]:,.0f}"))
    print_table(f"{name}: {len(jobs)} trainings", rows, ("training", "steps", "images", "device s"))
    slots = max(1, torch.cuda.device_count()) if device == "cuda" else num_local_cores()
    at_a_time = min(config.side_by_side or slots, slots, len(jobs))
    money = f", {total_s / 3600 * config.price:.2f} to pay at {config.price:g} an hour" if config.price else ""
    said = [
        f"{total_images:,} images, {as_duration(total_s)} of a device, about {as_duration(total_s / at_a_time)} with "
        f"{at_a_time} side by side on this machine{money}, measured now with the training step alone",
        *more,
    ]
    console.print("; ".join(filter(None, said)))
