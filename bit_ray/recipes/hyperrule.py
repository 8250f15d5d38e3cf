"""BiT-HyperRule: how to fine-tune, given only the number of images and their size (paper §3.3)."""

import math
import operator
from dataclasses import dataclass
from typing import Literal, get_args

from bit_ray.errors import ConfigError
from bit_ray.recipes.schedules import Schedule

Profile = Literal["code", "paper", "custom"]
Regime = Literal["small", "medium", "large"]

# First number of examples that is no longer of the regime (paper §3.3; big_transfer:bit_hyperrule.py).
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


@dataclass(frozen=True, kw_only=True)
class HyperRule:
    """All settings of one fine-tuning run: SGD on every layer, from a zero head, without weight decay or dropout."""

    num_examples: int
    """Training images really used: k * classes for a few-shot subset (big_transfer:bit_pytorch/train.py)."""
    image_size: tuple[int, int]
    """(height, width) of a typical image of the task, pixels."""
    profile: Profile
    """Where the numbers come from: the reference ``code``, the ``paper``, or ``custom``."""
    regime: Regime
    """``small`` below 20,000 examples, ``medium`` below 500,000, else ``large``."""
    resize: int
    """Side of the square to which training images are resized before the random crop, aspect ignored, pixels."""
    crop: int
    """Side of what the network sees, pixels; test images are resized straight to it, nothing is cut off."""
    num_steps: int
    """Optimizer steps."""
    warmup_steps: int
    """Steps of linear warm-up."""
    boundaries: tuple[int, ...]
    """Steps after which the learning rate is divided by ten."""
    boundary_rule: Literal["upstream", "hyperrule"] = "hyperrule"
    """Whether step b itself has the higher rate (``hyperrule``, as the code) or the lower one; see `Schedule`."""
    batch_size: int = 512
    """Images per optimizer step."""
    base_lr: float = 0.003
    """Learning rate before the first decay; not scaled with the batch."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 0.0
    """The HyperRule has none (paper §3.3)."""
    mixup_alpha: float = 0.0
    """Parameter of MixUp's Beta(alpha, alpha); 0 is no MixUp."""
    random_crop: bool = True
    """Off for tasks in which position matters (paper App. F): Clevr-count, Clevr-distance, DMLab, KITTI-distance,
    dSprites-location. Then training images, too, are resized straight to ``crop``."""
    random_flip: bool = True
    """Off for tasks in which left and right matter (paper App. F): dSprites-orientation, dSprites-location,
    SmallNORB-azimuth."""

    def __post_init__(self) -> None:
        if self.num_examples < 1:
            raise ConfigError(
                f"num_examples: {self.num_examples}; at least 1; count the training images that are really used"
            )
        if min(self.image_size) < 1:
            raise ConfigError(f"image_size: {self.image_size}; (height, width), both at least 1 pixel; correct it")
        if self.crop < 32:
            raise ConfigError(f"crop: {self.crop}; at least 32 pixels; the network halves its input five times")
        if self.resize < self.crop:
            raise ConfigError(f"resize: {self.resize}; at least crop ({self.crop}); a crop cannot exceed the image")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size: {self.batch_size}; at least 1; the rule has 512")
        if not 0 <= self.mixup_alpha < math.inf:
            raise ConfigError(f"mixup_alpha: {self.mixup_alpha}; 0 (off) or more; the rule has 0.1 from 20,000 images")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum: {self.momentum}; 0 to below 1; the rule has 0.9")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(f"weight_decay: {self.weight_decay}; 0 or more; the rule has 0")
        _ = self.schedule  # which checks the steps and the rate

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


