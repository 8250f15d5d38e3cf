"""PyTorch's flight recorder: which collectives each worker began and ended last, for when one of them never ends."""

import os
from contextlib import suppress

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from bit_ray import store
from bit_ray.errors import BitRayError

_ENTRIES = 20_000


class RecordedTorchConfig(TorchConfig):
    """Ray's, with the recorder on: it reads its settings when the workers' process group is made."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """What Ray starts in the workers."""
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group, backend_config) -> None:  # type: ignore[no-untyped-def]
        worker_group.execute(_record)
        super().on_start(worker_group, backend_config)


def _record() -> None:
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(_ENTRIES))
    # NCCL writes its own file, too, when a collective has taken `give_up_after_s`: among the node's logs of Ray.
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    with suppress(AttributeError):  # a private name
        logs = ray._private.worker._global_node.get_logs_dir_path()
        for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
            os.environ.setdefault(name, os.path.join(logs, f"collectives-{os.getpid()}-rank-"))


def write_collectives(uri: str) -> None:
    """Write down what this process's recorders have, as JSON by backend; nothing where the store fails."""
    try:
        from torch._C._distributed_c10d import (  # type: ignore[attr-defined]
            _dump_fr_trace_json,
            _dump_nccl_trace_json,
        )
    except ImportError:  # private names, or a PyTorch without NCCL
        return
    with suppress(BitRayError, RuntimeError):
        store.write_bytes(uri, b'{"cpu": %s, "nccl": %s}' % (_dump_fr_trace_json(), _dump_nccl_trace_json()))
