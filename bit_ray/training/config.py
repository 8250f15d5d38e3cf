"""What a user sets for a training run.

Imports neither PyTorch nor Ray nor MLflow, so that the command line answers ``--help`` at once.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from bit_ray.config import DEFAULT_STORAGE, check_folder_name
from bit_ray.data.stream.settings import CacheConfig, Shuffle
from bit_ray.errors import ConfigError
from bit_ray.evaluation.config import ProbeConfig
from bit_ray.recipes.hyperrule import Profile, RuleOverrides
from bit_ray.recipes.upstream import UpstreamRecipe, bit_m
from bit_ray.tracking.config import TrackingConfig

Precision = Literal["auto", "fp32", "bf16"]


_TRAIN = {"all": 0, "head": 0, "norm_bias": 0, "stages": 4, "adapters": 4096}
"""What can be trained, and the largest number that goes with it."""


def parse_train(train: str) -> tuple[str, int]:
    """Split a value of ``train`` into its name and number (0 if it has none).

    ``all``; ``head``; ``stages:K``, the last K of the four stages; ``norm_bias``, the affine of every GroupNorm and
    the head's bias; ``adapters:R``, an update of rank R to the kernel of every convolution. The head is always trained.

    Raises:
        ConfigError: It has another form.
    """
    name, colon, number = train.partition(":")
    most = _TRAIN.get(name, 0)
    if train not in ("all", "head", "norm_bias") and not (colon and number.isdecimal() and 1 <= int(number) <= most):
        ranks = f"adapters:R (of rank R, 1 to {_TRAIN['adapters']})"
        accepted = f"all, head, norm_bias, stages:K (the last K, 1 to 4), {ranks}"
        raise ConfigError.of("train", repr(train), accepted, "choose one")
    return name, int(number or 0)


def check_train(train: str, init: str) -> None:
    """Refuse what cannot be trained: an unknown part, or a part of a network that has no weights to start from.

    Raises:
        ConfigError: It is refused.
    """
    parse_train(train)
    if not init and train != "all":
        accepted = "all, or weights to start from"
        raise ConfigError.of("train", f"{train}, but init is empty", accepted, "give one of them")


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """How a plan is carried out; none of it changes what is learned, up to rounding and what ``heal`` leaves out."""

    num_workers: int | str = 0
    """Training workers: a number, or MIN:MAX to follow a cluster that grows and shrinks; 0: one per GPU of the cluster,
    or without GPUs one per CPU core of this machine; where an autoscaler may add nodes, 1 to what it may come to."""
    micro_batch_size: int = 0
    """Examples per forward and backward pass of a worker; 0: its whole share of the batch, or on GPUs and on the CPUs
    of this machine as many as the memory has room for."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto``: CUDA when the cluster has GPUs."""
    precision: Precision = "auto"
    """``auto``: bfloat16 autocast on GPUs of compute capability 8 and up, and where it pays on CPUs with AMX; else
    float32."""
    compile: bool = False
    """Run the model through ``torch.compile``."""
    sharding: Literal["none", "fsdp"] = "none"
    """``fsdp``: each worker keeps only its share of weights, gradients and momentum, for a network that one device
    cannot hold; takes more traffic (docs/training.md)."""
    num_readers: int = 1
    """Ray Data tasks that read ahead for one worker at a time."""
    num_decode_threads: int = 0
    """Threads of a worker that decode images; 0: the node's CPU cores divided by its workers."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """Where a node keeps what it has read from a remote shard set."""
    max_bad_images: float = 0.001
    """Images that the run may leave out because they cannot be read: a share of the set below 1, a number from 1 on."""
    heal: int = 0
    """Batches that the run may leave out because their loss or gradient is not finite or far out of the ordinary, or
    has broken the weights, in which case it goes back to an earlier checkpoint. 0: what is not finite ends the run."""
    log_every_steps: int = 20
    """Steps between two lines of metrics."""
    checkpoint_every_steps: int = 1000
    """Steps between two checkpoints; the last step always has one."""
    checkpoint_every_s: float = 600.0
    """Most seconds of training between two checkpoints, which is what a failure can cost; 0: only every so many
    steps."""
    num_checkpoints_to_keep: int = 2
    """Older checkpoints are deleted, except those that a registered version refers to."""
    max_failures: int = 3
    """Worker failures after which the run gives up; it continues from the last checkpoint. A node that is lost or taken
    away does not count."""
    grow_after_s: float = 30.0
    """Seconds for which more room must last before a run of MIN:MAX workers takes it."""
    stalled_after_s: float = 120.0
    """Seconds without a step after which the slowest worker is named and every worker's stack is written down."""
    give_up_after_s: float = 600.0
    """Seconds without a step after which the workers are ended and started again."""
    peak_tflops: float = 0.0
    """What a worker's device can do at most, TFLOP/s, of which speed/mfu is a share; 0: what is known of a GPU."""

    def __post_init__(self) -> None:
        least, most = self.workers
        if not (0 < least <= most or least == most == 0):
            accepted = "a whole number, or MIN:MAX such as 2:8 with MIN at least 1 and at most MAX"
            raise ConfigError.of("num_workers", self.num_workers, accepted, "correct it")
        for name, least in (
            ("micro_batch_size", 0),
            ("num_readers", 1),
            ("num_decode_threads", 0),
            ("heal", 0),
            ("log_every_steps", 1),
            ("checkpoint_every_steps", 1),
            ("num_checkpoints_to_keep", 1),
            ("max_failures", 0),
        ):
            if getattr(self, name) < least:
                raise ConfigError.of(name, getattr(self, name), f"a whole number of at least {least}", "raise it")
        for name, unit in (("checkpoint_every_s", "seconds"), ("grow_after_s", "seconds"), ("peak_tflops", "TFLOP/s")):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError.of(name, getattr(self, name), f"at least 0 {unit}", "correct it")
        if self.compile and self.sharding != "none":
            given = f"{self.sharding}, but runtime.compile is on"
            raise ConfigError.of("sharding", given, "none with runtime.compile", "turn one of them off")
        if not 0 < self.stalled_after_s <= self.give_up_after_s:
            accepted = f"more than 0, and at most give_up_after_s, {self.give_up_after_s:g}"
            raise ConfigError.of("stalled_after_s", self.stalled_after_s, accepted, "change one of them")
        if not 0 <= self.max_bad_images < math.inf:
            accepted = "a share from 0 to below 1, or a number from 1"
            raise ConfigError.of("max_bad_images", self.max_bad_images, accepted)

    @property
    def workers(self) -> tuple[int, int]:
        """Least and most training workers; 0 and 0: as many as suit the cluster."""
        least, colon, most = str(self.num_workers).partition(":")
        try:
            return (int(least), int(most)) if colon else (int(least), int(least))
        except ValueError:
            return -1, -1

    def bad_images_allowed(self, num_examples: int) -> int:
        """Images of a set of this size that may be left out."""
        return int(self.max_bad_images if self.max_bad_images >= 1 else self.max_bad_images * num_examples)


