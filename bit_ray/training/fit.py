"""Training on examples held in memory, in this process: what few-shot suites run by the dozen. PyTorch only.

It follows the same plan, order, views and step as a run on the cluster.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from bit_ray.data.augment import eval_view, example_keys, train_view, uniforms
from bit_ray.data.order import Order
from bit_ray.models.resnet import ResNetV2
from bit_ray.training.plan import TrainPlan, batch_split
from bit_ray.training.step import TrainStep, build_optimizer, micro_batches, resolve_precision, to_channels_last
from bit_ray.training.trainable import merge_adapters


@dataclass(frozen=True)
class Examples:
    """Decoded images in memory."""

    ids: tuple[str, ...]
    """Their ids, which decide the random views."""
    images: Sequence[npt.NDArray[np.uint8]]
    """``[H, W, 3] uint8`` each; sizes may differ."""
    labels: npt.NDArray[np.int64]
    """``[N]`` class indices."""

    def subset(self, indices: npt.NDArray[np.int64]) -> "Examples":
        """The examples at these places."""
        return Examples(tuple(self.ids[i] for i in indices), [self.images[i] for i in indices], self.labels[indices])


def fit(
    model: ResNetV2,
    examples: Examples,
    plan: TrainPlan,
    *,
    micro_batch_size: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> None:
    """Train a model in place to the last step of a plan.

    Args:
        model: From `bit_ray.training.loop.build_model`, on the device where it is to be trained.
        examples: Single-label training examples.
        plan: What to learn; its ``num_examples`` is that of ``examples``.
        micro_batch_size: Examples per forward and backward pass; 0: the whole batch.
        on_step: Called with the step's number and loss.

    Raises:
        NonFiniteError: The loss or its gradient is not finite.
    """
    assert plan.num_examples == len(examples.ids) == len(examples.labels)
    assert plan.train == "all" or not all(p.requires_grad for p in model.parameters()), "not from build_model"
    micro, num_micro = batch_split(plan.global_batch_size, 1, micro_batch_size, pairs=plan.mixup_alpha > 0)
    device = next(model.parameters()).device
    to_channels_last(model)
    step_fn = TrainStep(model, build_optimizer(model, plan), plan, dtype=resolve_precision("auto", device))
    order = Order(
        shard_sizes=(plan.num_examples,),
        row_group_size=1,  # nothing is read in groups here, so the shuffle is as good as it gets
        global_batch_size=plan.global_batch_size,
        seed=plan.seed,
        shuffle=plan.shuffle,
    )
    view, size = plan.view, plan.view.crop_size
    images = examples.images
    if view.crop == "resize_crop":  # the resize is the same every time
        images = [eval_view(image, resize_mode="square", resize_size=0, crop_size=view.resize_size) for image in images]
    keys = example_keys(examples.ids)
    slots = range(plan.global_batch_size)
    pixels = np.empty((plan.global_batch_size, size, size, 3), np.uint8)
    model.train()
    rows = np.empty((0, 3), np.int64)  # (step, epoch, row) not trained on yet
    units = iter(order.unit_range(slots, 0, plan.schedule.num_steps))
    for step in range(plan.schedule.num_steps):
        while np.count_nonzero(rows[:, 0] == step) < plan.global_batch_size:
            unit = order.unit(next(units), slots)
            rows = np.concatenate(
                [rows, np.stack([unit.steps, np.full_like(unit.steps, unit.epoch), unit.rows], axis=1)]
            )
        _, epochs, picked = rows[rows[:, 0] == step].T
        rows = rows[rows[:, 0] > step]
        u = uniforms(plan.seed, epochs, keys[picked])
        for slot, index in enumerate(picked):
            pixels[slot] = train_view(images[index], view, u[slot])
        batch = torch.from_numpy(pixels), torch.from_numpy(examples.labels[picked])
        loss, _ = step_fn(step, micro_batches(*batch, micro), num_micro)
        if on_step is not None:
            on_step(step, loss.item())
    step_fn.check()
    merge_adapters(model)
    model.eval()
