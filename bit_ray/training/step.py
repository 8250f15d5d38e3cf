"""One optimizer step: micro-batches, MixUp, loss, precision, update. PyTorch only.

GroupNorm looks at one image at a time, so splitting a batch over micro-batches and workers changes nothing but
rounding: the loss is a mean over the *global* batch, however it is cut.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from bit_ray.errors import ConfigError, ModelError
from bit_ray.training.config import Precision
from bit_ray.training.plan import Loss, TrainPlan


def resolve_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of the convolutions.

    ``auto`` takes bfloat16 on GPUs with tensor cores for it and float32 elsewhere: on a CPU without AMX or AVX512-BF16
    bfloat16 convolutions are an order of magnitude slower than float32, and with them the networks small enough to
    train on a CPU gain little.

    Raises:
        ConfigError: bfloat16 is asked for on a device that has no fast path for it.
    """
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        fast = bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    if precision == "bf16" and not fast:
        raise ConfigError(
            f"runtime.precision: bf16 has no fast path on this {device.type} device (needs CUDA compute capability 8, "
            "AMX or AVX512-BF16); use auto or fp32"
        )
    use_bf16 = precision == "bf16" or (precision == "auto" and fast and device.type == "cuda")
    return torch.bfloat16 if use_bf16 else torch.float32


@contextmanager
def worker_threads(device: str) -> Iterator[None]:
    """Compute on as many threads as a worker, which has one CPU: another number has another speed and rounding.

    Args:
        device: Type of the device, ``cpu`` or ``cuda``, where nothing changes.
    """
    before = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def normalize(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Pixels as the network takes them.

    Args:
        images: ``[B, H, W, 3] uint8``.
        device: Where the network is.

    Returns:
        ``[B, 3, H, W] float32`` in [-1, 1], channels-last in memory: (x - 127.5) / 127.5 (big_transfer#26).
    """
    return images.to(device, non_blocking=True).permute(0, 3, 1, 2).float().sub_(127.5).div_(127.5)


def to_channels_last(model: nn.Module) -> None:
    """Lay the kernels out channels-last, in place.

    A 1x1 kernel is channels-last and contiguous at once; it gets the strides of a contiguous one, which its gradient
    has too, or else DistributedDataParallel copies the gradient (and says so).
    """
    model.to(memory_format=torch.channels_last)
    for p in model.parameters():
        if p.ndim == 4 and p.shape[2:] == (1, 1):
            p.data = p.data.flatten(1).contiguous().view(p.shape)


def loss_sum(logits: torch.Tensor, targets: torch.Tensor, loss: Loss) -> torch.Tensor:
    """Loss summed over examples.

    Args:
        logits: ``[B, C]``.
        targets: ``[B] int64`` for softmax, ``[B, C]`` multi-hot for sigmoid; -1 stands for an example that is missing
            and has no part in the loss.
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

    The order of an epoch is a random permutation and a batch is a stretch of it, so exchanging neighbours of the batch
    is exchanging random partners of the data: a neighbour is as likely any other example as with a permutation drawn
    per batch. (The reference draws one per micro-batch in PyTorch and reverses the batch in JAX; any fixed permutation
    of a shuffled batch serves, big_transfer:bit_pytorch/train.py, bit_jax/input_pipeline_tf2_or_tf1.py.) Pairs of
    neighbours stay together in every even micro-batch, so that the step does not depend on how the batch is cut.
    """
    return x.view(-1, 2, *x.shape[1:]).flip(1).view(x.shape)


def mixed_targets(targets: torch.Tensor) -> torch.Tensor:
    """Targets of the partners; an example whose partner is missing (-1) is its own partner, as its pixels are."""
    partners = swap_neighbours(targets)
    return torch.where((partners < 0) | (targets < 0), targets, partners)


def build_optimizer(model: nn.Module, plan: TrainPlan) -> torch.optim.SGD:
    """SGD with momentum on what is trained; weight decay on kernels, not GroupNorm or biases (big_vision:optax.py)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    kernels = [p for p in trained if p.ndim > 1]
    others = [p for p in trained if p.ndim <= 1]
    groups = [{"params": kernels, "weight_decay": plan.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=plan.momentum, fused=True)
    if plan.momentum:
        # The first step makes the same of zeros as of nothing, and a step that is left out does not leave garbage.
        for p in trained:
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


class NonFiniteError(ModelError):
    """A step whose gradient is not finite; the weights are those before it."""

    def __init__(self, step: int):
        super().__init__(
            f"step {step}: the loss or its gradient is not finite; the weights are those before this step; "
            "lower the learning rate, set clip_norm, or look at this step's images"
        )
        self.step = step


class TrainStep:
    """Runs optimizer steps of a plan on one worker.

    Args:
        model: The network, or its DistributedDataParallel wrapper; on the device, channels-last.
        optimizer: From `build_optimizer`.
        plan: What to learn.
        dtype: From `resolve_precision`.
        num_workers: Workers that share the global batch.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        plan: TrainPlan,
        *,
        dtype: torch.dtype = torch.float32,
        num_workers: int = 1,
    ):
        self.model, self.optimizer, self.plan, self.dtype = model, optimizer, plan, dtype
        self.num_workers = num_workers
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
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
            two scalars on the device, not waited for.

        Raises:
            NonFiniteError: The step before this one had no finite gradient; see `check`.
        """
        plan = self.plan
        lam = mixup_weight(plan.mixup_alpha, plan.seed, step) if plan.mixup_alpha else 1.0
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for i, (images, targets) in enumerate(batch):
            x = normalize(images, self.device)
            targets = targets.to(self.device, non_blocking=True)
            if lam != 1.0:
                x = x.lerp(swap_neighbours(x), 1.0 - lam)
            # Gradients travel between workers once per step, with the last micro-batch.
            last = i == num_micro_batches - 1
            with nullcontext() if last else getattr(self.model, "no_sync", nullcontext)():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                    logits = self.model(x)
                loss = loss_sum(logits, targets, plan.loss)
                if lam != 1.0:
                    loss = lam * loss + (1.0 - lam) * loss_sum(logits, mixed_targets(targets), plan.loss)
                loss = loss / plan.global_batch_size
                # DistributedDataParallel averages over workers; the loss is a mean over the global batch already.
                (loss * self.num_workers).backward()
            total += loss.detach()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None], foreach=True)
        if plan.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, plan.clip_norm, norm, foreach=True)
        self.check()
        for group in self.optimizer.param_groups:
            group["lr"] = plan.schedule.lr_at(step)
        # The fused update leaves the weights alone where this flag is set, without waiting for it on the host.
        self.optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self._unchecked = (step, norm)
        return total, norm

    def check(self) -> None:
        """Wait for the last step and make sure that it was finite.

        Called by the next step just before its own update, when the answer has long arrived; call it after the last
        step. Every worker holds the same summed gradient, so all of them raise together.

        Raises:
            NonFiniteError: The gradient of the last step was not finite; the weights are those before that step.
        """
        if self._unchecked is not None:
            (step, norm), self._unchecked = self._unchecked, None
            if not torch.isfinite(norm):
                raise NonFiniteError(step)


def micro_batches(
    images: torch.Tensor, targets: torch.Tensor, micro_batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Cut a worker's share of a batch into micro-batches, in order."""
    return zip(images.split(micro_batch_size), targets.split(micro_batch_size), strict=True)
