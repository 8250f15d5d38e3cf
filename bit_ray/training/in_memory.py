"""Training on examples held in memory, in this process, as few-shot studies need it. PyTorch only.

It follows the same plan, order, views and step as a run on the cluster.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from bit_ray.data.images.resize import eval_view, train_view
from bit_ray.data.images.views import example_keys, uniforms
from bit_ray.data.stream.order import Order
from bit_ray.models.network import Network
from bit_ray.training.healing import Healer
from bit_ray.training.learner import Learner
from bit_ray.training.parts import merge_adapters
from bit_ray.training.plan import TrainPlan


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
        """The examples at these indices."""
        return Examples(tuple(self.ids[i] for i in indices), [self.images[i] for i in indices], self.labels[indices])


class Watch(Protocol):
    """Measures a training, and saves it so that it can continue."""

    def begin(self, learner: Learner) -> int:
        """Restore the learner to where an earlier process has saved it, and return the next step; 0 at first."""

    def after(self, learner: Learner, step: int, loss: torch.Tensor) -> None:
        """Called after each step with its number and its loss, which may still be computed on a GPU."""


def fit(
    plan: TrainPlan,
    examples: Examples,
    init_weights: Mapping[str, torch.Tensor] | None = None,
    *,
    device: str | torch.device = "cpu",
    micro_batch_size: int = 0,
    on_step: Callable[[int, float], None] | None = None,
    watch: Watch | None = None,
    healer: Healer | None = None,
) -> Network:
    """Train to the last step of a plan.

    Args:
        plan: What to learn; its ``num_examples`` is that of ``examples``.
        examples: Single-label training examples.
        init_weights: Initial tensors by name, without the head; None: from scratch.
        device: Where to train.
        micro_batch_size: Examples per forward and backward pass; 0: the whole batch.
        on_step: Called with the step's number and loss.
        watch: Measures it, and may continue an earlier process.
        healer: Leaves out steps that are out of the ordinary; the loss of such a step is 0.

    Returns:
        The trained network, in evaluation mode.

    Raises:
        DivergedError: The loss or its gradient is not finite, or the healer may not leave out another batch.
        GoBackError: The healer has found the weights to be broken.
    """
    assert plan.num_examples == len(examples.ids) == len(examples.labels)
    learner = Learner(
        plan, torch.device(device), init_weights=init_weights, micro_batch_size=micro_batch_size, healer=healer
    )
    order = Order(
        shard_sizes=(plan.num_examples,),
        row_group_size=1,  # nothing is read in groups here: a full shuffle
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
    rows = np.empty((0, 3), np.int64)  # (step, epoch, row) not trained on yet
    first = watch.begin(learner) if watch is not None else 0
    units = iter(order.unit_range(slots, first, plan.schedule.num_steps))
    for step in range(first, plan.schedule.num_steps):
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
        loss, _ = learner.step(step, torch.from_numpy(pixels), torch.from_numpy(examples.labels[picked]))
        if on_step is not None:
            on_step(step, loss.item())
        if watch is not None:
            watch.after(learner, step, loss)
    learner.check()
    if healer is not None:
        healer.decide()
    merge_adapters(learner.model)
    return learner.model.eval()
