"""The plan of a training run, fully resolved: everything that decides the resulting weights, and nothing else.

A recipe and a manifest become a `TrainPlan` once, on the driver. ``--dry-run`` prints it, every worker follows it,
every checkpoint carries it, and its digest is the run's identity. How the plan is carried out (workers, micro-batches,
precision, intervals) is a `Runtime` and may change between a stop and the next start.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from bit_ray.config import digest, to_dict
from bit_ray.data.images.views import TrainView
from bit_ray.data.stream.settings import Shuffle
from bit_ray.errors import ConfigError
from bit_ray.models.inputs import ResizeMode
from bit_ray.models.network import BatchStatistics
from bit_ray.models.zoo import model_config
from bit_ray.recipes.hyperrule import HyperRule
from bit_ray.recipes.schedules import Schedule
from bit_ray.training.config import parse_train

Loss = Literal["softmax", "sigmoid"]

_PAPER_NORM_BATCH = 32
# Runs started before these settings existed keep their identity: their default values are not part of the digest.
_OFF: dict[str, Any] = {"train": "all", "decay_to_init": False, "dropout": 0.0, "norm_batch": 0}


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """Everything that decides the weights a run ends with."""

    kind: Literal["pretrain", "finetune"]
    """Upstream or downstream."""
    model: str
    """Architecture name, such as ``R50x1``."""
    num_classes: int
    """Outputs of the head."""
    init: str = ""
    """URI of the weights to start from: a saved model, a registered one or an ``.npz``; empty: from scratch."""
    init_digest: str = ""
    """SHA-256 of those weights."""
    manifest_digest: str
    """Digest of the training shards."""
    num_examples: int
    """Training examples per epoch."""
    train: str = "all"
    """What is trained; see `bit_ray.training.config.parse_train`."""
    view: TrainView
    """Random view of a training image."""
    resize_mode: ResizeMode
    """View for evaluation, stored with the model."""
    resize_size: int
    """Pixels; see `bit_ray.data.images.resize.eval_view`."""
    loss: Loss
    """``softmax`` cross-entropy (single label) or ``sigmoid`` cross-entropy summed over classes (multi-label)."""
    schedule: Schedule
    """Learning rate over steps; its ``num_steps`` is the length of the run."""
    global_batch_size: int
    """Examples per optimizer step, over all workers."""
    momentum: float = 0.9
    """SGD momentum, not Nesterov (paper §3.3)."""
    weight_decay: float = 0.0
    """Coupled L2 on the kernels of convolutions and head only."""
    decay_to_init: bool = False
    """Decay towards the weights the run starts with rather than towards zero (L2-SP, Li et al., arXiv 1802.01483; the
    paper's random search, App. A)."""
    dropout: float = 0.0
    """Share of the features that are dropped before the head; 0: off."""
    norm_batch: int = 0
    """Images over which BatchNorm takes its statistics, in consecutive slots of the batch; 0: see
    `batch_of_statistics`. A network with GroupNorm has none."""
    mixup_alpha: float = 0.0
    """MixUp's Beta parameter; 0: off."""
    clip_norm: float = 0.0
    """Largest global gradient norm; 0: off."""
    head_bias: float = 0.0
    """Initial bias of the head; big_vision starts sigmoid training at -10."""
    seed: int = 0
    """Seed of the initial weights, the order, the views and MixUp."""
    shuffle: Shuffle = field(default_factory=Shuffle)
    """How far apart examples are mixed."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """The recipe this plan came from, for the record."""

    def __post_init__(self) -> None:
        model_config(self.model, self.num_classes)  # refuses what cannot be built
        for name, least in (("num_examples", 1), ("global_batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError.of(name, getattr(self, name), f"a whole number of at least {least}", "raise it")
        for name in ("mixup_alpha", "clip_norm", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError.of(name, getattr(self, name), "0 (off) or more")
        if not 0 <= self.momentum < 1:
            raise ConfigError.of("momentum", self.momentum, "0 to below 1", "the paper has 0.9")
        if not 0 <= self.dropout < 1:
            raise ConfigError.of("dropout", self.dropout, "0 (off) to below 1", "the paper searches up to 0.7")
        if self.decay_to_init and not self.weight_decay:
            given = "on, but weight_decay is 0"
            raise ConfigError.of("decay_to_init", given, "a weight_decay above 0", "set one, or turn this off")
        parse_train(self.train)
        if self.norm_batch:
            self._check_norm_batch()
        if self.mixup_alpha and self.global_batch_size % 2:
            accepted = "an even number, because MixUp mixes pairs"
            raise ConfigError.of("global_batch_size", self.global_batch_size, accepted, "add one")

    @property
    def digest(self) -> str:
        """SHA-256 of the plan: the same plan on the same data gives the same weights, up to rounding."""
        plan = to_dict(self)
        plan["norm_batch"] = self.batch_of_statistics  # 0 with GroupNorm: splitting a batch changes nothing
        for name, off in _OFF.items():
            if plan[name] == off:
                del plan[name]
        return digest(plan)

    @property
    def batch_statistics(self) -> BatchStatistics:
        """Over which images the network normalises in training."""
        return model_config(self.model, self.num_classes).batch_statistics

    @property
    def batch_of_statistics(self) -> int:
        """Images over which BatchNorm takes its statistics; 0 with GroupNorm.

        The default is 32, as on each chip in the paper's comparison (§4.3), or the whole batch if 32 does not divide
        it. A BatchNorm over workers always takes the whole batch.
        """
        if self.batch_statistics == "none":
            return 0
        if self.batch_statistics == "batch":
            return self.global_batch_size
        even = self.global_batch_size % _PAPER_NORM_BATCH == 0
        return self.norm_batch or (_PAPER_NORM_BATCH if even else self.global_batch_size)

    def _check_norm_batch(self) -> None:
        batch = self.global_batch_size
        if self.batch_statistics != "group":
            why = "no BatchNorm" if self.batch_statistics == "none" else "its statistics over the whole batch"
            raise ConfigError.of("norm_batch", f"{self.norm_batch}, but {self.model} has {why}", "0", "leave it out")
        if self.norm_batch < 2 or batch % self.norm_batch:
            accepted = f"at least 2, and a divisor of the batch size ({batch})"
            raise ConfigError.of("norm_batch", self.norm_batch, accepted, "change one")
        if self.mixup_alpha and self.norm_batch % 2:
            accepted = "an even number, because MixUp mixes pairs"
            raise ConfigError.of("norm_batch", self.norm_batch, accepted, "change it")


def transfer_plan(
    rule: HyperRule,
    *,
    model: str,
    num_classes: int,
    multi_label: bool = False,
    manifest_digest: str,
    init: str,
    init_digest: str,
    seed: int,
    shuffle: Shuffle | None = None,
    train: str = "all",
    norm_batch: int = 0,
) -> TrainPlan:
    """The HyperRule's settings for this data, as a plan.

    Raises:
        ConfigError: The settings do not go together.
    """
    if rule.mixup_alpha and rule.batch_size % 2:
        raise ConfigError.of("batch_size", rule.batch_size, "an even number, because MixUp mixes pairs", "add one")
    return TrainPlan(
        kind="finetune",
        model=model,
        num_classes=num_classes,
        init=init,
        init_digest=init_digest,
        manifest_digest=manifest_digest,
        num_examples=rule.num_examples,
        train=train,
        view=TrainView(
            crop="resize_crop" if rule.random_crop else "resize",
            crop_size=rule.crop,
            resize_size=rule.resize,
            random_flip=rule.random_flip,
        ),
        resize_mode="square",
        resize_size=rule.crop,
        loss="sigmoid" if multi_label else "softmax",
        schedule=rule.schedule,
        global_batch_size=rule.batch_size,
        momentum=rule.momentum,
        weight_decay=rule.weight_decay,
        decay_to_init=rule.decay_to_init,
        dropout=rule.dropout,
        norm_batch=norm_batch,
        mixup_alpha=rule.mixup_alpha,
        seed=seed,
        shuffle=shuffle or Shuffle(),
        recipe={name: value for name, value in to_dict(rule).items() if name not in _OFF or value != _OFF[name]},
    )
