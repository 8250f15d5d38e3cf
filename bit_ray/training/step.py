"""One optimizer step: micro-batches, objective, precision, update. PyTorch only.

GroupNorm uses one image at a time, so splitting a batch over micro-batches and workers changes only rounding: the loss
is always a mean over the *global* batch. BatchNorm uses groups of images; a batch is split at their bounds.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from bit_ray.models.batch_norm import update_running
from bit_ray.training.device import normalize
from bit_ray.training.healing import Healer, NonFiniteError
from bit_ray.training.objectives.classify import Classification
from bit_ray.training.optimizer import SGD, pull_to_initial
from bit_ray.training.plan import TrainPlan
from bit_ray.training.sharding import whole


class TrainStep:
    """Runs optimizer steps of a plan on one worker.

    Args:
        model: The network, in shards or not, or its DistributedDataParallel wrapper; on the device.
        optimizer: From `build_optimizer`.
        plan: What to learn.
        dtype: From `resolve_precision`.
        num_workers: Workers that share the global batch.
        first_slot: First slot of this worker's share of the batch; decides dropout's masks.
        healer: Leaves out steps that are out of the ordinary. None: one that is not finite is an error.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: SGD,
        plan: TrainPlan,
        *,
        dtype: torch.dtype = torch.float32,
        num_workers: int = 1,
        first_slot: int = 0,
        healer: Healer | None = None,
    ):
        self.model, self.optimizer, self.plan, self.dtype = model, optimizer, plan, dtype
        self.num_workers = num_workers
        self.first_slot = first_slot
        statistics = plan.batch_of_statistics
        network: Any = getattr(model, "module", model)
        self._num_features: int = network.num_features if plan.dropout else 0
        self._num_groups = plan.global_batch_size // statistics if statistics else 0
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.objective = Classification(
            loss=plan.loss, num_classes=plan.num_classes, mixup_alpha=plan.mixup_alpha, seed=plan.seed
        )
        self.healer = healer
        self._unchecked: tuple[int, torch.Tensor] | None = None

    def __call__(
        self, step: int, batch: Iterable[tuple[torch.Tensor, torch.Tensor]], num_micro_batches: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step.

        Args:
            step: 0-based; decides the learning rate and MixUp's lambda.
            batch: Micro-batches of (images ``[b, H, W, 3] uint8``, targets ``[b] int64`` or ``[b, C]``).
            num_micro_batches: How many there are.

        Returns:
            The worker's share of the global mean loss (the shares add up to it), and the norm of the global gradient:
            two scalars on the device, not waited for. The loss of a step that is left out is 0.

        Raises:
            DivergedError: The step before this one had no finite gradient; see `check`.
            GoBackError: It has shown that the weights are broken.
        """
        plan, healer = self.plan, self.healer
        if healer is not None and step in healer.left_out:
            self.check()
            return torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        slot = self.first_slot
        for i, (images, targets) in enumerate(batch):
            x = normalize(images, self.device)
            targets = targets.to(self.device, non_blocking=True)
            # Workers exchange gradients once per step, with the last micro-batch; in a training in shards with each, as
            # no worker has room for all gradients.
            last = i == num_micro_batches - 1
            with nullcontext() if last else getattr(self.model, "no_sync", nullcontext)():
                loss = self.objective(self._network(step, slot), x, targets, step) / plan.global_batch_size
                # Gradients are averaged over workers; the loss is a mean over the global batch already.
                (loss * self.num_workers).backward()
            total += loss.detach()
            slot += len(images)
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(grads, foreach=True))
        if plan.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, plan.clip_norm, norm, foreach=True)
        if plan.decay_to_init:
            pull_to_initial(self.optimizer)
        seen = torch.stack([total, norm / self.num_workers])
        if healer is not None and self.num_workers > 1:
            dist.all_reduce(seen)  # so that all workers judge the same numbers
        self.check()
        self.optimizer.lr = plan.schedule.lr_at(step)
        # The fused update does not change the weights if this flag is set, and the host does not wait for the flag.
        kept = torch.isfinite(norm)
        if healer is not None:
            kept = (seen[0] <= healer.bound) & torch.isfinite(seen[1])
            total = torch.where(kept, total, 0.0)
        self.optimizer.found_inf = (~kept).float()
        self.optimizer.step()
        if self._num_groups:
            update_running(self.model, self._num_groups, kept)
        self._unchecked = (step, torch.cat([seen, kept[None]]))
        return total, norm

    def _network(self, step: int, slot: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """The network for the images of a step from a slot on."""
        plan = self.plan

        def network(x: torch.Tensor) -> torch.Tensor:
            mask: tuple[torch.Tensor, ...] = ()
            if plan.dropout:
                slots = range(slot, slot + len(x))
                mask = (dropout_mask(plan.dropout, plan.seed, step, slots, self._num_features).to(self.device),)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                logits: torch.Tensor = self.model(x, *mask)
            return logits

        return network

    def check(self) -> None:
        """Wait for the last step and make sure that it was applied, or that it may be left out.

        The next step calls it just before its own update, when the result has long arrived; call it after the last
        step. Every worker has the same summed gradient, so all of them raise together.

        Raises:
            NonFiniteError: The gradient of the last step was not finite; the weights are those before that step.
            DivergedError: The healer may not leave it out.
            GoBackError: The healer has found the weights to be broken.
        """
        if self._unchecked is not None:
            (step, seen), self._unchecked = self._unchecked, None
            loss, norm, kept = seen.tolist()
            if self.healer is not None:
                self.healer.judge(step, loss, norm, kept=bool(kept))
            elif not kept:
                raise NonFiniteError(step)


def dropout_mask(rate: float, seed: int, step: int, slots: range, num_features: int) -> torch.Tensor:
    """Factors for the features of some images of a batch: 0 with probability ``rate``, else 1 / (1 - rate).

    They depend only on seed, step and slot (as MixUp's lambda on seed and step), so workers and micro-batches do not
    matter.

    Returns:
        ``[len(slots), num_features] float32``.
    """
    kept = np.empty((len(slots), num_features), np.float32)
    for row, slot in zip(kept, slots, strict=True):
        words = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 3, step, slot])))
        row[:] = words.random(num_features, np.float32) >= rate
    return torch.from_numpy(kept / np.float32(1 - rate))


def micro_batches(
    images: torch.Tensor, targets: torch.Tensor, micro_batch_size: int, least: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Split a worker's share of a batch into micro-batches, in order; to make ``least``, some that do not count follow.

    Those have two images without targets.
    """
    yield from zip(images.split(micro_batch_size), targets.split(micro_batch_size), strict=True)
    for _ in range(least - -(-len(images) // micro_batch_size)):
        yield images[:2], torch.full_like(targets[:2], -1)
