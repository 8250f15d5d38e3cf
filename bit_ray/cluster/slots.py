"""How many computations the cluster runs in parallel, and how many of them train."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from bit_ray.errors import ConfigError

_PARTS_FOR_A_SLOT = 64


@dataclass(frozen=True)
class Resources:
    """CPUs and GPUs that the cluster has now; an autoscaling one may grow."""

    num_nodes: int
    num_cpus: int
    num_gpus: int
    local: bool
    """Whether this process started the cluster."""
    num_cpus_later: int = 0
    """CPUs that an autoscaler may bring it to; 0: no autoscaler."""
    num_gpus_later: int = 0
    """The same for GPUs."""
    cpus_of_one: int = 0
    """CPUs that one computation can have, since it runs on one node, of now or later: those for each GPU of the node
    with fewest, or without GPUs those of the largest node; 0: not known."""

    @property
    def grows(self) -> bool:
        """Whether there is an autoscaler."""
        return self.num_cpus_later + self.num_gpus_later > 0

    @property
    def most_cpus(self) -> int:
        """CPUs that it has, or may come to."""
        return max(self.num_cpus, self.num_cpus_later)

    @property
    def most_gpus(self) -> int:
        """The same for GPUs."""
        return max(self.num_gpus, self.num_gpus_later)

    @property
    def num_slots(self) -> int:
        """Computations that run in parallel without sharing a core or a GPU, on the cluster at its largest size."""
        return self.most_gpus or (num_local_cores() if self.local else max(1, self.most_cpus))

    def slots_for(self, num_parts: int, *, use_gpu: bool | None = None) -> int:
        """Return how many slots some work keeps busy: those there are now, and more only if it has many parts.

        Args:
            num_parts: Row groups or the like, seconds of work each; a node that an autoscaler brings takes minutes.
            use_gpu: Whether a slot is a GPU; None: if there are any, or may be.
        """
        if use_gpu is None:
            use_gpu = self.most_gpus > 0
        if self.local:
            now = later = self.num_gpus if use_gpu else num_local_cores()
        elif use_gpu:
            now, later = self.num_gpus, self.most_gpus
        else:
            now, later = self.num_cpus, self.most_cpus
        return max(1, now, min(later, num_parts // _PARTS_FOR_A_SLOT))


def cpus_of_one(nodes: Sequence[Mapping[str, float]]) -> int:
    """Return `Resources.cpus_of_one` of nodes with these resources."""
    beside_gpus = [int(node.get("CPU", 0) // node["GPU"]) for node in nodes if node.get("GPU")]
    return min(beside_gpus) if beside_gpus else int(max((node.get("CPU", 0) for node in nodes), default=0))


def num_local_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


class Workers(NamedTuple):
    """Least and most training workers, and whether each gets a GPU."""

    least: int
    most: int
    use_gpu: bool

    @property
    def bundle(self) -> dict[str, float]:
        """What one worker takes of a node."""
        return {"CPU": 1.0, **({"GPU": 1.0} if self.use_gpu else {})}


def choose_workers(
    resources: Resources,
    global_batch_size: int,
    *,
    num_workers: tuple[int, int] = (0, 0),
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> Workers:
    """Return the number of training workers, and whether each gets a GPU.

    Args:
        resources: The cluster.
        global_batch_size: Examples per step over all workers.
        num_workers: The setting, least and most. 0: one per GPU; without GPUs one per core of this machine, or half the
            CPUs of a cluster, whose other half then reads and decodes; never more than there are pairs of images in a
            batch. On a cluster that an autoscaler may enlarge, from 1 to the number for its largest size.
        device: Where they compute; ``auto``: on GPUs if there are any, or may be.

    Raises:
        ConfigError: CUDA is requested, but there is no GPU; no CPU would be left for readers on this machine;
            or an autoscaler cannot bring room for so many.
    """
    use_gpu = device == "cuda" or (device == "auto" and resources.most_gpus > 0)
    if use_gpu and not resources.most_gpus:
        raise ConfigError.of("runtime.device", f"cuda, but {_place(resources)} has no GPU", "auto or cpu", "choose one")
    if any(num_workers):
        if resources.local and not use_gpu and num_workers[0] >= resources.num_cpus:
            accepted = f"at most {resources.num_cpus - 1} on this machine"
            raise ConfigError.of("runtime.num_workers", num_workers[0], accepted, "lower it")
        most = resources.most_gpus if use_gpu else resources.most_cpus
        if not resources.grows:  # the nodes may still be on their way
            return Workers(*num_workers, use_gpu)
        if num_workers[0] > most:
            accepted = f"at most {most}, the {'GPUs' if use_gpu else 'CPUs'} that there may be"
            raise ConfigError.of("runtime.num_workers", num_workers[0], accepted, "lower it, or raise max_workers")
        # What cannot come is not asked for: Ray would write of it into the job's log at every look.
        return Workers(num_workers[0], min(num_workers[1], most), use_gpu)
    if use_gpu:
        now, later = resources.num_gpus, resources.num_gpus_later
    else:
        now = num_local_cores() if resources.local else resources.num_cpus // 2
        later = resources.num_cpus_later // 2
    most = max(1, min(max(now, later), global_batch_size // 2))
    return Workers(1 if later > now else most, most, use_gpu)


def _place(resources: Resources) -> str:
    if resources.local:
        return "this machine"
    return "the cluster, as large as its autoscaler may make it," if resources.grows else "the cluster"
