"""BatchNorm that gives the same result with any number of workers.

Training normalises by the statistics of a group of images: those of one forward pass, or with ``over_workers`` those of
all workers together. The running statistics, which evaluation uses, move once per optimizer step, by the mean over the
groups of the whole batch. So neither they nor the gradients depend on which worker had which group.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

# Defaults of torch.nn.BatchNorm2d, with which torchvision trains ResNets. The TPU code of the authors' group has the
# same, decay 0.9 and eps 1e-5 (tensorflow/tpu:models/official/resnet/resnet_model.py). The paper gives no values.
EPS, MOMENTUM = 1e-5, 0.1


class BatchNormReLU(nn.Module):
    """BatchNorm with an affine per channel, then ReLU. A frozen one normalises by its running statistics.

    Unlike `torch.nn.BatchNorm2d` it does not count batches, and only `update_running` changes its running statistics.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_channels: int, *, over_workers: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.register_buffer("running_mean", torch.zeros(num_channels))
        self.register_buffer("running_var", torch.ones(num_channels))
        self.over_workers = over_workers
        self.seen: Tensor | None = None
        """Sum of the groups' means and variances, ``[2, C]``, since the last `update_running`."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[B, C, H, W]`` and apply ReLU."""
        if not (self.training and self.weight.requires_grad):
            y = functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=EPS)
        elif self.over_workers and dist.is_initialized() and dist.get_world_size() > 1:
            y, mean, var = self._over_workers(x)
            self._see(mean, var)
        else:
            mean, var = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
            # With momentum 1 these become the statistics of the batch.
            y = functional.batch_norm(x, mean, var, self.weight, self.bias, training=True, momentum=1.0, eps=EPS)
            self._see(mean, var)
        return functional.relu(y, inplace=True)

    def _over_workers(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalise by the images of all workers; the mean comes first, as E[x²] - E[x]² loses digits."""
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            number = wide.new_full((1,), x.numel() / x.shape[1])
            sums = _SumOverWorkers.apply(torch.cat([wide.sum(dim=(0, 2, 3)), number]))
            number = sums[-1].detach()
            mean = sums[:-1] / number
            centred = wide - mean[:, None, None]
            var = _SumOverWorkers.apply(centred.square().sum(dim=(0, 2, 3))) / number
            y = centred * (self.weight * (var + EPS).rsqrt())[:, None, None] + self.bias[:, None, None]
        return y.to(x.dtype), mean.detach(), (var * number / (number - 1)).detach()

    @torch.no_grad()
    def _see(self, mean: Tensor, var: Tensor) -> None:
        statistics = torch.stack([mean, var])
        self.seen = statistics if self.seen is None else self.seen + statistics


class _SumOverWorkers(torch.autograd.Function):
    """A tensor summed over all workers, whose loss is the sum of theirs."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        total = x.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_: Any, grad: Tensor) -> Tensor:
        return _SumOverWorkers.forward(_, grad)


@torch.no_grad()
def update_running(model: nn.Module, num_groups: int, valid: Tensor) -> None:
    """Move the running statistics of all BatchNorms that have been trained since the last call, in place.

    All workers must call it together.

    Args:
        model: A network with any number of them, or none.
        num_groups: Groups of the whole batch, over all workers.
        valid: Scalar bool on the device; if it is false, the statistics do not change.
    """
    layers = [module for module in model.modules() if isinstance(module, BatchNormReLU) and module.seen is not None]
    if not layers:
        return
    seen = torch.cat([layer.seen for layer in layers if layer.seen is not None], dim=1)
    if not layers[0].over_workers and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(seen)
    means = (seen / num_groups).split([len(layer.weight) for layer in layers], dim=1)
    for layer, (mean, var) in zip(layers, means, strict=True):
        for running, new in ((layer.running_mean, mean), (layer.running_var, var)):
            running.copy_(torch.where(valid, running.lerp(new, MOMENTUM), running))
        layer.seen = None
