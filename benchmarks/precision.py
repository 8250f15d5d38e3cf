"""Where bfloat16 pays on a CPU with AMX: whole training steps in float32 and in bfloat16, in turns.

python benchmarks/precision.py

One process, one thread, CPU time, because it resists a busy machine. The rule of `bit_ray.training.device` for
``precision: auto`` follows from this table.
"""

import statistics
import sys
import time

import torch

from bit_ray.data.images.views import TrainView
from bit_ray.errors import BitRayError
from bit_ray.recipes.schedules import Schedule
from bit_ray.training.device import keep_freed_memory
from bit_ray.training.learner import Learner
from bit_ray.training.plan import TrainPlan

CASES = (
    ("R50x1", 224, 4),
    ("R50x1", 128, 8),
    ("R50x1", 64, 16),
    ("R50x1", 32, 16),
    ("R2-2-2-2x1", 96, 16),
    ("R1-1-1-1x1", 32, 32),
    ("R2-2-2-2x0.5", 128, 16),
    ("R1-1-1-1x0.5", 32, 64),
)
ROUNDS, NUM_CLASSES = 5, 100


def learner(model: str, crop: int, batch: int, precision: str) -> Learner:
    """Return what trains one network."""
    plan = TrainPlan(
        kind="pretrain",
        model=model,
        num_classes=NUM_CLASSES,
        manifest_digest="0" * 64,
        num_examples=10_000,
        view=TrainView(crop="inception", crop_size=crop),
        resize_mode="shorter_side",
        resize_size=crop,
        loss="softmax",
        schedule=Schedule(base_lr=0.01, num_steps=1_000, warmup_steps=100, boundaries=()),
        global_batch_size=batch,
        weight_decay=1e-4,
    )
    return Learner(plan, torch.device("cpu"), micro_batch_size=batch, precision=precision)


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    keep_freed_memory()
    print("| network | pixels | batch | fp32, CPU s | bf16, CPU s | fp32 / bf16 | least | most |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for model, crop, batch in CASES:
        learners = {precision: learner(model, crop, batch, precision) for precision in ("fp32", "bf16")}
        images = torch.randint(0, 256, (batch, crop, crop, 3), dtype=torch.uint8)
        targets = torch.randint(0, NUM_CLASSES, (batch,))
        seconds: dict[str, list[float]] = {"fp32": [], "bf16": []}
        for step in range(ROUNDS + 1):
            for precision, one in learners.items():
                started = time.process_time()
                one.step(step, images, targets)
                if step:  # the first one warms up
                    seconds[precision].append(time.process_time() - started)
        pairs = [slow / fast for slow, fast in zip(seconds["fp32"], seconds["bf16"], strict=True)]
        medians = [statistics.median(seconds[precision]) for precision in ("fp32", "bf16")]
        print(
            f"| {model} | {crop} | {batch} | {medians[0]:.3f} | {medians[1]:.3f} | {statistics.median(pairs):.2f} "
            f"| {min(pairs):.2f} | {max(pairs):.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    try:
        main()
    except BitRayError as error:
        sys.exit(f"error: {error}")
