"""Trainings with a batch of wrong labels, or with weights that a fault of the hardware has changed, heal themselves."""

import copy
import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from forked import run_ranks
from small_training import pretrain_plan

from bit_ray.data.images.decode import decode_image
from bit_ray.data.images.views import TrainView
from bit_ray.data.sources.embedded.glyphs import GlyphSource
from bit_ray.data.stream.order import Order
from bit_ray.recipes.schedules import Schedule
from bit_ray.run_folder import RunFolder
from bit_ray.run_records import LeftOut
from bit_ray.training.healing import DivergedError, GoBackError, Healer, step_to_go_back_to
from bit_ray.training.in_memory import Examples, fit
from bit_ray.training.learner import Learner
from bit_ray.training.optimizer import MOMENTUM

SAVED, BAD_STEP, NUM_STEPS, BATCH, CLASSES = 40, 46, 56, 8, 6
EXAMPLES = NUM_STEPS * BATCH  # one epoch: every example is in one batch
PLAN = pretrain_plan(
    num_examples=EXAMPLES,
    global_batch_size=BATCH,
    schedule=Schedule(base_lr=0.003, num_steps=NUM_STEPS),
    view=TrainView(crop="resize", crop_size=32, resize_size=32, random_flip=False),
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
        model, momentum, recent = copy.deepcopy(self.saved)
        learner.model.load_state_dict(model)
        for buffer, saved in zip(self.momentum(learner), momentum, strict=True):
            buffer.copy_(saved)
        self.healer.remember(recent)
        return SAVED

    @staticmethod
    def momentum(learner):
        return [state[MOMENTUM] for state in learner.optimizer.state.values()]

    def after(self, learner, step, loss):
        if step == SAVED - 1 and self.saved is None:
            learner.check()
            self.saved = copy.deepcopy((learner.model.state_dict(), self.momentum(learner), self.healer.recent))
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
    assert abs(healed_mean / mean - 1) < 0.1
    assert learned_mean > 1.2 * mean


def test_weights_that_break_send_the_run_back_behind_the_last_step_that_was_applied(clean, undisturbed):
    _, losses, saved = undisturbed
    healer = Healer(3)
    with pytest.raises(GoBackError) as caught:  # as a memory or a processor that errs would
        train(clean, healer, Checkpoint(saved, break_after=BAD_STEP))
    blamed = caught.value.blamed
    assert (blamed.step, blamed.went_back) == (BAD_STEP, True)
    assert not healer.left_out  # the batches after it are innocent
    again = Healer(3, [blamed])
    healed, found = train(clean, again, Checkpoint(saved))
    assert list(again.left_out) == [BAD_STEP]
    by_hand, _ = train(clean, Healer(0, [LeftOut(step=BAD_STEP, why="by hand")]), Checkpoint(saved))
    assert same(healed, by_hand)
    assert found[NUM_STEPS - 1] == pytest.approx(losses[NUM_STEPS - 1], abs=0.3)


def feed(healer, losses, norm=1.0):
    """Judge losses as the step does."""
    for step, loss in losses:
        healer.judge(step, loss, norm, kept=bool(loss <= healer.bound))


def ordinary(num=40):
    return list(enumerate(np.random.default_rng(0).normal(2.0, 0.1, num).tolist()))


def test_only_a_loss_far_above_the_others_is_out_of_the_ordinary():
    healer = Healer(1)
    feed(healer, ordinary(31))
    feed(healer, [(31, 1e6)])  # too early to judge
    assert math.isfinite(healer.recent[-1])
    healer = Healer(1)
    feed(healer, [*ordinary(40), (40, 2.9), (41, 2.0)])
    assert not healer.left_out
    assert healer.bound == pytest.approx(sorted(healer.recent)[21] + 2 * (2.9 - sorted(healer.recent)[21]))
    feed(healer, [(42, 4.0), (43, 2.0)])
    assert list(healer.left_out) == [42]
    assert 4.0 not in healer.recent
    memorised = Healer(1)
    feed(memorised, [*((step, 1e-4) for step in range(40)), (40, 0.4)])
    assert not memorised.undecided


@pytest.mark.parametrize(("loss", "norm", "why"), [(math.nan, math.nan, "loss"), (2.0, math.inf, "gradient")])
def test_what_is_not_finite_is_left_out_from_the_first_step_on(loss, norm, why):
    healer = Healer(1)
    healer.judge(0, loss, norm, kept=False)
    healer.judge(1, 2.0, 1.0, kept=True)
    assert healer.take_news() == [LeftOut(step=0, why=f"the {why} was not finite")]
    assert healer.take_news() == []


def test_no_more_batches_are_left_out_than_allowed():
    healer = Healer(2, [LeftOut(step=7, why="before")])
    feed(healer, [*ordinary(), (40, 9.0), (41, 2.0)])
    message = "^step 42: the loss was 9, .*; steps 7, 40, 42 would have to be left out, but runtime.heal is 2; "
    with pytest.raises(DivergedError, match=message) as e:
        feed(healer, [(42, 9.0)])
    assert e.value.step == 42
    with pytest.raises(DivergedError, match="^step 0: the loss was not finite"):  # there is nothing to go back behind
        feed(Healer(9), [(step, math.nan) for step in range(3)])


def test_the_step_to_blame_is_one_that_was_applied():
    healer = Healer(9, [LeftOut(step=39, why="before")])
    feed(healer, ordinary(39))
    with pytest.raises(GoBackError) as caught:
        feed(healer, [(40, 9.0), (41, 9.0), (42, 9.0)])
    assert caught.value.blamed.step == 38


def test_a_checkpoint_is_gone_back_to_that_is_old_enough():
    assert step_to_go_back_to([100, 200, 300, 350], 350) == 200
    assert step_to_go_back_to([300, 350], 349) == 300
    assert step_to_go_back_to([350], 349) == 0


def test_batches_left_out_are_recorded_once_and_by_step(tmp_path):
    folder = RunFolder(str(tmp_path))
    assert folder.left_out() == ()
    for step in (5, 3, 5):
        folder.leave_out(LeftOut(step=step, why="x", images=("a",)))
    assert [batch.step for batch in folder.left_out()] == [3, 5]


STEPS, BAD = 36, 34


def train_shares(rank, num_workers, directory):
    """Train on three processes, whose batches have wrong labels at one step."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if num_workers > 1:
        ready = f"file://{directory}/ready"
        torch.distributed.init_process_group("gloo", init_method=ready, rank=rank, world_size=num_workers)
    healer = Healer(2)
    plan = replace(PLAN, schedule=replace(PLAN.schedule, num_steps=STEPS))
    learner = Learner(plan, torch.device("cpu"), rank=rank, num_workers=num_workers, healer=healer)
    learner.wrap(distributed=num_workers > 1)
    mine = slice(learner.slots.start, learner.slots.stop)
    for step in range(STEPS):
        labels = (torch.arange(BATCH) + step) % CLASSES
        shade = (labels * 40)[:, None, None, None].expand(-1, 32, 32, 3).to(torch.uint8)
        # Not those of the first worker, which knows it from the mean loss.
        targets = torch.where(torch.arange(BATCH) >= 2, (labels + 3) % CLASSES, labels) if step == BAD else labels
        learner.step(step, shade[mine], targets[mine])
    learner.check()
    healer.decide()
    sums = sum(float(p.detach().double().sum()) for p in learner.model.parameters())
    (directory / f"{num_workers}-{rank}").write_text(f"{list(healer.left_out)} {sums} {healer.recent}")
    if num_workers > 1:
        torch.distributed.destroy_process_group()


def test_three_workers_leave_out_what_one_does(tmp_path):
    threads = torch.get_num_threads()
    train_shares(0, 1, tmp_path)
    torch.set_num_threads(threads)
    run_ranks(train_shares, (3, tmp_path), 3)
    one, *three = ((tmp_path / name).read_text() for name in ("1-0", "3-0", "3-1", "3-2"))
    assert one.startswith(f"[{BAD}] ")
    assert three[0].startswith(f"[{BAD}] ")
    assert len(set(three)) == 1  # bit for bit
