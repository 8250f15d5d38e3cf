"""Memory that training takes, from the network's shape alone, and micro-batches that fit into it. PyTorch only."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import psutil
import torch

from bit_ray.cluster.slots import Workers
from bit_ray.models.zoo import create_model
from bit_ray.training.config import Runtime
from bit_ray.training.parts import count_parameters
from bit_ray.training.plan import TrainPlan
from bit_ray.training.shares import share_out

# Fitted to the peak memory of 13 processes that took two steps in float32 on a CPU: R1-1-1-1x0.5, R26x1 and R50x1 at 32
# to 160 pixels, 2 to 128 images. The fit has 1.58, 2.84 copies and 0.23 GB; it is within 5 % of the whole process, and
# within 10 % of what training adds to it.
# From the activations that a forward pass keeps to what an image takes at the peak.
_PEAK = 1.6
# What a worker has imported, PyTorch and Ray; what its first step loads; and what more it imports to train with others,
# PyTorch's compiler above all (benchmarks/results/2026-11-30-epyc-2-cores-memory.md).
_LIBRARIES, _FIRST_STEP, _WITH_OTHERS = 560_000_000, 230_000_000, 170_000_000
# Weights, their gradients and their momentum.
_COPIES = 3
_BYTES = 4
# Copies of the largest unit that a worker of a training in shards has at a time: the weights of two, of which one is
# fetched while the other computes, and gradients of two, each before and while it is summed.
_GATHERED = 6
# Share of the memory that training may take; readers, the object store and everything else have the rest.
_SHARE = 0.5
# Of what a GPU has free once the weights are on it; workspaces of kernels and gaps between blocks have the rest. Not
# measured on a GPU yet; the activations are counted in float32, so with bfloat16 it is on the safe side.
_GPU_SHARE = 0.7
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def with_room(plan: TrainPlan, runtime: Runtime, workers: Workers, *, local: bool) -> Runtime:
    """Return the settings with a micro-batch that fits into this machine's memory, where none was set.

    The result of the training does not depend on it, up to rounding. Only workers on the CPUs of this machine are known
    here; on a cluster the settings are unchanged, as they are with BatchNorm, which decides the size. On GPUs each
    worker looks what is free: `gpu_micro_batch`.

    Raises:
        ConfigError: The batch cannot be shared out over the workers.
    """
    if runtime.micro_batch_size or workers.use_gpu or not local or plan.batch_of_statistics:
        return runtime
    _, micro = share_out(plan, runtime, workers.most)
    room = _SHARE * total_memory() / workers.most - _fixed(plan, runtime, workers.most)
    fitting = max(2, int(room / bytes_per_image(plan.model, plan.view.crop_size)) // 2 * 2)  # even, for MixUp's pairs
    return runtime if fitting >= micro else replace(runtime, micro_batch_size=fitting)


def gpu_micro_batch(plan: TrainPlan, free: float, num_shards: int = 1) -> int:
    """Images per forward and backward pass that fit into a GPU beside gradients and momentum; even, and at least 2.

    Args:
        plan: What is to be learned, by a network without BatchNorm.
        free: Bytes that are free once the weights, or this worker's shard of them, are there.
        num_shards: Workers that have a shard each.
    """
    room = _GPU_SHARE * free - _BYTES * _copies(plan, num_shards)
    return max(2, int(room / bytes_per_image(plan.model, plan.view.crop_size)) // 2 * 2)


def free_gpu_memory(device: torch.device) -> int:
    """Bytes that tensors of this process can have on a GPU: what nobody has, and what PyTorch keeps for it."""
    free: int = torch.cuda.mem_get_info(device)[0]
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def worker_memory(plan: TrainPlan, runtime: Runtime, num_workers: int, micro_batch_size: int) -> int:
    """Bytes that one of so many workers takes at its peak, about, with so many images per pass in float32."""
    return int(_fixed(plan, runtime, num_workers) + micro_batch_size * bytes_per_image(plan.model, plan.view.crop_size))


def total_memory() -> int:
    """Bytes of memory that this machine, or the container around this process, has."""
    total = int(psutil.virtual_memory().total)
    for path in map(Path, _LIMITS):
        try:
            total = min(total, int(path.read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return total


def bytes_per_image(model: str, crop_size: int) -> int:
    """Bytes that one more image of a micro-batch takes, about, in float32.

    Args:
        model: Name of the network.
        crop_size: Side of the view, pixels.
    """
    return int(_PEAK * _BYTES * kept_elements(model, crop_size))


@cache
def kept_elements(model: str, crop_size: int) -> float:
    """Activations that the backward pass needs of one more image.

    Args:
        model: Name of the network.
        crop_size: Side of the view, pixels.
    """
    one, three = (_kept(model, crop_size, count) for count in (1, 3))
    return (three - one) / 2 / _BYTES


def _fixed(plan: TrainPlan, runtime: Runtime, num_workers: int) -> int:
    imported = _LIBRARIES + (_WITH_OTHERS if num_workers > 1 else 0)
    return imported + _FIRST_STEP + _BYTES * _copies(plan, 1 if runtime.sharding == "none" else num_workers)


def _copies(plan: TrainPlan, num_shards: int) -> int:
    """Numbers of weights, gradients and momentum that a worker has, with those of the unit that is computed."""
    copies = _COPIES * count_parameters(plan.model, plan.num_classes, plan.train)[1]
    if num_shards == 1:
        return copies
    return -(-copies // num_shards) + _GATHERED * _largest_unit(plan.model, plan.num_classes)


@cache
def _largest_unit(model: str, num_classes: int) -> int:
    """Parameters of the part of a network that is gathered at a time and has most."""
    with torch.device("meta"):
        units = create_model(model, num_classes).units()
    return max(sum(p.numel() for p in unit.parameters()) for unit in units)


def _kept(model: str, crop_size: int, count: int) -> int:
    """Bytes that autograd keeps of a forward pass of some images; nothing is computed."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # held, so that no other storage gets its number
        return tensor

    with torch.device("meta"):
        network = create_model(model, 1).train()
        images = torch.zeros(count, 3, crop_size, crop_size)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(images)
    return sum(storage.nbytes() for storage in kept.values())
