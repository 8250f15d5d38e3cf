"""Trainings with a batch of wrong labels, or with weights that a fault of the hardware has changed, heal themselves."""

import copy
import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from small_training import pretrain_plan

from bit_ray.data.images.decode import decode_image
from bit_ray.data.images.views import TrainView
from bit_ray.data.sources.embedded.glyphs import GlyphSource
from bit_ray.data.stream.order import Order
from bit_ray.recipes.schedules import Schedule
from bit_ray.run_folder import LeftOut, RunFolder
from bit_ray.training.healing import DivergedError, GoBackError, Healer, step_to_go_back_to
from bit_ray.training.in_memory import Examples, fit
from bit_ray.training.learner import Learner

SAVED, BAD_STEP, NUM_STEPS, BATCH, CLASSES = 130, 138, 148, 8, 6
EXAMPLES = NUM_STEPS * BATCH  # one epoch: every example is in one batch
PLAN = pretrain_plan(
    num_examples=EXAMPLES,
    global_batch_size=BATCH,
    schedule=Schedule(base_lr=0.02, num_steps=NUM_STEPS),
    view=TrainView(crop="inception", crop_size=32, area_range=(0.5, 1.0)),
)


def wrong(labels, step):
    order = Order(
        shard_sizes=(EXAMPLES,), row_group_size=1, global_batch_size=BATCH, seed=PLAN.seed, shuffle=PLAN.shuffle
    )
    rows = [row for _, _, row in order.rows_of_step(step)]
    changed = labels.copy()
    changed[rows] = (changed[rows] + 1) % CLASSES
    return changed


class Checkpoint:
    """Saves a training after some steps, and goes on from there in the next ones; may break weights once."""

    def __init__(self, saved=None, break_after=-1):
        self.saved, self.break_after = saved, break_after

    def begin(self, learner):
        if self.saved is None:
            return 0
        model, optimizer, recent = copy.deepcopy(self.saved)
        learner.model.load_state_dict(model)
        learner.optimizer.load_state_dict(optimizer)
        self.healer.remember(recent)
        return SAVED

    def after(self, learner, step, loss):
        if step == SAVED - 1 and self.saved is None:
            learner.check()
            self.saved = copy.deepcopy((learner.model.state_dict(), learner.optimizer.state_dict(), self.healer.recent))
        if step == self.break_after:
            with torch.no_grad():
                learner.model.head.weight.mul_(-20)


def train(examples, healer, checkpoint):
    """The weights and losses of a training."""
    checkpoint.healer, losses = healer, {}
    model = fit(PLAN, examples, on_step=losses.__setitem__, watch=checkpoint, healer=healer)
    return model.state_dict(), losses


def same(one, other):
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture(scope="module")
def clean():
    few = list(GlyphSource("s", examples_per_class=8).part(np.arange(8 * CLASSES)))
    images = [decode_image(example.image) for example in few]
    picked = np.arange(EXAMPLES) % len(few)
    labels = np.array([few[i].labels[0] for i in picked])
    return Examples(tuple(map(str, range(EXAMPLES))), [images[i] for i in picked], labels)


@pytest.fixture(scope="module")
def undisturbed(clean):
    """Weights, losses and checkpoint of a training that nothing disturbs."""
    healer, checkpoint = Healer(3), Checkpoint()
    weights, losses = train(clean, healer, checkpoint)
    assert not healer.left_out  # no false alarm
    return weights, losses, checkpoint.saved


def test_a_batch_of_wrong_labels_is_left_out_alone(clean, undisturbed):
    weights, losses, saved = undisturbed
    poisoned = replace(clean, labels=wrong(clean.labels, BAD_STEP))
    healer = Healer(3)
    healed, found = train(poisoned, healer, Checkpoint(saved))
    assert list(healer.left_out) == [BAD_STEP]
    assert healer.left_out[BAD_STEP].why.startswith("the loss was ")
    # The same as a run that was told not to train on it, and whose batch is then not even computed.
    by_hand, expected = train(clean, Healer(0, [LeftOut(step=BAD_STEP, why="by hand")]), Checkpoint(saved))
    assert same(healed, by_hand)
    assert found == expected
    # As good as the undisturbed run, from which one that learns the batch is far.
    learned, after = train(poisoned, Healer(0), Checkpoint(saved))
    next_steps = range(BAD_STEP + 1, BAD_STEP + 6)
    mean, healed_mean, learned_mean = (np.mean([of[step] for step in next_steps]) for of in (losses, found, after))
    print(mean, healed_mean, learned_mean, losses)
    assert abs(healed_mean / mean - 1) < 0.1
    assert learned_mean > 1.2 * mean
