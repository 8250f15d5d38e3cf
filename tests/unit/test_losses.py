"""Every kind of run learns what it has always learned: its losses are on file, and a refactoring reproduces them.

After a change that is meant to change them: ``python tests/unit/test_losses.py`` writes the file anew.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bit_ray.data.augment import TrainView
from bit_ray.recipes.hyperrule import hyperrule
from bit_ray.recipes.schedules import Schedule
from bit_ray.training.fit import Examples, fit
from bit_ray.training.loop import build_model
from bit_ray.training.plan import TrainPlan, transfer_plan
from bit_ray.training.step import TrainStep, build_optimizer, micro_batches, to_channels_last

FILE = Path(__file__).parents[1] / "assets" / "losses.json"
MODEL, NUM_CLASSES, NUM_STEPS, BATCH = "R1-1-1-1x0.5", 6, 10, 8


def numbers(*shape, high=256, seed=0):
    return np.random.Generator(np.random.Philox(seed)).integers(0, high, shape)


def pretrain_plan(**changes):
    plan = TrainPlan(
        kind="pretrain",
        model=MODEL,
        num_classes=NUM_CLASSES,
        manifest_digest="0" * 64,
        num_examples=80,
        view=TrainView(crop="inception", crop_size=32),
        resize_mode="shorter_side",
        resize_size=36,
        loss="softmax",
        schedule=Schedule(base_lr=0.03, num_steps=NUM_STEPS, warmup_steps=2, boundaries=(6,)),
        global_batch_size=BATCH,
        weight_decay=1e-4,
    )
    return replace(plan, **changes)


def stepped(plan, micro_batch_size=BATCH):
    """The losses of steps on random images."""
    model = build_model(plan, None)
    to_channels_last(model)
    step_fn = TrainStep(model, build_optimizer(model, plan), plan)
    losses = []
    for step in range(NUM_STEPS):
        images = torch.from_numpy(numbers(BATCH, 32, 32, 3, seed=step).astype(np.uint8))
        targets = torch.from_numpy(numbers(BATCH, high=NUM_CLASSES, seed=100 + step))
        targets[3] = -1  # an image that could not be read
        if plan.loss == "sigmoid":
            targets = torch.nn.functional.one_hot(targets.clamp(min=0), NUM_CLASSES).to(torch.int8)
            targets[3] = -1
        loss, _ = step_fn(step, micro_batches(images, targets, micro_batch_size), BATCH // micro_batch_size)
        losses.append(loss.item())
    step_fn.check()
    return losses


def transferred(train="all", **changes):
    """The losses of a transfer in memory, by BiT-HyperRule."""
    settings = {"resize": 36, "crop": 32, "num_steps": NUM_STEPS, "batch_size": BATCH, "base_lr": 0.03, **changes}
    rule = hyperrule(20, (40, 40), **settings)
    plan = transfer_plan(
        rule,
        model=MODEL,
        num_classes=NUM_CLASSES,
        manifest_digest="0" * 64,
        init="x",
        init_digest="0" * 64,
        seed=3,
        train=train,
    )
    images = list(numbers(20, 40, 40, 3).astype(np.uint8))
    examples = Examples(tuple(f"e{i}" for i in range(20)), images, numbers(20, high=NUM_CLASSES, seed=1))
    start = build_model(replace(plan, seed=5, train="all"), None).state_dict()
    losses = []
    fit(build_model(plan, start), examples, plan, on_step=lambda _, loss: losses.append(loss))
    return losses


RUNS = {
    "pretrain": lambda: stepped(pretrain_plan()),
    "pretrain, micro-batches of 2": lambda: stepped(pretrain_plan(), 2),
    "pretrain, several labels": lambda: stepped(pretrain_plan(loss="sigmoid", head_bias=-3.0)),
    "pretrain, MixUp and clipping": lambda: stepped(pretrain_plan(mixup_alpha=0.1, clip_norm=1.0)),
    "finetune": transferred,
    "finetune, MixUp": lambda: transferred(mixup_alpha=0.1),
    "finetune, head": lambda: transferred("head"),
    "finetune, norm_bias": lambda: transferred("norm_bias"),
    "finetune, adapters": lambda: transferred("adapters:2"),
    "finetune, stages": lambda: transferred("stages:1"),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_losses_are_those_on_file(name):
    # Kernels of other processors add in another order; ten steps amplify that to less than this.
    assert RUNS[name]() == pytest.approx(json.loads(FILE.read_text())[name], rel=1e-4)


def test_no_run_on_file_is_forgotten():
    assert set(json.loads(FILE.read_text())) == set(RUNS)


if __name__ == "__main__":
    torch.set_num_threads(1)
    FILE.write_text(json.dumps({name: run() for name, run in RUNS.items()}, indent=1) + "\n")
