"""Small trainings on random images, for tests that compare one with another, also in processes of their own."""

import os
from dataclasses import replace

import numpy as np
import torch

from bit_ray.data.images.views import TrainView
from bit_ray.recipes.schedules import Schedule
from bit_ray.training.learner import Learner
from bit_ray.training.optimizer import kernel_norm
from bit_ray.training.plan import TrainPlan
from bit_ray.training.sharding import whole

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


CPU = torch.device("cpu")
EVEN = 64
STEPS = 3


def batch_of(step):
    images = torch.from_numpy(numbers(EVEN, 32, 32, 3, seed=step)).to(torch.uint8)
    targets = torch.from_numpy(numbers(EVEN, high=NUM_CLASSES, seed=100 + step))
    targets[5] = -1
    return images, targets


def train_shares(rank, cases, directory):
    """Train each case (plan, workers, micro-batch, in shards) on as many of the processes.

    Rank 0 saves losses and weights.
    """
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    for number, (plan, num_workers, micro, *sharded) in enumerate(cases):
        if rank >= num_workers:
            continue
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{directory}/{number}.ready", rank=rank, world_size=num_workers
        )
        learner = Learner(plan, CPU, micro_batch_size=micro, rank=rank, num_workers=num_workers, sharded=any(sharded))
        learner.wrap(distributed=num_workers > 1)
        losses = []
        for step in range(STEPS):
            images, targets = batch_of(step)
            mine = slice(learner.slots.start, learner.slots.stop)
            loss, norm = learner.step(step, images[mine], targets[mine])
            torch.distributed.all_reduce(loss)
            losses.append((loss.item(), norm.item()))
        learner.check()
        weights = {name: whole(tensor) for name, tensor in learner.model.state_dict().items()}
        losses.append(kernel_norm(learner.optimizer))
        if rank == 0:
            torch.save((losses, weights), f"{directory}/{number}.pt")
        torch.distributed.destroy_process_group()
