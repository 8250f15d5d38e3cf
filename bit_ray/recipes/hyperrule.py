"""BiT-HyperRule: how to fine-tune, given only the number of images and their size (paper §3.3)."""

import math
import operator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from bit_ray.errors import ConfigError
from bit_ray.models.inputs import MIN_IMAGE_SIZE
from bit_ray.recipes.schedules import BoundaryRule, Schedule

Profile = Literal["code", "paper", "cheap"]
Regime = Literal["small", "medium", "large"]

# First number of examples above the regime (paper §3.3; big_transfer:bit_hyperrule.py).
_SMALL_BELOW, _MEDIUM_BELOW = 20_000, 500_000
# A strict bound: 96x96 images (SmallNORB, PatchCamelyon) already count as large.
_SMALL_AREA_BELOW = 96 * 96
_NUM_STEPS: dict[Regime, int] = {"small": 500, "medium": 10_000, "large": 20_000}
# big_transfer:bit_hyperrule.py get_schedule: warm-up, then the decays. The paper has no warm-up and 30/60/90 %.
_CODE_WARMUP: dict[Regime, int] = {"small": 100, "medium": 500, "large": 500}
_CODE_BOUNDARIES: dict[Regime, tuple[int, ...]] = {
    "small": (200, 300, 400),
    "medium": (3000, 6000, 9000),
    "large": (6000, 12_000, 18_000),
}
_HALVED = "the network halves its input five times"


@dataclass(frozen=True, kw_only=True)
class RuleOverrides:
    """Settings that replace the profile's; what is left out follows the rule."""

    regime: Regime | None = None
    """Regime whose steps, decays and MixUp are taken, whatever the number of images."""
    resize: int | None = None
    """Side of the square before the random crop, pixels."""
    crop: int | None = None
    """Side of what the network sees, pixels."""
    num_steps: int | None = None
    """Optimizer steps; warm-up and boundaries scale with them."""
    warmup_steps: int | None = None
    """Steps of linear warm-up."""
    boundaries: tuple[int, ...] | None = None
    """Steps after which the learning rate is divided by ten."""
    boundary_rule: BoundaryRule | None = None
    """Whether step b itself has the lower rate (upstream, as the paper) or the higher one (hyperrule, as the code)."""
    batch_size: int | None = None
    """Images per optimizer step."""
    base_lr: float | None = None
    """Learning rate."""
    momentum: float | None = None
    """SGD momentum."""
    weight_decay: float | None = None
    """Coupled L2 on the kernels of convolutions and head only."""
    decay_to_init: bool = False
    """Weight decay towards the initial weights instead of zero, as in the paper's random search (App. A)."""
    dropout: float | None = None
    """Share of the features that are dropped before the head; the paper's random search has up to 0.7 (App. A)."""
    mixup_alpha: float | None = None
    """MixUp's parameter; 0: off."""

    def __post_init__(self) -> None:
        _check(self)
        Schedule(  # which checks both
            base_lr=1.0 if self.base_lr is None else self.base_lr,
            num_steps=1 if self.num_steps is None else self.num_steps,
        )