@dataclass(frozen=True, kw_only=True)
class InMemoryRuntime:
    """How a training in one process, its examples in memory, is carried out; none of it changes what is learned."""

    micro_batch_size: int = 0
    """Examples per forward and backward pass; 0: the whole batch."""

    def __post_init__(self) -> None:
        if self.micro_batch_size < 0:
            raise ConfigError.of("micro_batch_size", self.micro_batch_size, "a whole number of at least 0", "raise it")


@dataclass(frozen=True, kw_only=True)
class RegisterAs:
    """Name under which the finished model is registered."""

    name: str = ""
    """Registered name; empty: the name of the run."""
    alias: str = "champion"
    """Alias that the new version gets."""


@dataclass(frozen=True, kw_only=True)
class _Training:
    """What all trainings on a cluster have in common."""

    name: str
    """Name of the run; starting again with the same name continues it."""
    shards: str
    """Shard set to train on: a folder, s3://... or gs://..."""
    storage: str = DEFAULT_STORAGE
    """Folder of all runs, or s3://...; on a cluster of several nodes it must be one that all of them reach."""
    norm_batch: int = 0
    """Images over which a network with BatchNorm (-bn) takes its statistics; 0: 32, or the batch if 32 does not divide
    it."""
    shuffle: Shuffle = field(default_factory=Shuffle)
    """How far apart examples are mixed."""
    runtime: Runtime = field(default_factory=Runtime)
    """How the plan is carried out; none of it changes what is learned."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the run is recorded."""
    register: RegisterAs = field(default_factory=RegisterAs)
    """Where the finished model is registered."""
    dry_run: bool = False
    """Print the resolved plan and stop."""

    def __post_init__(self) -> None:
        check_folder_name(self.name)


