"""How much of a machine a suite uses: two tasks of VTAB side by side, and one after the other.

    python benchmarks/side_by_side.py

The data are small files in the publishers' formats, the work is that of a suite: shards are written, a small network is
trained, a test set is scored. Three ways: one task after the other on one core; one after the other, each on all cores;
side by side. Every way has a process of its own and a Ray that has run such tasks before, so starting is not counted.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TASKS = ("cifar100", "svhn")
WAYS = {"one after the other, on one core": 1, "one after the other, each on all cores": 1, "side by side": 0}


def measure(data: str, storage: str, steps: int, side_by_side: int) -> float:
    """Seconds of a suite of two tasks, after one that has warmed up the workers."""
    from bit_ray.cluster import cluster
    from bit_ray.studies.vtab import vtab_suite
    from bit_ray.studies.vtab_config import VtabConfig
    from bit_ray.training.config import RuleOverrides

    def run(name: str, num_steps: int) -> float:
        config = VtabConfig(
            name=name,
            model="R1-1-1-1x0.5",
            tasks=TASKS,
            data_dir=data,
            num_train=80,
            num_val=20,
            rule=RuleOverrides(num_steps=num_steps, batch_size=32, base_lr=0.01, resize=40, crop=32),
            storage=f"{storage}/{name}",
            side_by_side=side_by_side,
        )
        start = time.perf_counter()
        report = vtab_suite(config)
        seconds = time.perf_counter() - start
        assert len(report.scores) == len(TASKS), report.problems
        return seconds

    with cluster():
        run("warm", 1)
        return run("timed", steps)


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
    parser.add_argument("--rounds", type=int, default=3, help="rounds of all ways; the best of each counts")
    parser.add_argument("--child", nargs=3, metavar=("DATA", "STORAGE", "N"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        data, storage, side_by_side = args.child
        print(json.dumps({"seconds": measure(data, storage, args.steps, int(side_by_side))}))
        return
    cores = sorted(os.sched_getaffinity(0))
    best = dict.fromkeys(WAYS, float("inf"))
    with tempfile.TemporaryDirectory() as folder:
        make_data(folder)
        for number in range(args.rounds):
            for i, (way, side_by_side) in enumerate(WAYS.items()):
                command = [sys.executable, __file__, "--steps", str(args.steps)]
                command += ["--child", folder, f"{folder}/runs{number}{i}", str(side_by_side)]
                pinned = set(cores[:1]) if i == 0 else set(cores)
                done = subprocess.run(
                    command,
                    check=True,
                    stdout=subprocess.PIPE,
                    text=True,
                    preexec_fn=lambda pinned=pinned: os.sched_setaffinity(0, pinned),
                )
                best[way] = min(best[way], json.loads(done.stdout.splitlines()[-1])["seconds"])
    together = best["side by side"]
    print(f"{len(TASKS)} tasks of {args.steps} steps, {len(cores)} cores, best of {args.rounds}")
    for way, seconds in best.items():
        print(f"| {way} | {seconds:.1f} s | {together / seconds:.2f} |")


if __name__ == "__main__":
    main()