@dataclass(frozen=True, kw_only=True)
class HyperRule:
    """All settings of one fine-tuning run: SGD on every layer, from a zero head, without weight decay or dropout."""

    num_examples: int
    """Training images actually used: k * classes for a few-shot subset (big_transfer:bit_pytorch/train.py)."""
    image_size: tuple[int, int]
    """(height, width) of a typical image of the task, pixels."""
    profile: Profile
    """Where the numbers come from: see `hyperrule`."""
    regime: Regime
    """``small`` below 20,000 examples, ``medium`` below 500,000, else ``large``."""
    resize: int
    """Side of the square to which training images are resized before the random crop, aspect ignored, pixels."""
    crop: int
    """Side of the network's input, pixels; test images are resized straight to it, without a crop."""
    num_steps: int
    """Optimizer steps."""
    warmup_steps: int
    """Steps of linear warm-up."""
    boundaries: tuple[int, ...]
    """Steps after which the learning rate is divided by ten."""
    boundary_rule: BoundaryRule = "hyperrule"
    """Whether step b itself has the higher rate (``hyperrule``, as the code) or the lower one; see `Schedule`."""
    batch_size: int = 512
    """Images per optimizer step."""
    base_lr: float = 0.003
    """Learning rate before the first decay; not scaled with the batch."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 0.0
    """Weight decay; the HyperRule has none (paper §3.3)."""
    decay_to_init: bool = False
    """Decay towards the initial weights instead of zero."""
    dropout: float = 0.0
    """Share of the features that are dropped before the head; the HyperRule has none (paper §3.3)."""
    mixup_alpha: float = 0.0
    """Parameter of MixUp's Beta(alpha, alpha); 0 is no MixUp."""
    random_crop: bool = True
    """Off for tasks in which position matters (paper App. F): Clevr-count, Clevr-distance, DMLab, KITTI-distance,
    dSprites-location. Then training images, too, are resized straight to ``crop``."""
    random_flip: bool = True
    """Off for tasks in which left and right matter (paper App. F): dSprites-orientation, dSprites-location,
    SmallNORB-azimuth."""
    overrides: tuple[str, ...] = ()
    """Fields whose value is not the profile's."""

    def __post_init__(self) -> None:
        if self.num_examples < 1:
            remedy = "count the training images that are really used"
            raise ConfigError.of("num_examples", self.num_examples, "at least 1", remedy)
        if min(self.image_size) < 1:
            raise ConfigError.of("image_size", self.image_size, "(height, width), both at least 1 pixel")
        _check(self)
        if self.resize < self.crop:
            accepted = f"at least crop ({self.crop})"
            raise ConfigError.of("resize", self.resize, accepted, "a crop cannot be larger than the image")
        if self.decay_to_init and not self.weight_decay:
            given = "on, but weight_decay is 0"
            raise ConfigError.of("decay_to_init", given, "a weight_decay above 0", "set one, or turn this off")
        _ = self.schedule  # checks the steps and the rate

    @property
    def schedule(self) -> Schedule:
        """The learning rate against step."""
        return Schedule(
            base_lr=self.base_lr,
            num_steps=self.num_steps,
            warmup_steps=self.warmup_steps,
            boundaries=self.boundaries,
            boundary_rule=self.boundary_rule,
        )

    def lr_at(self, step: int) -> float:
        """Return the learning rate of optimizer step ``step``, counted from 0."""
        return self.schedule.lr_at(step)


def _check(values: RuleOverrides | HyperRule) -> None:
    """Refuse values that no data can make right; what is not set is not checked."""
    for name, least, below, accepted, remedy in (
        ("crop", MIN_IMAGE_SIZE, math.inf, f"at least {MIN_IMAGE_SIZE} pixels", _HALVED),
        ("batch_size", 1, math.inf, "at least 1", "the rule has 512"),
        ("mixup_alpha", 0, math.inf, "0 (off) or more", "the rule has 0.1 from 20,000 images"),
        ("momentum", 0, 1, "0 to below 1", "the rule has 0.9"),
        ("weight_decay", 0, math.inf, "0 or more", "the rule has 0"),
        ("dropout", 0, 1, "0 (off) to below 1", "the rule has 0"),
    ):
        value = getattr(values, name)
        if value is not None and not least <= value < below:
            raise ConfigError.of(name, value, accepted, remedy)


