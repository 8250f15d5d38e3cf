"""What the engine of the studies costs: trials through Ray Tune against a plain loop of the same trainings.

python benchmarks/studies.py

Prints Markdown tables. In memory: the same `carry_out` of the same cells, in turns. Wall seconds and processor seconds
of this process and all below it; Ray is started before, for both. Trials have the priority of the loop.
"""

import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # before Ray is imported

import psutil
import tyro

from bit_ray import store
from bit_ray.cluster.session import cluster
from bit_ray.progress import console
from bit_ray.run_folder import RunFolder
from bit_ray.studies.catalog import find_study
from bit_ray.studies.cells import Cell, CellScore, Point, carry_out, load_cell
from bit_ray.studies.conduct import CellOutcome, Outcome
from bit_ray.studies.engine import Bar, Study, Trial
from bit_ray.studies.findings import grid_report
from bit_ray.studies.grid import grid_jobs
from bit_ray.studies.inputs import Inputs
from bit_ray.studies.report import render
from bit_ray.studies.study_config import GridConfig
from bit_ray.tracking.config import TrackingConfig
from bit_ray.tracking.runs import TrackedRun


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to measure."""

    trials: int = 8
    """Trainings in memory."""
    steps: int = 150
    """Steps of each, 32 images of 32 pixels a step."""
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


def cells(config: Config, storage: str) -> list[Cell]:
    """The same small trainings with other seeds."""
    inputs = Inputs(storage, TrackingConfig())
    settings = GridConfig(
        study="weight-decay",
        set=(f"recipe.epochs={config.steps * 32 / 3000}", "recipe.decay_epochs=[]", "recipe.warmup_steps=2"),
        axes=("recipe.weight_decay=0.0", "recipe.base_lr_per_256=0.16"),
        seeds=config.trials,
        storage=storage,
    )
    jobs = grid_jobs(find_study("weight-decay"), settings, inputs)
    return [replace(job.cell, at_steps=(), probe=None) for job in jobs]


def main(config: Config) -> None:
    """Measure and print."""
    console.quiet = True
    threading.Thread(target=keep_counting, daemon=True).start()
    with tempfile.TemporaryDirectory() as storage, cluster():
        wanted = cells(config, storage)
        rows = []
        for turn in range(config.rounds):

            def loop(turn: int = turn) -> None:
                for number, cell in enumerate(wanted):
                    carry_out({}, cell, f"{storage}/loop-{turn}-{number}", 60.0, 1)

            def engine(at_a_time: int, turn: int = turn) -> None:
                name = f"engine-{turn}-{at_a_time}"
                trials = [
                    Trial(
                        key=f"{number}",
                        identity=cell.identity,
                        params={"number": number},
                        arguments=(cell, f"{storage}/{name}-{number}", 60.0),
                        size=1.0,
                    )
                    for number, cell in enumerate(wanted)
                ]
                study = Study(RunFolder.of(storage, name), trials, load_cell)
                with TrackedRun.open(
                    TrackingConfig(), run_name=name, storage=storage, params={}, tags={}, kind="study"
                ) as run:
                    study.run(carry_out, {}, run, Bar(name, "trials"), side_by_side=at_a_time, num_threads=1)
                assert len(study.scores) == len(wanted)

            rows.append(("a plain loop in one process", turn, *timed(loop)))
            rows.append(("the engine, one at a time", turn, *timed(lambda: engine(1))))
            rows.append(("the engine, two at a time", turn, *timed(lambda: engine(2))))
    print(f"\n{config.trials} trainings of {config.steps} steps:\n")
    print("| how | turn | wall s | processor s | wall against the loop |\n| --- | --- | --- | --- | --- |")
    loops = {turn: wall for how, turn, wall, _ in rows if how.startswith("a plain")}
    for how, turn, wall, processor in rows:
        print(f"| {how} | {turn + 1} | {wall:.1f} | {processor:.1f} | {wall / loops[turn]:.2f} |")
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
