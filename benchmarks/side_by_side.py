"""How much of a machine a study uses: two tasks of VTAB side by side, and one after the other.

    python benchmarks/side_by_side.py

The data are small files in the publishers' formats, the work is that of a study: shards are written, a small network is
trained, a test set is scored. Three ways take turns in one Ray, each right after a study of one step that starts the
workers: one task after the other on one thread; one after the other, each on all cores; side by side. Printed are the
median of each and, as machines drift, the median of the ratios of each round.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from bit_ray.cluster.session import cluster
from bit_ray.recipes.hyperrule import RuleOverrides
from bit_ray.studies.vtab import vtab_suite
from bit_ray.studies.vtab_config import VtabConfig

ROOT = Path(__file__).resolve().parents[1]
TASKS = ("cifar100", "svhn")
ONE_THREAD, ALL_CORES, TOGETHER = (
    "one after the other, on one thread",
    "one after the other, on all cores",
    "side by side",
)


def run(folder: str, name: str, num_steps: int, way: str) -> float:
    """Seconds of a study of two tasks."""
    cores = os.sched_getaffinity(0)
    if way == ONE_THREAD:
        os.sched_setaffinity(0, {min(cores)})  # a study takes no more threads than its driver has cores
    start = time.perf_counter()
    report = vtab_suite(
        VtabConfig(
            name=name,
            model="R1-1-1-1x0.5",
            tasks=TASKS,
            data_dir=folder,
            num_train=80,
            num_val=20,
            rule=RuleOverrides(num_steps=num_steps, batch_size=32, base_lr=0.01, resize=40, crop=32),
            storage=f"{folder}/{name}",
            side_by_side=0 if way == TOGETHER else 1,
        )
    )
    seconds = time.perf_counter() - start
    os.sched_setaffinity(0, cores)
    assert len(report.scores) == len(TASKS), report.problems
    return seconds


def make_data(folder: str) -> None:
    """Write the files of both data sets."""
    sys.path.append(str(ROOT / "tests" / "integration"))
    import vtab_files

    vtab_files.cifar100(Path(folder), num_train=260, num_test=300)
    vtab_files.svhn(Path(folder), num_train=260, num_test=300)


def main() -> None:
    """Run the ways in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of a task")
    parser.add_argument("--rounds", type=int, default=4, help="turns of all ways")
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {ONE_THREAD: [], ALL_CORES: [], TOGETHER: []}
    with tempfile.TemporaryDirectory() as folder, cluster():
        make_data(folder)
        for number in range(args.rounds):
            for i, (way, taken) in enumerate(seconds.items()):
                run(folder, f"warm-{number}-{i}", 1, TOGETHER)  # Ray ends workers that are idle for a second
                taken.append(run(folder, f"timed-{number}-{i}", args.steps, way))
    print(f"{len(TASKS)} tasks of {args.steps} steps, {len(os.sched_getaffinity(0))} cores, {args.rounds} rounds")
    print("| way | seconds | side by side / this way | in each round |")
    print("| --- | ---: | ---: | --- |")
    for way, taken in seconds.items():
        ratios = [together / alone for together, alone in zip(seconds[TOGETHER], taken, strict=True)]
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"| {way} | {statistics.median(taken):.1f} | {statistics.median(ratios):.2f} | {each} |")


if __name__ == "__main__":
    main()