def hyperrule(
    num_examples: int,
    image_size: tuple[int, int],
    profile: Profile = "code",
    model: str | None = None,
    *,
    random_crop: bool = True,
    random_flip: bool = True,
    resize: int | None = None,
    crop: int | None = None,
    num_steps: int | None = None,
    warmup_steps: int | None = None,
    boundaries: tuple[int, ...] | None = None,
    batch_size: int | None = None,
    base_lr: float | None = None,
    mixup_alpha: float | None = None,
) -> HyperRule:
    """Return the fine-tuning settings for a task by BiT-HyperRule.

    Profile ``code`` is what the reference does (big_transfer:bit_hyperrule.py): a warm-up of 100 or 500 steps, in the
    small regime decays at 200, 300 and 400 of 500 steps, and 512 -> 480 pixels for every model. ``paper`` is the text
    (§3.3): no warm-up, decays at 30, 60 and 90 % of the steps, and 448 -> 384 pixels except for R152x4.
    ``custom`` is the code's rule with the settings given here; where ``num_steps`` is changed, the warm-up and the
    boundaries that are not given keep their share of the run.

    Args:
        num_examples: Training images really used.
        image_size: (height, width) of a typical image, pixels.
        profile: ``code``, ``paper`` or ``custom``.
        model: Name of the network, as ``R152x4``; matters to profile ``paper`` alone.
        random_crop: False where position matters (paper App. F); every profile takes it.
        random_flip: False where left and right matter (paper App. F); every profile takes it.
        resize: Replaces the size before the crop, pixels; this and all below with profile ``custom`` alone.
        crop: Replaces the size that the network sees, pixels.
        num_steps: Replaces the number of optimizer steps.
        warmup_steps: Replaces the steps of warm-up.
        boundaries: Replaces the steps after which the rate is divided by ten.
        batch_size: Replaces the images per step; neither rate nor steps follow it.
        base_lr: Replaces the learning rate.
        mixup_alpha: Replaces MixUp's alpha; 0 is off.

    Raises:
        ConfigError: a setting out of range, or a replaced setting with profile ``code`` or ``paper``.
    """
    if profile not in get_args(Profile):
        raise ConfigError(f"profile: {profile!r}; one of {', '.join(get_args(Profile))}; choose one")
    if not isinstance(image_size, (tuple, list)) or len(image_size) != 2:
        raise ConfigError(f"image_size: {image_size!r}; (height, width) in pixels; give both")
    overrides = {
        "resize": resize,
        "crop": crop,
        "num_steps": num_steps,
        "warmup_steps": warmup_steps,
        "boundaries": boundaries,
        "batch_size": batch_size,
        "base_lr": base_lr,
        "mixup_alpha": mixup_alpha,
    }
    given = [name for name, value in overrides.items() if value is not None]
    if given and profile != "custom":
        raise ConfigError(f"{given[0]}: given, but profile {profile!r} fixes it; use profile 'custom' or leave it out")

    num_examples = operator.index(num_examples)
    height, width = (operator.index(side) for side in image_size)
    regime: Regime = "small" if num_examples < _SMALL_BELOW else "medium" if num_examples < _MEDIUM_BELOW else "large"
    steps = _NUM_STEPS[regime]
    if profile == "paper":
        default_warmup, default_boundaries = 0, tuple(steps * percent // 100 for percent in (30, 60, 90))
    else:
        default_warmup, default_boundaries = _CODE_WARMUP[regime], _CODE_BOUNDARIES[regime]
    if num_steps is not None:
        default_warmup = round(default_warmup * num_steps / steps)
        default_boundaries = tuple(round(b * num_steps / steps) for b in default_boundaries)
    if height * width < _SMALL_AREA_BELOW:
        default_resize, default_crop = 160, 128
    elif profile == "paper" and model != "R152x4":
        default_resize, default_crop = 448, 384
    else:
        default_resize, default_crop = 512, 480
    return HyperRule(
        num_examples=num_examples,
        image_size=(height, width),
        profile=profile,
        regime=regime,
        resize=default_resize if resize is None else resize,
        crop=default_crop if crop is None else crop,
        num_steps=steps if num_steps is None else num_steps,
        warmup_steps=default_warmup if warmup_steps is None else warmup_steps,
        boundaries=default_boundaries if boundaries is None else tuple(boundaries),
        boundary_rule="upstream" if profile == "paper" else "hyperrule",
        batch_size=512 if batch_size is None else batch_size,
        base_lr=0.003 if base_lr is None else base_lr,
        mixup_alpha=(0.0 if regime == "small" else 0.1) if mixup_alpha is None else mixup_alpha,
        random_crop=random_crop,
        random_flip=random_flip,
    )
