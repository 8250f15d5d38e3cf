"""The Ray cluster a command runs on: the one it was submitted to, or one of its own on this machine."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray

_OBJECT_STORE_BYTES = 512 * 1024**2
_started_here = False


@dataclass(frozen=True)
class Resources:
    """What the cluster has now; an autoscaling one may grow."""

    num_nodes: int
    num_cpus: int
    num_gpus: int
    local: bool
    """Whether this process started the cluster."""

    @property
    def num_places(self) -> int:
        """Computations that run side by side without sharing a core or a GPU."""
        return self.num_gpus or (num_local_cores() if self.local else max(1, self.num_cpus))


def num_local_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


@contextmanager
def cluster() -> Iterator[Resources]:
    """Use the cluster of ``RAY_ADDRESS`` (which ``ray job submit`` sets), or start one here and stop it at the end.

    Inside another ``with cluster()`` it is that one which goes on being used.
    """
    global _started_here
    if ray.is_initialized():
        yield _resources(local=_started_here)
        return
    # Ray's own bars would fight with ours over the terminal.
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.WARNING)
        try:
            yield _resources(local=False)
        finally:
            ray.shutdown()
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        address="local",
        # Training workers and readers share the cores: Ray's CPUs are places to run, and each kind needs its own.
        num_cpus=2 * num_local_cores() + 1,
        object_store_memory=_OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    _started_here = True
    try:
        yield _resources(local=True)
    finally:
        _started_here = False
        ray.shutdown()


def _resources(*, local: bool) -> Resources:
    total = ray.cluster_resources()
    nodes = sum(node["Alive"] for node in ray.nodes())
    return Resources(nodes, int(total.get("CPU", 0)), int(total.get("GPU", 0)), local)
