"""What a user sets of the stream; imports nothing, so that the command line answers at once."""

import math
from dataclasses import dataclass

from bit_ray.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Shuffle:
    """How far apart examples are mixed."""

    num_lanes: int = 8
    """Parts of an epoch that are read side by side; the most workers that can train without reading anything twice."""
    lane_window: int = 512
    """Examples of a lane that are permuted together; row groups of lanes / workers windows are on a worker's node."""
    full_up_to: int = 4096
    """Sets of at most this many examples are permuted as a whole."""

    def __post_init__(self) -> None:
        for name in ("num_lanes", "lane_window", "full_up_to"):
            if getattr(self, name) < 1:
                raise ConfigError.of(name, getattr(self, name), "a whole number of at least 1", "raise it")


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Where and how much of the data in object stores is kept on each node."""

    directory: str = ""
    """On a local disk, shared by the processes of a node; empty: ``bit_ray_cache-<user id>`` in the system's temporary
    directory."""
    max_gb: float = 32.0
    """Most 10^9 bytes on each node's disk; 0 keeps nothing. A set that fits is fetched once."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.max_gb) and self.max_gb >= 0):
            raise ConfigError.of("max_gb", self.max_gb, "0 or more gigabytes")