@dataclass(frozen=True, kw_only=True)
class ByRule:
    """How BiT-HyperRule is used."""

    profile: Profile = "code"
    """HyperRule as in the reference code, as in the paper, or the authors' cheaper one."""
    rule: RuleOverrides = field(default_factory=RuleOverrides)
    """Settings that replace the profile's."""
    random_crop: bool = True
    """Off for tasks in which position matters (paper App. F)."""
    random_flip: bool = True
    """Off for tasks in which left and right matter, such as digits (paper App. F)."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(_Training):
    """Pre-train a BiT network on a shard set."""

    model: str = "R50x1"
    """Network: R26x1 R50x1 R50x3 R101x1 R101x3 R152x1 R152x2 R152x4, or a size of your own such as R1-1-1-1x0.5;
    BatchNorm with -bn or -syncbn behind it, no Weight Standardization with -nows (paper §4.3)."""
    recipe: UpstreamRecipe = field(default_factory=bit_m)
    """What the paper says, or your own."""
    seed: int = 0
    """Seed of the initial weights, the order, the views and MixUp."""
    mixup_alpha: float = 0.0
    """MixUp's parameter; the paper found no use for it upstream (§2.2)."""
    dropout: float = 0.0
    """Share of the features that are dropped before the head; the paper has none upstream."""
    clip_norm: float = 0.0
    """Largest global gradient norm; 0: off."""
    head_bias: float = 0.0
    """Initial bias of the head; big_vision starts sigmoid training at -10."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    """Scores of the features of every checkpoint, made meanwhile on cores that do not train."""
    keep_best: str = ""
    """Score of the probes, such as ridge_10_shot or knn_10_shot, by which the best checkpoint is kept besides the
    newest; empty: no best one is kept."""

    def __post_init__(self) -> None:
        super().__post_init__()
        scores = [f"{kind}_{shots}_shot" for kind in ("ridge", "knn") for shots in self.probe.shots]
        if self.keep_best and self.keep_best not in scores:
            raise ConfigError.of("keep_best", self.keep_best, ", ".join(scores), "choose one, or change probe.shots")
        if self.keep_best and not self.probe.shards:
            given = f"{self.keep_best}, but probe.shards is empty"
            raise ConfigError.of("keep_best", given, "a score of the probes", "give probe.shards, or leave it out")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(_Training, ByRule):
    """Fine-tune a network on a shard set by BiT-HyperRule."""

    init: str = ""
    """Weights to start from: models:/NAME@ALIAS, a saved model's folder or URI, BiT weights of other programs (.npz,
    .safetensors, .pth, .bin, Hugging Face folder), or a name, such as bit_m_r50x1 (bit-ray models known), timm/NAME or
    hf://ORG/NAME; empty: from scratch."""
    model: str = ""
    """Network, when training from scratch; otherwise the weights say it."""
    test_shards: str = ""
    """Shard set to evaluate the result on, in full; empty: no evaluation."""
    train: str = "all"
    """What is trained: all (as the paper), head, stages:K (the last K of 4, and the head), norm_bias (GroupNorm's
    affine, and the head), adapters:R (updates of rank R to all convolutions, merged into them at the end)."""
    shots: int = 0
    """Train on this many examples per class, drawn by subset_seed; 0: on all."""
    subset_seed: int = 0
    """Seed of the few-shot draw."""
    seed: int = 0
    """Seed of the order, the views and MixUp."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_train(self.train)
        for name in ("shots", "subset_seed", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError.of(name, getattr(self, name), "a whole number of at least 0", "raise it")


@dataclass(frozen=True, kw_only=True)
class StatusConfig:
    """Show where runs stand, by their folders, and the jobs and idle nodes of a cluster, if there is one."""

    run: str = field(default="", metadata={"positional": "RUN"})
    """Name of a run, to see its attempts; left out: all runs."""
    storage: str = DEFAULT_STORAGE
    """Folder of all runs, or s3://..."""
    address: str = ""
    """Dashboard of a cluster, http://...; empty: that of RAY_API_SERVER_ADDRESS or RAY_ADDRESS, or none."""
    node_price: float = 0.0
    """What a node costs an hour, to see what idle ones cost; 0: not known."""

    def __post_init__(self) -> None:
        if not 0 <= self.node_price < math.inf:
            raise ConfigError.of("node_price", self.node_price, "what a node costs an hour, at least 0")
        try:
            check_folder_name(self.run or "all")
        except ConfigError as error:
            raise error.renamed("run") from None


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """Train a stretch of a recorded run once more and compare the loss."""

    run: str
    """Folder of the run, STORAGE/NAME."""
    step: int
    """Step whose recorded loss is wanted; losses are recorded as means over log_every_steps."""
    shards: str = ""
    """Shard set, if it has moved since."""
    runtime: InMemoryRuntime = field(default_factory=InMemoryRuntime)
    """How it is carried out; none of it changes what is learned."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the run is recorded."""
