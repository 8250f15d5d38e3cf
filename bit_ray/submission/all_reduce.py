"""How fast the nodes of a cluster add up gradients: one process per node, as training workers would."""

import time
from collections.abc import Sequence
from datetime import timedelta

import ray
import torch
import torch.distributed as dist

from bit_ray.errors import ConfigError, root_cause
from bit_ray.submission.nodes import Node, on_node

_SECONDS = 90.0
_SECONDS_TO_MEET = 45
_BYTES = {"gloo": 16 * 2**20, "nccl": 256 * 2**20}
_REPEATS = 3


def bandwidth(nodes: Sequence[Node], *, use_gpu: bool) -> float:
    """Return the bytes per second that each node sends and receives in an all-reduce.

    It is that of a ring: 2 (n - 1) / n times the bytes of the tensor, over the time (bus bandwidth of nccl-tests).

    Args:
        nodes: At least two.
        use_gpu: Whether to use NCCL between one GPU of each node; else gloo.

    Raises:
        ConfigError: The nodes do not reach each other, or have no free GPU.
    """
    backend = "nccl" if use_gpu else "gloo"
    address = f"tcp://{nodes[0].address}:{nodes[0].free_port}"
    refs = [
        ray.remote(num_cpus=0, num_gpus=1 if use_gpu else 0, max_retries=0, scheduling_strategy=on_node(node.id))(
            _all_reduce
        ).remote(backend, address, rank, len(nodes))
        for rank, node in enumerate(nodes)
    ]
    variable = "NCCL_SOCKET_IFNAME" if use_gpu else "GLOO_SOCKET_IFNAME"
    remedy = f"open all ports between the nodes, or name their network's interface by --env {variable}=eth0"
    where = f"{len(nodes)} nodes by {backend}"
    try:
        seconds = max(ray.get(refs, timeout=_SECONDS))
    except ray.exceptions.GetTimeoutError:
        raise ConfigError(f"{where}: no all-reduce within {_SECONDS:.0f} s; {remedy}") from None
    except ray.exceptions.RayError as error:
        if (cause := root_cause(error)) is not None:
            raise cause from None
        last = (str(error).strip().splitlines() or ["no reason"])[-1]
        raise ConfigError(f"{where}: {last[:300]}; {remedy}") from None
    finally:
        # Not those that have ended: Ray 2.60 sometimes crashes when one is cancelled as its reply arrives.
        for ref in ray.wait(refs, num_returns=len(refs), timeout=0)[1]:
            ray.cancel(ref, force=True)
    return 2 * (len(nodes) - 1) / len(nodes) * _BYTES[backend] / seconds


def _all_reduce(backend: str, address: str, rank: int, number: int) -> float:
    """Return the seconds of one all-reduce, the mean of some."""
    device = torch.device("cuda" if backend == "nccl" else "cpu")
    dist.init_process_group(
        backend, init_method=address, rank=rank, world_size=number, timeout=timedelta(seconds=_SECONDS_TO_MEET)
    )
    try:
        tensor = torch.ones(_BYTES[backend] // 4, device=device)
        dist.all_reduce(tensor)  # connects
        if float(tensor[0]) != number:
            raise ConfigError(f"all-reduce by {backend}: gave {float(tensor[0])}, not {number}; look at the network")
        dist.barrier()
        _wait_for(device)
        began = time.perf_counter()
        for _ in range(_REPEATS):
            dist.all_reduce(tensor)
        _wait_for(device)
        return (time.perf_counter() - began) / _REPEATS
    finally:
        dist.destroy_process_group()


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
