"""One run on several hosts of this machine through random faults, beside a run that nobody disturbs.

    sudo python benchmarks/soak.py                       # as root on Linux: it makes network namespaces
    sudo python benchmarks/soak.py --steps 500 --every-s 15 --seed 1

Two of three trainers train. A seeded schedule kills workers, nodes, the program (which is started again) and the head,
halts a host, cuts cables, makes links slow or lose packets, and takes store and tracker away for a while, until the run
is done. Then the weights of both runs must be equal, and MLflow must have every step once, with equal losses. With two
workers each sum is of two numbers, and so the same in any order: equal is bit for bit.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "integration"), str(ROOT / "tests")]
KINDS = {
    "worker killed": 4,
    "node killed": 3,
    "node halted": 1,
    "node cut off": 2,
    "link cut": 2,
    "link slow": 1,
    "link lossy": 1,
    "program killed": 3,
    "head killed": 1,
    "store away": 2,
    "store cut off": 1,
    "tracker away": 2,
}
"""Kinds of faults, and how often each is drawn beside the others."""


class Soak:
    """The hosts, the run, and what is done to it."""

    def __init__(self, cluster, program, seed):
        self.cluster, self.program = cluster, program
        self.draw = random.Random(seed)
        self.began = time.monotonic()
        self.faults = Counter()
        self.back_at = {}

    def _say(self, text):
        print(f"{time.monotonic() - self.began:7.1f} s  step {self.program.reached():>6,}  {text}", flush=True)

    def until_done(self, every_s):
        """Do one fault after the other until the run is done; start its program again when it has ended otherwise."""
        self.program.start()
        while not self.rest(self.draw.uniform(0.5, 1.5) * every_s):
            kind = self.draw.choices(list(KINDS), list(KINDS.values()))[0]
            self._say(kind)
            self.faults[kind] += 1
            getattr(self, "_" + kind.replace(" ", "_"))()

    def rest(self, seconds):
        """Wait; return whether the run is done."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            ended = self.program.process.poll()
            if ended == 0:
                return True
            if ended is not None:
                self._say(f"the program has ended with status {ended}: {self._last_line()}")
                self.faults["ended by itself"] += 1
                self._start_program()
            self._start_nodes()
            time.sleep(1)
        return False

    def _start_nodes(self):
        """Start those that were killed, or have ended as they were given up, some seconds later."""
        for name in self.cluster.trainers:
            if not self.cluster[name].pids():
                at = self.back_at.setdefault(name, time.monotonic() + self.draw.uniform(0, 15))
                if time.monotonic() >= at:
                    del self.back_at[name]
                    self.cluster.start(name)

    def _last_line(self):
        return (self.program.log.strip().splitlines() or [""])[-1]

    def _start_program(self):
        self.cluster.wait(lambda: self.cluster.is_up("head"), 120, "the head")
        until = time.monotonic() + 120
        while sum(map(self.cluster.is_up, self.cluster.trainers)) < 2 and time.monotonic() < until:
            self._start_nodes()
            time.sleep(1)
        self.program.start()

    def _trainer(self):
        """One of the hosts that train, or of all."""
        return self.cluster[self.draw.choice(self.cluster.training() or self.cluster.trainers)]

    def _worker_killed(self):
        from host_cluster import WORKER

        self._trainer().kill(WORKER)

    def _node_killed(self):
        self._trainer().kill()

    def _node_halted(self):
        host = self._trainer()
        host.halt()
        self.rest(self.draw.uniform(2, 30))
        host.go_on()

    def _node_cut_off(self):
        self._cut_off(self._trainer())

    def _store_cut_off(self):
        self._cut_off(self.cluster["store"])

    def _cut_off(self, host):
        host.cut_off()
        self.rest(self.draw.uniform(1, 30))
        host.reconnect()

    def _link_slow(self):
        with self._trainer().slow("2mbit"):
            self.rest(self.draw.uniform(5, 30))

    def _link_lossy(self):
        with self._trainer().lossy(0.05):
            self.rest(self.draw.uniform(5, 30))

    def _link_cut(self):
        pair = self.cluster.training()
        with self.cluster.hosts.apart(*(pair if len(pair) == 2 else self.cluster.trainers[:2])):
            self.rest(self.draw.uniform(1, 40))

    def _program_killed(self):
        self.program.process.kill()
        self.program.process.wait()
        self._start_program()

    def _head_killed(self):
        for name in ("head", *self.cluster.trainers):
            self.cluster[name].kill()
        self.program.process.wait()
        self.cluster.start_head()
        self.cluster.wait(lambda: self.cluster.is_up("head"), 120, "the head")
        self.cluster.start(*self.cluster.trainers)
        self._start_program()

    def _store_away(self):
        self.cluster.s3.kill()
        self.rest(self.draw.uniform(1, 60))
        self.cluster.s3.start()

    def _tracker_away(self):
        self.cluster.mlflow.kill()
        self.rest(self.draw.uniform(1, 60))
        self.cluster.mlflow.start()


