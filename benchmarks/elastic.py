"""What changes of the cluster and failures cost a run, on several raylets of this machine.

    python benchmarks/elastic.py changes   # 3, 2, 1, 2 workers by notices and growth, next to a fixed run; draws losses
    python benchmarks/elastic.py kills     # a worker is killed every 60 s, for ten minutes: goodput

Each prints the attempts of the run. The run's own rule would not grow for the seconds that are left of so short a run,
so `changes` replaces it.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

PROGRAM = """
import sys
from bit_ray.config_files import read_config
from bit_ray.training import room
from bit_ray.training.config import PretrainConfig
from bit_ray.training.pretrain import pretrain

if __name__ == "__main__":
    if sys.argv[2] == "changes":
        room.pays = lambda *_: True
    pretrain(read_config(PretrainConfig, sys.argv[1]))
"""
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}


def config(folder, name, shards, num_steps, **runtime):
    from bit_ray.recipes.upstream import UpstreamRecipe
    from bit_ray.training.config import PretrainConfig, Runtime

    recipe = UpstreamRecipe(
        name="small",
        epochs=num_steps * 64 / 4000,
        decay_epochs=(),
        global_batch_size=64,
        base_lr_per_256=0.01,
        warmup_steps=0,
        crop_size=32,
    )
    return PretrainConfig(
        name=name,
        shards=str(shards),
        model="R1-1-1-1x0.5",
        storage=str(folder),
        recipe=recipe,
        runtime=Runtime(log_every_steps=5, **runtime),
    )


class Program:
    """A run in a process of its own."""

    def __init__(self, folder, settings, mode, address):
        from bit_ray.config_files import write_config

        self.folder, self.name = folder, settings.name
        self.log = folder / f"{settings.name}.log"
        script, file = folder / "program.py", folder / f"{settings.name}.json"
        script.write_text(PROGRAM)
        write_config(settings, file)
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"OMP_NUM_THREADS": "1"}
        if address:
            environment["RAY_ADDRESS"] = address
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(script), str(file), mode], env=environment, stdout=output, stderr=output
            )

    def attempts(self):
        """Return what the run has recorded of its worker groups."""
        path = self.folder / self.name / "attempts.json"
        return json.loads(path.read_text())["attempts"] if path.exists() else []

    def reached(self):
        """Return the last step that it printed."""
        return max(map(int, re.findall(rf"{self.name}: step (\d+)/", self.log.read_text())), default=0)

    def wait(self, true):
        """Wait until something is true of it."""
        while not true():
            if self.process.poll() is not None:
                sys.exit(self.log.read_text())
            time.sleep(0.1)

    def trains(self, number, num_steps):
        """Return whether the attempt of this number has taken that many steps."""
        found = self.attempts()
        return len(found) == number and self.reached() >= found[-1]["first_step"] + num_steps


def show(program, steps_per_s=None):
    print(f"{'attempt':>7} {'workers':>7} {'steps':>13} {'lost':>5} {'start s':>8} {'wall s':>7}  why")
    for a in program.attempts():
        steps = f"{a['first_step']}-{a['last_step']}"
        print(
            f"{a['number']:>7} {a['num_workers']:>7} {steps:>13} {a['steps_lost']:>5} {a['starting_s']:>8.1f} "
            f"{a['wall_s']:>7.1f}  {a['why']}"
        )
    print(next(line for line in program.log.read_text().splitlines() if ": goodput" in line))


def losses(folder, name):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("bit_ray").experiment_id
    [run] = client.search_runs([experiment], f"tags.`bit_ray.run_name` = '{name}'")
    values = client.get_metric_history(run.info.run_id, "train/loss")
    return {m.step: m.value for m in values}


def changes(folder, shards, num_steps, picture):
    from ray.cluster_utils import Cluster

    nodes = Cluster(head_node_args={"num_cpus": 0, "include_dashboard": False}, initialize_head=True)
    try:
        members = [nodes.add_node(**NODE) for _ in range(3)]
        program = Program(
            folder,
            config(folder, "elastic", shards, num_steps, num_workers="1:3", grow_after_s=1),
            "changes",
            nodes.address,
        )
        for number, member in enumerate(members[:2], start=1):
            program.wait(lambda number=number: program.trains(number, num_steps // 6))
            command = [
                str(Path(sys.executable).with_name("ray")), "drain-node", "--address", nodes.address,
                "--node-id", member.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot",
                "--deadline-remaining-seconds", "60",
            ]  # fmt: skip
            subprocess.run(command, check=True, capture_output=True)
        program.wait(lambda: program.trains(3, num_steps // 6))
        nodes.add_node(**NODE)
        program.wait(lambda: (folder / "elastic" / "result.json").exists())
        program.process.wait()
    finally:
        nodes.shutdown()
    fixed = Program(folder, config(folder, "fixed", shards, num_steps, num_workers=1), "changes", "")
    fixed.wait(lambda: (folder / "fixed" / "result.json").exists())
    fixed.process.wait()
    show(program)
    one, other = losses(folder, "fixed"), losses(folder, "elastic")
    both = sorted(one.keys() & other.keys())
    left = {a["last_step"] for a in program.attempts()}
    # Where workers left between two reports, the next report is a mean over fewer steps.
    same = [step for step in both if not any(step - 5 < end < step for end in left)]
    apart = {step: abs(other[step] / one[step] - 1) for step in same}
    print(f"largest relative difference of the loss: {max(apart.values()):.2g} over {num_steps} steps")
    draw(program, one, other, same, picture)


def draw(program, one, other, same, picture):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (axes, below) = plt.subplots(2, figsize=(8, 4), layout="constrained", sharex=True, height_ratios=(5, 1))
    axes.plot(same, [one[s] for s in same], color="#999999", linewidth=5, label="one worker throughout")
    axes.plot(same, [other[s] for s in same], color="#0072B2", linewidth=1.4, label="3, 2, 1, 2 workers")
    axes.set(ylabel="training loss")
    axes.legend(frameon=False, loc="lower left")
    attempts = program.attempts()
    edges = [attempts[0]["first_step"], *(a["last_step"] for a in attempts)]
    below.stairs([a["num_workers"] for a in attempts], edges, color="#0072B2", fill=True)
    below.set(xlabel="step", ylabel="workers", yticks=(1, 2, 3))
    for each in (axes, below):
        each.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=110)
    print(f"picture: {picture}")


def kills(folder, shards, minutes, every_s):
    """Kill the training worker at a fixed pace, until the time is over; then let the run end."""
    settings = config(
        folder,
        "killed",
        shards,
        10**6,
        num_workers=1,
        checkpoint_every_steps=10**6,
        checkpoint_every_s=5,
        max_failures=10**6,
    )
    program = Program(folder, settings, "kills", "")
    until, next_kill, killed = time.monotonic() + 60 * minutes, time.monotonic() + every_s, 0
    while time.monotonic() < until:
        time.sleep(min(1.0, max(0.0, next_kill - time.monotonic())))
        if program.process.poll() is not None:
            sys.exit(program.log.read_text())
        if time.monotonic() >= next_kill:
            next_kill += every_s
            for process in psutil.Process(program.process.pid).children(recursive=True):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    process.kill()
                    killed += 1
    program.process.terminate()
    program.process.wait()
    attempts = program.attempts()
    productive, wall = (sum(a[key] for a in attempts) for key in ("productive_s", "wall_s"))
    replayed = sum(a["replayed_s"] for a in attempts)
    starts = sorted(a["starting_s"] for a in attempts[1:])
    print(f"{killed} kills in {wall:.0f} s, one every {every_s} s: goodput {productive / wall:.2f}")
    print(f"seconds of steps taken again: {replayed:.0f}; steps lost: {sum(a['steps_lost'] for a in attempts)}")
    if starts:
        print(f"from failure to the next step: median {starts[len(starts) // 2]:.1f} s, worst {starts[-1]:.1f} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("changes", "kills"))
    parser.add_argument("--steps", type=int, default=600, help="of the run of changes")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--every-s", type=float, default=60.0, help="between two kills")
    parser.add_argument("--picture", default="elastic.png")
    arguments = parser.parse_args()

    from bit_ray.data.shards.write import write_shards
    from bit_ray.data.sources.embedded.glyphs import GlyphSource

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_shards(GlyphSource("s", examples_per_class=80), folder / "shards", name="glyphs")
        if arguments.what == "changes":
            changes(folder, folder / "shards", arguments.steps, arguments.picture)
        else:
            kills(folder, folder / "shards", arguments.minutes, arguments.every_s)


if __name__ == "__main__":
    main()
