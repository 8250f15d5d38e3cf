"""What the engine of the studies costs: trials through Ray Tune against a plain loop of the same trainings.

python benchmarks/studies.py

Prints Markdown tables. In memory: the same `carry_out` of the same cells; on the cluster: the same `carry_out_hosted`,
a Ray Train run each; in turns, each second turn in the other order. Wall seconds and processor seconds of this process
and all below it; Ray is started before, for both. Trials have the priority of the loop.
"""

import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # before Ray is imported

import psutil
import tyro

from bit_ray import store
from bit_ray.cluster.session import cluster
from bit_ray.progress import console
from bit_ray.run_folder import RunFolder
from bit_ray.studies.catalog import find_study
from bit_ray.studies.cells import Cell, CellScore, Point, load_cell
from bit_ray.studies.engine import Bar, Study
from bit_ray.studies.grid import grid_jobs
from bit_ray.studies.grid_report import grid_report
from bit_ray.studies.hosted import Host, carry_out_hosted, need
from bit_ray.studies.in_memory import carry_out
from bit_ray.studies.inputs import Inputs
from bit_ray.studies.outcome import CellOutcome, Outcome
from bit_ray.studies.report import render
from bit_ray.studies.study_config import GridConfig
from bit_ray.studies.tuner import Trial
from bit_ray.tracking.config import TrackingConfig
from bit_ray.tracking.runs import TrackedRun
from bit_ray.training.config import Runtime


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to measure."""

    trials: int = 8
    """Trainings in memory."""
    steps: int = 150
    """Steps of each, 32 images of 32 pixels a step."""
    hosted: int = 4
    """Trainings on the cluster, with one worker each."""
    hosted_steps: int = 150
    """Steps of each."""
    rounds: int = 2
    """Turns of each."""
    finished: int = 1000
    """Finished trainings of a study that is started again."""


SEEN: dict[tuple[int, float], float] = {}
"""Processor seconds of each process, by its id and its start: those that have ended count as well."""


def used() -> float:
    """Processor seconds of this process and all below it, so far."""
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        try:
            times = process.cpu_times()
            SEEN[process.pid, process.create_time()] = times.user + times.system
        except psutil.NoSuchProcess:
            continue
    return sum(list(SEEN.values()))


def keep_counting() -> None:
    """Look at all processes twice a second, as some end meanwhile."""
    while True:
        used()
        time.sleep(0.5)


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor seconds of a call."""
    began, before = time.perf_counter(), used()
    function()
    return time.perf_counter() - began, used() - before


def cells(number: int, steps: int, storage: str) -> list[Cell]:
    """The same small trainings with other seeds."""
    inputs = Inputs(storage, TrackingConfig())
    settings = GridConfig(
        study="weight-decay",
        set=(f"recipe.epochs={steps * 32 / 3000}", "recipe.decay_epochs=[]", "recipe.warmup_steps=2"),
        axes=("recipe.weight_decay=0.0", "recipe.base_lr_per_256=0.16"),
        seeds=number,
        storage=storage,
    )
    jobs = grid_jobs(find_study("weight-decay"), settings, inputs)
    return [replace(job.cell, at_steps=(), probe=None) for job in jobs]


def through_engine(
    name: str, storage: str, function: Callable[..., CellScore], trials: list[Trial], **settings: Any
) -> None:
    """All of the trials as a study of this name."""
    study = Study(RunFolder.of(storage, name), trials, load_cell)
    with TrackedRun.open(TrackingConfig(), run_name=name, storage=storage, params={}, tags={}, kind="study") as run:
        study.run(function, {}, run, Bar(name, "trials"), num_threads=1, **settings)
    assert len(study.scores) == len(trials)


def trial(number: int, cell: Cell, *arguments: Any) -> Trial:
    """A cell as a trial."""
    params = {"number": number}
    return Trial(key=f"{number}", identity=cell.identity, params=params, arguments=(cell, *arguments), size=1.0)


def in_memory(wanted: list[Cell], storage: str, turn: int) -> dict[str, Callable[[], None]]:
    """What is measured of trainings in memory, by name; the loop first."""

    def loop() -> None:
        for number, cell in enumerate(wanted):
            carry_out({}, cell, f"{storage}/loop-{turn}-{number}", 60.0, 1)

    def engine(at_a_time: int) -> None:
        name = f"engine-{turn}-{at_a_time}"
        trials = [trial(i, cell, f"{storage}/{name}-{i}", 60.0) for i, cell in enumerate(wanted)]
        through_engine(name, storage, carry_out, trials, side_by_side=at_a_time)

    return {
        "a plain loop in one process": loop,
        "the engine, one at a time": lambda: engine(1),
        "the engine, two at a time": lambda: engine(2),
    }


