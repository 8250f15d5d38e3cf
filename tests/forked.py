"""Processes of tests, forked from one that has imported what takes seconds, once for all tests of this process."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from typing import Any

# That process has no threads of its own that compute.
PRELOAD = [
    "bit_ray.inference.serving",
    "bit_ray.data.shards.write",
    "bit_ray.tracking.server",
    "bit_ray.training.config",
    "bit_ray.training.learner",
    "mlflow.store.tracking.sqlalchemy_store",
    "scipy.io",
    "torch._dynamo",
    "torch.distributed.fsdp",
]


def forked() -> ForkServerContext:
    """What makes such processes; the one that they are forked from starts with the first of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def run_ranks(function: Callable[..., None], args: tuple[Any, ...], num_processes: int) -> None:
    """Call ``function(rank, *args)`` in so many processes at once, and wait for them; one that fails ends all."""
    import torch.multiprocessing

    forked()
    torch.multiprocessing.start_processes(function, args, nprocs=num_processes, start_method="forkserver")
