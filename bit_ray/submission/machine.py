"""What a machine runs, to compare this one with those of a cluster."""

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from bit_ray.tracking.identity import code_digest

CLIENT = "BIT_RAY_CLIENT"
"""Environment variable: the `Machine` that a preflight was submitted from, as JSON."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The software of a machine, as versions."""

    python: str
    ray: str
    torch: str
    system: str
    """Kernel, processor and C library, such as ``Linux x86_64 glibc 2.36``."""
    code: str
    """Digest of this package's source."""
    decoder: str
    """``compiled``, or ``plain`` where the C extension cannot be loaded."""

    @classmethod
    def here(cls) -> "Machine":
        """Look at this machine."""
        from bit_ray.data.images.decode_view import DECODER  # and with it PyTorch, which takes seconds

        return cls(
            python=platform.python_version(),
            ray=_version("ray"),
            torch=_version("torch"),
            system=" ".join((platform.system(), platform.machine(), *platform.libc_ver())).strip(),
            code=code_digest(),
            decoder=DECODER,
        )


def release(version: str) -> tuple[int, ...]:
    """Return major and minor of a version; empty if it is not a version."""
    parts = version.split(".")[:2]
    return tuple(map(int, parts)) if len(parts) == 2 and all(part.isdecimal() for part in parts) else ()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
