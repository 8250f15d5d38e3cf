"""How often `Runtime.heal` would leave out a batch of a clean run, and how close it comes to it.

    python benchmarks/false_alarms.py           # seed 0
    python benchmarks/false_alarms.py 1 2       # others

Trains networks on glyphs of 50 classes in memory, from scratch, and judges every step by the rule of
`bit_ray.training.healing`. `closest` is the largest loss as a share of what would have been out of the ordinary.
"""

import sys

import numpy as np
import torch

from bit_ray.data.images.decode import decode_image
from bit_ray.data.images.views import TrainView
from bit_ray.data.sources.embedded.glyphs import GlyphSource
from bit_ray.recipes.schedules import Schedule
from bit_ray.training.healing import Healer
from bit_ray.training.in_memory import Examples, fit
from bit_ray.training.plan import TrainPlan

# Name, batch, steps, learning rate, warm-up, boundaries, MixUp
RUNS = (
    ("batch 64", 64, 600, 0.03, 50, (400, 500), 0.0),
    ("batch 16", 16, 1500, 0.01, 100, (1000,), 0.0),
    ("batch 32, MixUp", 32, 800, 0.03, 50, (500,), 0.1),
    ("batch 128, rate 0.1", 128, 300, 0.1, 20, (), 0.0),
)


class Watched(Healer):
    """Notes how close the losses of a run come to what is out of the ordinary."""

    def __init__(self) -> None:
        super().__init__(10**6)
        self.num_judged, self.closest = 0, 0.0

    def judge(self, step: int, loss: float, norm: float, *, kept: bool) -> None:
        """Judge a step, and note it."""
        if len(self.recent) >= 32:
            self.num_judged += 1
            self.closest = max(self.closest, loss / self.bound)
        super().judge(step, loss, norm, kept=kept)


def main() -> None:
    torch.set_num_threads(1)
    found = list(GlyphSource("s", examples_per_class=20).part(np.arange(1000)))
    examples = Examples(
        tuple(example.id for example in found),
        [decode_image(example.image) for example in found],
        np.array([example.labels[0] for example in found]),
    )
    print("| run | seed | steps judged | left out | closest |\n| --- | ---: | ---: | ---: | ---: |")
    for seed in map(int, sys.argv[1:] or ["0"]):
        for name, batch, num_steps, rate, warmup, boundaries, mixup in RUNS:
            plan = TrainPlan(
                kind="pretrain",
                model="R1-1-1-1x0.5",
                num_classes=50,
                manifest_digest="0",
                num_examples=1000,
                view=TrainView(crop="inception", crop_size=32),
                resize_mode="square",
                resize_size=32,
                loss="softmax",
                schedule=Schedule(base_lr=rate, num_steps=num_steps, warmup_steps=warmup, boundaries=boundaries),
                global_batch_size=batch,
                weight_decay=1e-4,
                mixup_alpha=mixup,
                seed=seed,
            )
            healer = Watched()
            fit(plan, examples, healer=healer)
            row = (name, seed, f"{healer.num_judged:,}", len(healer.left_out), f"{healer.closest:.2f}")
            print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