def hyperrule(
    num_examples: int,
    image_size: tuple[int, int],
    profile: Profile = "code",
    model: str | None = None,
    *,
    random_crop: bool = True,
    random_flip: bool = True,
    overrides: RuleOverrides = RuleOverrides(),
    **replaced: Any,
) -> HyperRule:
    """Return the fine-tuning settings for a task by BiT-HyperRule.

    Profile ``code`` follows the reference (big_transfer:bit_hyperrule.py): a warm-up of 100 or 500 steps, in the small
    regime decays at 200, 300 and 400 of 500 steps, and 512 -> 480 pixels for every model. ``paper`` follows the text
    (§3.3): no warm-up, decays at 30, 60 and 90 % of the steps, and 448 -> 384 pixels except for R152x4. ``cheap`` is
    ``code`` with a quarter of the images, batch 128 at learning rate 0.001, with which the authors made the tables of
    their README (big_transfer:README.md).

    Every value can be replaced, with any profile; values that are not given follow the rule. If ``num_steps`` is
    changed, the warm-up and the boundaries that are not given keep their share of the run. Of ``resize`` and ``crop``,
    one that is given alone scales the other.

    Args:
        num_examples: Training images actually used.
        image_size: (height, width) of a typical image, pixels.
        profile: ``code``, ``paper`` or ``cheap``.
        model: Name of the network, such as ``R152x4``; matters only for profile ``paper``.
        random_crop: False if position matters (paper App. F).
        random_flip: False if left and right matter (paper App. F).
        overrides: Values that replace the rule's. Neither rate nor steps change with the batch size.
        **replaced: The same, one by one, by the names of `RuleOverrides`: ``hyperrule(..., num_steps=100)``.

    Raises:
        ConfigError: A setting out of range.
    """
    overrides = replace(overrides, **replaced)
    for name, value, kind in (
        ("profile", profile, Profile),
        ("regime", overrides.regime or "small", Regime),
        ("boundary_rule", overrides.boundary_rule or "hyperrule", BoundaryRule),
    ):
        if value not in get_args(kind):
            raise ConfigError.of(name, repr(value), ", ".join(get_args(kind)), "choose one")
    if not isinstance(image_size, (tuple, list)) or len(image_size) != 2:
        raise ConfigError.of("image_size", repr(image_size), "(height, width) in pixels", "give both")
    num_examples = operator.index(num_examples)
    height, width = (operator.index(side) for side in image_size)

    natural: Regime = "small" if num_examples < _SMALL_BELOW else "medium" if num_examples < _MEDIUM_BELOW else "large"
    regime = overrides.regime or natural
    steps = _NUM_STEPS[regime]
    paper, cheap = profile == "paper", profile == "cheap"
    if height * width < _SMALL_AREA_BELOW:
        own_resize, own_crop = 160, 128
    elif paper and model != "R152x4":
        own_resize, own_crop = 448, 384
    else:
        own_resize, own_crop = 512, 480
    if overrides.crop is not None:
        own_resize = max(overrides.crop, round(own_resize * overrides.crop / own_crop))
    elif overrides.resize is not None:
        own_crop = max(MIN_IMAGE_SIZE, round(own_crop * overrides.resize / own_resize))
    own: dict[str, Any] = {
        "regime": natural,
        "resize": own_resize,
        "crop": own_crop,
        "num_steps": steps,
        "warmup_steps": 0 if paper else _CODE_WARMUP[regime],
        "boundaries": tuple(steps * p // 100 for p in (30, 60, 90)) if paper else _CODE_BOUNDARIES[regime],
        "boundary_rule": "upstream" if paper else "hyperrule",
        "batch_size": 128 if cheap else 512,
        "base_lr": 0.001 if cheap else 0.003,
        "momentum": 0.9,
        "weight_decay": 0.0,
        "decay_to_init": False,
        "dropout": 0.0,
        "mixup_alpha": 0.0 if regime == "small" else 0.1,
        "random_crop": True,
        "random_flip": True,
    }
    values = {**own, "regime": regime, "random_crop": random_crop, "random_flip": random_flip}
    if overrides.num_steps is not None:
        values["warmup_steps"] = round(own["warmup_steps"] * overrides.num_steps / steps)
        values["boundaries"] = tuple(round(b * overrides.num_steps / steps) for b in own["boundaries"])
    values |= {name: value for name, value in vars(overrides).items() if value is not None}
    values["boundaries"] = tuple(values["boundaries"])
    return HyperRule(
        num_examples=num_examples,
        image_size=(height, width),
        profile=profile,
        overrides=tuple(name for name in own if values[name] != own[name]),
        **values,
    )
