"""What a user says of a training that is planned; imports nothing slow, so that the command line answers at once."""

import math
from dataclasses import dataclass, field
from typing import Literal

from bit_ray.errors import ConfigError
from bit_ray.planning.costs import GPUS

RecipeName = Literal["bit_s", "bit_m", "bit_l"]


@dataclass(frozen=True, kw_only=True)
class NodeConfig:
    """One machine; what is left out is that of the cloud's node with these GPUs, or this machine's with calibrate."""

    gpus: int = 0
    """GPUs, or without GPUs training workers; 0: left out."""
    cores: int = 0
    """CPU cores, half of the vCPUs; 0: left out."""
    network_gbits: float = 0.0
    """To other nodes, Gbit/s; 0: left out."""
    storage_gbits: float = 0.0
    """To the object store, Gbit/s; 0: that to other nodes, at most 100."""
    cache_gb: float = 32.0
    """Of its disk that keep what was read, 10^9 bytes: runtime.cache.max-gb."""

    def __post_init__(self) -> None:
        for name in ("gpus", "cores", "network_gbits", "storage_gbits", "cache_gb"):
            _check(name, getattr(self, name), 0)


@dataclass(frozen=True, kw_only=True)
class FailureConfig:
    """How often nodes are lost, and what that costs."""

    mtbf_hours: float = 0.0
    """Hours between two failures of one node; 0: what is published of clusters of GPUs, 3,690 to 10,260."""
    preemptions_per_day: float = 0.0
    """Times a day that the cloud takes one node away, with notice; 0: on demand. No cloud publishes it."""
    restart_s: float = 0.0
    """Seconds from losing a node to the next step; 0: 30 to 600."""
    checkpoint_every_s: float = 600.0
    """Seconds of training between two checkpoints: runtime.checkpoint-every-s."""

    def __post_init__(self) -> None:
        for name in ("mtbf_hours", "preemptions_per_day", "restart_s"):
            _check(name, getattr(self, name), 0)
        if not 0 < self.checkpoint_every_s < math.inf:
            raise ConfigError.of("checkpoint_every_s", self.checkpoint_every_s, "more than 0 seconds", "raise it")


@dataclass(frozen=True, kw_only=True)
class PriceConfig:
    """What is paid for besides devices; 0: not counted."""

    storage: float = 0.0
    """Of 10^9 bytes in the object store for a month."""
    requests: float = 0.0
    """Of 1,000 requests to the object store."""
    transfer: float = 0.0
    """Of 10^9 bytes read from the object store, as from another region."""

    def __post_init__(self) -> None:
        for name in ("storage", "requests", "transfer"):
            _check(name, getattr(self, name), 0)


@dataclass(frozen=True, kw_only=True)
class ClusterPlanConfig:
    """Estimate what pre-training on a cluster takes: days, money, network, storage, cores and failures."""

    gpus: int
    """GPUs in all; without GPUs, training workers."""
    gpu: str = ""
    """Their type: a100, a10g, b200, h100, h200, l4, l40s, rtx3090, rtx4090; empty with calibrate: this machine's."""
    recipe: RecipeName = "bit_l"
    """Where epochs, batch, images and classes come from if they are not given."""
    model: str = "R152x4"
    """Network."""
    num_images: float = 0.0
    """Images of the set, such as 300e6; 0: those of the shards, or of the recipe's published set."""
    epochs: float = 0.0
    """Passes over them; 0: the recipe's."""
    global_batch_size: int = 0
    """Images per step over all GPUs; 0: the recipe's 4,096."""
    num_classes: int = 0
    """Outputs of the classifier; 0: as the shards, or the recipe's published set."""
    crop_size: int = 224
    """Side of the view, pixels."""
    shards: str = ""
    """Shard set that is planned for, as s3://...: its images, classes and bytes count, and calibrate reads it."""
    seekable: bool = False
    """Whether its images have restart markers, as shards write --seekable makes them."""
    calibrate: bool = False
    """Measure for some seconds instead of assuming: the training step on this machine if no gpu is given, and reading
    and decoding if shards are."""
    run: str = ""
    """Folder of the run that is planned, STORAGE/NAME: when it ends it says how far it was from this plan."""
    price: float = 0.0
    """Of an hour of one GPU; 0: money is not counted."""
    prices: PriceConfig = field(default_factory=PriceConfig)
    """Other prices."""
    node: NodeConfig = field(default_factory=NodeConfig)
    """What each machine has."""
    failures: FailureConfig = field(default_factory=FailureConfig)
    """Failing nodes."""

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise ConfigError.of("gpus", self.gpus, "1 or more", "raise it")
        if self.gpu and self.gpu not in GPUS:
            remedy = "choose the one most like it, or measure yours with --calibrate and no gpu"
            raise ConfigError.of("gpu", self.gpu, ", ".join(sorted(GPUS)), remedy)
        if not self.gpu and not self.calibrate:
            remedy = "name the GPU, or give --calibrate to measure this machine"
            raise ConfigError.of("gpu", "missing", ", ".join(sorted(GPUS)), remedy)
        if self.calibrate and self.gpu and not self.shards:
            given = f"given with gpu {self.gpu} and without shards"
            remedy = "leave out gpu to measure this machine's step, or give shards to measure reading and decoding"
            raise ConfigError.of("calibrate", given, "with something to measure", remedy)
        for name in ("num_images", "epochs", "price"):
            _check(name, getattr(self, name), 0)
        for name in ("global_batch_size", "num_classes"):
            _check(name, getattr(self, name), 0)
        if self.crop_size < 32:
            raise ConfigError.of("crop_size", self.crop_size, "at least 32 pixels", "raise it")


def _check(name: str, value: float, least: float) -> None:
    if not least <= value < math.inf:
        raise ConfigError.of(name, f"{value:g}", f"{least:g} or more, and finite")
