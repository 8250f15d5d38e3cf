"""The load of the machine, as metrics."""

import sys
from contextlib import suppress

import psutil

GB = 1e9


def system_metrics(disk: str = "/") -> dict[str, float]:
    """Return the load of this machine and process, in percent and GB (1e9 bytes), by names ``system/...``.

    CPU percent is since the previous call (0 in the first one). ``disk`` is a local path on the disk to watch. GPU
    figures are those of the current CUDA device, if PyTorch is loaded and has one.
    """
    memory = psutil.virtual_memory()
    metrics = {
        "system/cpu_percent": psutil.cpu_percent(),
        "system/memory_used_gb": (memory.total - memory.available) / GB,
        "system/process_memory_gb": psutil.Process().memory_info().rss / GB,
        "system/disk_free_gb": psutil.disk_usage(disk).free / GB,
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        metrics["system/gpu_memory_used_gb"] = (total - free) / GB
        metrics["system/gpu_memory_peak_gb"] = torch.cuda.max_memory_allocated() / GB
        with suppress(Exception):  # needs NVIDIA's management library, which not every installation has
            metrics["system/gpu_percent"] = float(torch.cuda.utilization())
    return metrics
