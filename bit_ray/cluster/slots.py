"""How many computations the cluster runs in parallel, and how many of them train."""

import os
from dataclasses import dataclass
from typing import Literal

from bit_ray.errors import ConfigError


@dataclass(frozen=True)
class Resources:
    """CPUs and GPUs that the cluster has now; an autoscaling one may grow."""

    num_nodes: int
    num_cpus: int
    num_gpus: int
    local: bool
    """Whether this process started the cluster."""

    @property
    def num_slots(self) -> int:
        """Computations that run in parallel without sharing a core or a GPU."""
        return self.num_gpus or (num_local_cores() if self.local else max(1, self.num_cpus))


def num_local_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def choose_workers(
    resources: Resources,
    global_batch_size: int,
    *,
    num_workers: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> tuple[int, bool]:
    """Return the number of training workers, and whether each gets a GPU.

    Args:
        resources: The cluster.
        global_batch_size: Examples per step over all workers.
        num_workers: The setting. 0: one per GPU; without GPUs one per core of this machine, or half the CPUs of a
            cluster, whose other half then reads and decodes; never more than there are pairs of images in a batch.
        device: Where they compute; ``auto``: on GPUs if there are any.

    Raises:
        ConfigError: CUDA is requested and there is none, or no CPU would be left for readers on this machine.
    """
    use_gpu = device == "cuda" or (device == "auto" and resources.num_gpus > 0)
    if use_gpu and resources.num_gpus == 0 and resources.local:
        raise ConfigError.of("runtime.device", "cuda, but this machine has no GPU", "auto or cpu", "choose one")
    if num_workers:
        if resources.local and not use_gpu and num_workers >= resources.num_cpus:
            accepted = f"at most {resources.num_cpus - 1} on this machine"
            raise ConfigError.of("runtime.num_workers", num_workers, accepted, "lower it")
        return num_workers, use_gpu
    if use_gpu:
        most = resources.num_gpus
    else:
        most = num_local_cores() if resources.local else resources.num_cpus // 2
    return max(1, min(most, global_batch_size // 2)), use_gpu
