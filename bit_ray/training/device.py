"""The device that trains: precision, threads, memory and layout. PyTorch only."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from bit_ray.errors import ConfigError
from bit_ray.training.config import Precision

# Numbers of glibc's mallopt, from malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
# From these sizes on, bfloat16 is faster on a CPU with AMX.
_AMX_FEATURES, _AMX_PIXELS = 2048, 64


def resolve_precision(
    precision: Precision, device: torch.device, *, num_features: int = 0, crop_size: int = 0
) -> torch.dtype:
    """Return the dtype of the convolutions.

    ``auto`` takes bfloat16 on GPUs with tensor cores for it, and on CPUs with AMX for networks of full width and crops
    of 64 pixels or more. Their steps take 0.66 to 0.85 of the time in float32; networks half as wide take 1.06 to 1.28
    of it (benchmarks/results/2026-11-28-xeon-amx-precision.md). Without AMX or AVX512-BF16, bfloat16 is an order of
    magnitude slower than float32.

    Args:
        precision: The setting.
        device: Where the network is.
        num_features: Channels that the head sees; R50x1 has 2048.
        crop_size: Side of the images, pixels.

    Raises:
        ConfigError: bfloat16 is asked for on a device that has no fast path for it.
    """
    if device.type == "cuda":
        pays = fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        amx = bool(capabilities.get("amx_bf16"))
        fast = amx or bool(capabilities.get("avx512_bf16"))
        pays = amx and num_features >= _AMX_FEATURES and crop_size >= _AMX_PIXELS
    if precision == "bf16" and not fast:
        given = f"bf16, but this {device.type} device has no fast path for it"
        accepted = "bf16 with CUDA compute capability 8, AMX or AVX512-BF16"
        raise ConfigError.of("runtime.precision", given, accepted, "use auto or fp32")
    return torch.bfloat16 if precision == "bf16" or (precision == "auto" and pays) else torch.float32


# TFLOP/s without sparsity, by NVIDIA's data sheets (the A10G has none; docs/scaling.md): in bfloat16, and in float32 as
# convolutions compute it (as TF32 where there is one). The first name that stands in the device's own counts.
_PEAKS = (
    ("B200", 2250.0, 1100.0),
    ("H200", 989.4, 494.7),
    ("H100 PCIe", 756.4, 378.2),
    ("H100 NVL", 835.5, 417.7),
    ("H100", 989.4, 494.7),
    ("A100", 312.0, 156.0),
    ("A10G", 70.0, 35.0),
    ("A10", 125.0, 62.5),
    ("L40S", 362.0, 183.0),
    ("L4", 121.0, 60.0),
    ("V100", 0.0, 15.7),
    ("T4", 0.0, 8.1),
)


def peak_flops(device: torch.device, dtype: torch.dtype, tflops: float) -> float:
    """Return how many floating-point operations per second a device can do at most; 0 where that is not known.

    Args:
        device: Where the network is.
        dtype: What its convolutions compute in.
        tflops: The user's setting, TFLOP/s; 0: by the name of the GPU.
    """
    if tflops or device.type != "cuda":
        return tflops * 1e12
    name = torch.cuda.get_device_name(device)
    peaks = next(((bf16, fp32) for known, bf16, fp32 in _PEAKS if known in name), (0.0, 0.0))
    return peaks[dtype != torch.bfloat16] * 1e12


@contextmanager
def worker_threads(device: str) -> Iterator[None]:
    """Use as many threads as a worker, which has one CPU: speed and rounding depend on the number.

    Args:
        device: Type of the device, ``cpu`` or ``cuda``; nothing changes for ``cuda``.
    """
    before = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_freed_memory() -> None:
    """Let this process keep the memory of freed tensors for the next ones, until it ends.

    By default glibc returns large blocks to the kernel and requests them again: thousands of page faults in every step
    of a network on a CPU. Does nothing with another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 64 * 2**20)


def normalize(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Convert pixels to the network's input.

    Args:
        images: ``[B, H, W, 3] uint8``.
        device: Where the network is.

    Returns:
        ``[B, 3, H, W] float32`` in [-1, 1], channels-last in memory: (x - 127.5) / 127.5 (big_transfer#26).
    """
    return images.to(device, non_blocking=True).permute(0, 3, 1, 2).float().sub_(127.5).div_(127.5)


def to_channels_last(model: nn.Module) -> None:
    """Make the kernels channels-last, in place.

    A 1x1 kernel is both channels-last and contiguous. It gets the strides of a contiguous one, as its gradient has;
    otherwise DistributedDataParallel copies the gradient (and warns).
    """
    model.to(memory_format=torch.channels_last)
    for p in model.parameters():
        if p.ndim == 4 and p.shape[2:] == (1, 1):
            p.data = p.data.flatten(1).contiguous().view(p.shape)
