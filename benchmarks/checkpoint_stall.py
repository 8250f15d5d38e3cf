"""What a checkpoint costs a training: the wait for the copy in memory, and slower steps while it is written.

    python benchmarks/checkpoint_stall.py                 # about 1 GB: R101x1 for 50,000 classes, and its momentum
    python benchmarks/checkpoint_stall.py --model R50x1 --classes 1000

Trains on random images in this process, with the run's own learner and writer. Each round takes steps with no
checkpoint being written, then saves one and takes steps until it is complete. What a checkpoint costs is its wait and,
of the steps meanwhile, what they take more than the median of the others.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from bit_ray.data.images.views import TrainView
from bit_ray.recipes.schedules import Schedule
from bit_ray.run_folder import RunFolder
from bit_ray.training.checkpoint.state import Position
from bit_ray.training.checkpoint.writer import CheckpointWriter
from bit_ray.training.learner import Learner
from bit_ray.training.plan import TrainPlan
from bit_ray.weights.package import ModelSpec

STEPS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="R101x1")
    parser.add_argument("--classes", type=int, default=50_000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--crop", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--folder", default="", help="where to write; empty: the directory of temporary files")
    given = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = TrainPlan(
        kind="pretrain",
        model=given.model,
        num_classes=given.classes,
        manifest_digest="0" * 64,
        num_examples=1_000_000,
        view=TrainView(crop="inception", crop_size=given.crop),
        resize_mode="shorter_side",
        resize_size=given.crop,
        loss="softmax",
        schedule=Schedule(base_lr=1e-6, num_steps=1_000_000),
        global_batch_size=given.batch,
    )
    learner = Learner(plan, device)
    learner.wrap(distributed=False)
    spec = ModelSpec(
        model=given.model,
        num_classes=given.classes,
        class_names=tuple(map(str, range(given.classes))),
        multi_label=False,
        resize_mode="shorter_side",
        resize_size=given.crop,
        crop_size=given.crop,
    )
    size = 2 * sum(p.numel() * p.element_size() for p in learner.model.parameters()) / 1e9
    images = torch.randint(0, 256, (given.batch, given.crop, given.crop, 3), dtype=torch.uint8)
    targets = torch.randint(0, given.classes, (given.batch,))
    done = 0

    def step() -> float:
        nonlocal done
        started = time.perf_counter()
        learner.step(done, images, targets)
        learner.check()
        done += 1
        return time.perf_counter() - started

    with tempfile.TemporaryDirectory(dir=given.folder or None) as directory:
        writer = CheckpointWriter(RunFolder(str(Path(directory) / "run")), spec, lambda _: None)
        print(f"{given.model}, {given.classes:,} classes: {size:.2f} GB of weights and momentum; {device}", end=", ")
        print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; batch {given.batch} of {given.crop} pixels")
        print("| round | median step, s | wait, s | written in, s | steps meanwhile | they took more, s | cost, s |")
        print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
        for _ in range(3):
            step()
        costs = []
        for number in range(given.rounds):
            usual = statistics.median(step() for _ in range(STEPS))
            before, started = writer.stall_s, time.perf_counter()
            writer.save(learner, Position(next_step=done), {}, wait=False)
            wait, meanwhile = writer.stall_s - before, []
            while writer._thread is not None and writer._thread.is_alive():
                meanwhile.append(step())
            written = time.perf_counter() - started
            writer.finish()
            more = sum(meanwhile) - usual * len(meanwhile)
            costs.append(wait + max(0.0, more))
            print(
                f"| {number + 1} | {usual:.2f} | {wait:.2f} | {written:.1f} | {len(meanwhile)} | {more:.1f} | "
                f"{costs[-1]:.1f} |"
            )
        cost = statistics.median(costs[1:] or costs)  # the first one also asks for the memory of the copy
        print(f"a checkpoint costs {cost:.2f} s (median of all but the first): {cost / 600:.2%} of the training at one")
        print(f"in 600 s, the default; 2 % would be one in {cost / 0.02:.0f} s")


if __name__ == "__main__":
    main()