def on_the_cluster(wanted: list[Cell], storage: str, turn: int) -> dict[str, Callable[[], None]]:
    """The same of trainings that are Ray Train runs."""
    runtime = Runtime(num_workers=1)

    def host(study: str) -> Host:
        tracking = TrackingConfig(uri=f"sqlite:///{storage}/mlflow.db")
        return Host(study=study, runtime=runtime, storage=storage, tracking=tracking, parent_run_id="")

    def loop() -> None:
        for number, cell in enumerate(wanted):
            carry_out_hosted({}, cell, f"{number}", host(f"runs-{turn}"), 1)

    def engine() -> None:
        name = f"hosted-{turn}"
        trials = [trial(i, cell, f"{i}", host(name)) for i, cell in enumerate(wanted)]
        wants = need(runtime, 0)
        through_engine(name, storage, carry_out_hosted, trials, side_by_side=1, need=lambda _: wants)

    return {"a plain loop of Ray Train runs": loop, "the engine, one at a time": engine}


def compared(title: str, rounds: int, ways: Callable[[int], dict[str, Callable[[], None]]]) -> None:
    """Measure ways in turns, and print them beside the first."""
    print(f"\n{title}:\n")
    print("| how | turn | wall s | processor s | wall against the loop | processor against the loop |")
    print("| --- | --- | --- | --- | --- | --- |")
    for turn in range(rounds):
        found = ways(turn)
        order = list(found) if turn % 2 == 0 else list(reversed(found))
        taken = {how: timed(found[how]) for how in order}
        loop_wall, loop_processor = taken[next(iter(found))]
        for how in found:
            wall, processor = taken[how]
            ratios = f"{wall / loop_wall:.2f} | {processor / loop_processor:.2f}"
            print(f"| {how} | {turn + 1} | {wall:.1f} | {processor:.1f} | {ratios} |", flush=True)


def main(config: Config) -> None:
    """Measure and print."""
    console.quiet = True
    threading.Thread(target=keep_counting, daemon=True).start()
    with tempfile.TemporaryDirectory() as storage, cluster():
        if config.trials:
            wanted = cells(config.trials, config.steps, storage)
            title = f"{config.trials} trainings of {config.steps} steps in memory"
            compared(title, config.rounds, lambda turn: in_memory(wanted, storage, turn))
        if config.hosted:
            runs = cells(config.hosted, config.hosted_steps, storage)
            title = f"{config.hosted} trainings of {config.hosted_steps} steps on the cluster"
            compared(title, config.rounds, lambda turn: on_the_cluster(runs, storage, turn))
    if config.finished:
        many_finished(config.finished)


def many_finished(count: int) -> None:
    """A study of many finished trainings: reading its scores, and its report."""
    study = find_study("weight-decay")
    values = {"val/loss": 1.0, "val/top_1": 0.5, "train/loss": 1.0}
    points = tuple(Point(step=step, values=values) for step in (10, 50, 100))
    with tempfile.TemporaryDirectory() as folder:
        run_folder = RunFolder.of(folder, "many")
        trials, outcomes = [], []
        Path(folder, "many", "scores").mkdir(parents=True)
        for number in range(count):
            score = CellScore(
                identity=str(number),
                final=values,
                points=points,
                losses=tuple((step, 1.0) for step in range(1, 201)),
                images=1000,
                device_s=1.0,
                decay_exposure=0.0,
                rate_changed_at=0,
            )
            params = {"recipe.weight_decay": number % 100 / 100, "recipe.base_lr_per_256": 0.1, "seed": number // 100}
            trials.append(Trial(key=str(number), identity=str(number), params=params, arguments=(), size=1.0))
            outcomes.append(CellOutcome(key=str(number), params=params, score=score))
            store.write_json(run_folder.score(str(number)), asdict(score))
        memory = psutil.Process().memory_info().rss
        reading, _ = timed(lambda: Study(run_folder, trials, load_cell))
        outcome = Outcome(
            kind="grid", config={"study": "weight-decay", "axes": [], "price": 0.0}, facts={}, cells=tuple(outcomes)
        )
        reporting, _ = timed(lambda: render(grid_report(study, outcome)))
        grown = (psutil.Process().memory_info().rss - memory) / 1e6
    print(f"\n{count} finished trainings: {reading:.1f} s to read, {reporting:.1f} s to report, {grown:+.0f} MB.")


if __name__ == "__main__":
    main(tyro.cli(Config))
