"""Parameters, gradients and momentum in shards, one for each worker, with FSDP2. PyTorch only.

Every worker keeps some rows of each tensor, as a `DTensor`. The tensors of one unit of the network after the other are
gathered for its forward and its backward pass, so Weight Standardization sees whole kernels. Whole float32 tensors are
gathered and summed: what is learned is the same up to rounding.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bit_ray.models.network import Network


def shard(model: Network, device: torch.device) -> None:
    """Keep a shard of the network on this worker's device, in place; all workers call it with a network on the CPU.

    The weights become those of rank 0. The device never holds more than its shards and one unit.
    """
    # Half a second of imports that other trainings do without.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if device.type == "cuda":
        torch.cuda.set_device(device)  # which FSDP2 takes; workers of a node may see all of its GPUs
    for p in model.parameters():
        tensor = p.detach().to(device, memory_format=torch.contiguous_format).contiguous()  # FSDP2 knows no other
        dist.broadcast(tensor, src=0)
        p.data = tensor.to(p.device)
    model.recompute_kernels()  # or every worker would have all of them after the forward pass
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for unit in (*model.units(), model):
        fully_shard(unit, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor of which every worker has a shard, gathered; all workers call it. Others are returned as is."""
    gathered: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if gathered is None else gathered()


def local(tensor: Tensor) -> Tensor:
    """Return this worker's shard, which shares its memory, or the tensor itself if it has no shards."""
    mine: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)
    return tensor if mine is None else mine()


@torch.no_grad()
def fill(tensor: Tensor, values: Tensor) -> None:
    """Copy whole values into a tensor, or this worker's rows of them into its shard."""
    sharded: Any = tensor
    if hasattr(sharded, "placements"):
        from torch.distributed.tensor import distribute_tensor

        values = values.to(sharded.device)
        values = distribute_tensor(values, sharded.device_mesh, sharded.placements, src_data_rank=None)
    local(tensor).copy_(local(values))
