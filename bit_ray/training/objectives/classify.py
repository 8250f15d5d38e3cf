"""Classification: softmax or sigmoid cross-entropy, with MixUp. PyTorch only.

Another objective must have the same methods as `Classification`. ``targets`` returns a tensor with an entry per row of
a batch, padded where they are ragged, with -1 in the holes. A call returns the loss of a micro-batch as a sum over its
images, so that splitting a batch changes only rounding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from bit_ray.data.stream.rows import Row
from bit_ray.training.plan import Loss


@dataclass(frozen=True, kw_only=True)
class Classification:
    """The objective of a plan that classifies images."""

    loss: Loss
    """Softmax for one label per image, sigmoid for several."""
    num_classes: int
    """Outputs of the network."""
    mixup_alpha: float = 0.0
    """MixUp's Beta parameter; 0: off."""
    seed: int = 0
    """Seed of MixUp."""

    def targets(self, rows: Sequence[Row]) -> torch.Tensor:
        """Return the targets of a batch.

        Args:
            rows: ``b`` rows of the stream.

        Returns:
            For softmax ``[b] int64`` class indices, for sigmoid ``[b, C] int8`` multi-hot; -1 in holes.
        """
        if self.loss == "softmax":
            return torch.tensor([-1 if row.placement is None else row.labels[0] for row in rows], dtype=torch.int64)
        targets = np.zeros((len(rows), self.num_classes), np.int8)
        for target, row in zip(targets, rows, strict=True):
            if row.placement is None:
                target[:] = -1
            else:
                target[list(row.labels)] = 1
        return torch.from_numpy(targets)

    def __call__(
        self,
        network: Callable[[torch.Tensor], torch.Tensor],
        images: torch.Tensor,
        targets: torch.Tensor,
        step: int,
    ) -> torch.Tensor:
        """Return the loss of a micro-batch, summed over its images.

        Args:
            network: Images to logits ``[b, C]``.
            images: ``[b, 3, H, W] float32`` on the device, as the network takes them.
            targets: ``[b] int64``, or ``[b, C]`` multi-hot; -1: see `loss_sum`.
            step: Number of the optimizer step, which decides MixUp's lambda.
        """
        if not self.mixup_alpha:
            return loss_sum(network(images), targets, self.loss)
        lam = mixup_weight(self.mixup_alpha, self.seed, step)
        logits = network(images.lerp(swap_neighbours(images), 1.0 - lam))
        partners = loss_sum(logits, mixed_targets(targets), self.loss)
        return lam * loss_sum(logits, targets, self.loss) + (1.0 - lam) * partners


def loss_sum(logits: torch.Tensor, targets: torch.Tensor, loss: Loss) -> torch.Tensor:
    """Loss summed over examples.

    Args:
        logits: ``[B, C]``.
        targets: ``[B] int64`` for softmax, ``[B, C]`` multi-hot for sigmoid; -1 marks a missing example, which does
            not count in the loss.
        loss: ``sigmoid`` sums the binary cross-entropies over classes (big_transfer#26).

    Returns:
        Scalar, at least float32.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if loss == "softmax":
        return F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
    present = (targets[:, :1] >= 0).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), weight=present, reduction="sum")


def mixup_weight(alpha: float, seed: int, step: int) -> float:
    """The one lambda ~ Beta(alpha, alpha) of an optimizer step, shared by all its micro-batches and workers."""
    return float(np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 2, step]))).beta(alpha, alpha))


def swap_neighbours(x: torch.Tensor) -> torch.Tensor:
    """Pairs (0, 1), (2, 3), ... exchanged along the first axis: MixUp's permutation.

    The order of an epoch is a random permutation and a batch is a range of it. So exchanging neighbours of the batch
    exchanges random partners of the data, as with a permutation drawn per batch. (The reference draws one per
    micro-batch in PyTorch and reverses the batch in JAX; any fixed permutation of a shuffled batch works,
    big_transfer:bit_pytorch/train.py, bit_jax/input_pipeline_tf2_or_tf1.py.) Pairs of neighbours stay together in every
    even micro-batch, so that the step does not depend on how the batch is split.
    """
    return x.view(-1, 2, *x.shape[1:]).flip(1).view(x.shape)


def mixed_targets(targets: torch.Tensor) -> torch.Tensor:
    """Targets of the partners; an example whose partner is missing (-1) is its own partner, as its pixels are."""
    partners = swap_neighbours(targets)
    return torch.where((partners < 0) | (targets < 0), targets, partners)