def compared(cluster, steps, undisturbed, soaked):
    """Print what both runs came to; return whether they are equal."""
    import torch
    from glyph_runs import weights

    one, other = (cluster.losses(run.name) for run in (undisturbed, soaked))
    found = Counter(step for step, _ in other)
    missing = [step for step in range(1, steps + 1) if not found[step]]
    twice = [step for step, times in found.items() if times > 1]
    print(f"steps in MLflow: {len(found):,}, missing {missing[:10]}, more than once {twice[:10]}")
    at = dict(one)
    apart = [(abs(loss / at[step] - 1), step) for step, loss in other]
    print(f"losses: at most {max(apart)[0]:.2g} apart (relative, step {max(apart)[1]:,})")
    a, b = (weights(run.run.checkpoint(steps)) for run in (undisturbed, soaked))
    same = all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    most = max(((tensor - b[name]).norm() / tensor.norm()).item() for name, tensor in a.items())
    print(f"weights: {'equal bit for bit' if same else f'at most {most:.2g} apart (relative norm of a tensor)'}")
    return not missing and not twice and same and max(apart)[0] == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--every-s", type=float, default=30.0, help="between two faults, on average")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    import hosts
    from glyph_runs import run_config, write_glyphs
    from host_cluster import HostCluster, Program

    from bit_ray.tracking.config import TrackingConfig

    if not hosts.possible():
        sys.exit(f"error: {hosts.MISSING}")
    runtime = {"num_workers": 2, "device": "cpu", "checkpoint_every_s": 5.0, "max_failures": 10**6}
    runtime |= {"stalled_after_s": 10.0, "give_up_after_s": 20.0}
    with tempfile.TemporaryDirectory() as folder, HostCluster(Path(folder), "a", "b", "c", number=1) as cluster:
        os.environ.update(cluster.bucket.environment)
        shards = write_glyphs(cluster.bucket.uri("shards"))

        def program(name):
            config = run_config(
                cluster.bucket.uri("runs"), name, shards, arguments.steps, base_lr_per_256=0.004, **runtime
            )
            return Program(cluster, replace(config, tracking=TrackingConfig(uri=cluster.mlflow.uri)))

        undisturbed, soaked = program("undisturbed"), program("soaked")
        undisturbed.start()
        seconds = undisturbed.wait(lambda: undisturbed.process.poll() == 0, 4 * 3600, "the undisturbed run")
        print(f"{arguments.steps:,} steps undisturbed: {seconds:.0f} s", flush=True)
        soak = Soak(cluster, soaked, arguments.seed)
        soak.until_done(arguments.every_s)
        print(", ".join(f"{kind}: {times}" for kind, times in sorted(soak.faults.items())))
        print(next(line for line in soaked.log.splitlines()[::-1] if ": goodput" in line))
        if not compared(cluster, arguments.steps, undisturbed, soaked):
            print(soaked.log[-5000:])
            sys.exit("error: the runs differ")


if __name__ == "__main__":
    main()
