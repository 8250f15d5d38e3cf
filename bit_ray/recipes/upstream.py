"""Upstream pre-training as the paper does it: BiT-S, BiT-M and BiT-L (paper §3.3)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from bit_ray.errors import ConfigError
from bit_ray.recipes.schedules import Schedule, epochs_to_steps


@dataclass(frozen=True, kw_only=True)
class UpstreamRecipe:
    """How to pre-train, for a data set of any size: durations are in epochs; the data's size converts them to steps.

    SGD without Nesterov, coupled L2 on kernels only; a smaller run is made by `dataclasses.replace`.
    """

    name: str
    """Name of the recipe."""
    epochs: float
    """Length of the run, passes over the data."""
    decay_epochs: tuple[float, ...]
    """Epochs after which the learning rate is divided by ten, ascending."""
    global_batch_size: int = 4096
    """Images per optimizer step, over all workers (paper §3.3)."""
    base_lr_per_256: float = 0.03
    """Learning rate per 256 images of the global batch; 0.48 at 4096 (paper §3.3)."""
    warmup_steps: int = 5000
    """Steps of linear warm-up (paper §3.3)."""
    schedule_kind: Literal["staircase", "cosine"] = "staircase"
    """The paper has the staircase; ``cosine`` is big_vision's later choice and ignores decay_epochs."""
    momentum: float = 0.9
    """Momentum of SGD (paper §3.3)."""
    weight_decay: float = 1e-4
    """Coupled L2, as torch's SGD has it (paper §3.3), on kernels alone, not on norms or biases (big_vision:optax.py;
    the paper is silent)."""
    crop_size: int = 224
    """Side of the random crop that the network sees, pixels (paper §2.2)."""
    area_range: tuple[float, float] = (0.05, 1.0)
    """Share of the image that a crop covers (big_vision:pp/ops_image.py)."""
    aspect_range: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of a crop (big_vision:pp/ops_image.py)."""
    random_flip: bool = True
    """Mirror left and right with probability 1/2 (paper §2.2)."""
    loss: Literal["auto", "softmax", "sigmoid"] = "auto"
    """``auto``: softmax cross-entropy for one label per image, sigmoid for several. The paper is silent; its authors
    used sigmoid for ImageNet-21k (big_transfer#26). Sigmoid is summed over classes and averaged over images."""
    reference_num_examples: int = 0
    """Images of the published data set, for comparison only; 0 where there is none."""
    reference_num_classes: int = 0
    """Classes of the published data set, for comparison only; 0 where there is none."""

    def __post_init__(self) -> None:
        if not 0 < self.epochs < math.inf:
            raise ConfigError.of("epochs", self.epochs, "above 0", "the paper has 90 (S, M) or 40 (L)")
        if list(self.decay_epochs) != sorted(self.decay_epochs):
            raise ConfigError.of("decay_epochs", self.decay_epochs, "ascending epochs", "sort them")
        if self.decay_epochs and not 0 < self.decay_epochs[0] <= self.decay_epochs[-1] < self.epochs:
            accepted = f"above 0 and below epochs ({self.epochs})"
            raise ConfigError.of("decay_epochs", self.decay_epochs, accepted, "scale them together with epochs")
        for name, value, known in (
            ("global_batch_size", self.global_batch_size, "4096"),
            ("crop_size", self.crop_size, "224"),
            ("base_lr_per_256", self.base_lr_per_256, "0.03"),
        ):
            if not 0 < value < math.inf:
                raise ConfigError.of(name, value, "above 0", f"the paper has {known}")
        for name, value in (("warmup_steps", self.warmup_steps), ("weight_decay", self.weight_decay)):
            if not 0 <= value < math.inf:
                raise ConfigError.of(name, value, "0 or more", "0 turns it off")
        if not 0 <= self.momentum < 1:
            raise ConfigError.of("momentum", self.momentum, "0 to below 1", "the paper has 0.9")

    @property
    def base_lr(self) -> float:
        """Learning rate after warm-up; 0.48 at batch 4096."""
        return self.base_lr_per_256 * self.global_batch_size / 256

    def num_steps(self, num_examples: int) -> int:
        """Return the length of a run over ``num_examples`` images, optimizer steps.

        Raises:
            ConfigError: Less than one step.
        """
        if num_examples < 1:
            raise ConfigError.of("num_examples", num_examples, "at least 1", "use a data set with images")
        steps = epochs_to_steps(self.epochs, num_examples, self.global_batch_size)
        if steps < 1:
            given = f"{self.epochs} over {num_examples} images are less than one batch of {self.global_batch_size}"
            raise ConfigError.of("epochs", given, "at least one batch", "raise epochs or lower global_batch_size")
        return steps

    def schedule(self, num_examples: int) -> Schedule:
        """Return the learning rate of a run over ``num_examples`` images.

        Raises:
            ConfigError: The run is not longer than the warm-up.
        """
        steps = self.num_steps(num_examples)
        if self.warmup_steps >= steps:
            length = f"{self.epochs:g} epochs of {num_examples} images are {steps} steps of {self.global_batch_size}"
            accepted = f"0 to {steps - 1}, because {length}"
            raise ConfigError.of("warmup_steps", self.warmup_steps, accepted, "lower warmup_steps or raise epochs")
        return Schedule(
            base_lr=self.base_lr,
            num_steps=steps,
            warmup_steps=self.warmup_steps,
            boundaries=tuple(epochs_to_steps(e, num_examples, self.global_batch_size) for e in self.decay_epochs),
            kind=self.schedule_kind,
            boundary_rule="upstream",
        )

    def loss_for(self, multi_label: bool) -> Literal["softmax", "sigmoid"]:
        """Return the loss for a data set with one (False) or several (True) labels per image.

        Raises:
            ConfigError: Softmax, which knows one label, with several.
        """
        if self.loss == "auto":
            return "sigmoid" if multi_label else "softmax"
        if self.loss == "softmax" and multi_label:
            raise ConfigError.of("loss", "softmax with several labels per image", "sigmoid or auto", "set loss to auto")
        return self.loss


def bit_s() -> UpstreamRecipe:
    """BiT-S: ILSVRC-2012, 1,281,167 images of 1,000 classes, 28,151 steps.

    90 epochs, a tenth of the rate after 30, 60 and 80 (paper §3.3); softmax (big_vision:configs/bit_i1k.py). Published
    top-1 of R152x4 fine-tuned on ILSVRC-2012: 81.30 % (paper Table 2).
    """
    return UpstreamRecipe(
        name="bit_s",
        epochs=90,
        decay_epochs=(30, 60, 80),
        loss="softmax",
        reference_num_examples=1_281_167,
        reference_num_classes=1000,
    )


def bit_m() -> UpstreamRecipe:
    """BiT-M: ImageNet-21k, 14.2 million images, 21,843 classes in the published heads, about 312,000 steps.

    90 epochs, a tenth of the rate after 30, 60 and 80 (paper §3.3). Set loss to ``sigmoid`` to follow the authors on a
    shard set that keeps one label per image (big_transfer#26). Published top-1 of R152x4 fine-tuned on ILSVRC-2012:
    85.39 % (paper Table 2).
    """
    return UpstreamRecipe(
        name="bit_m",
        epochs=90,
        decay_epochs=(30, 60, 80),
        reference_num_examples=14_200_000,
        reference_num_classes=21_843,
    )


def bit_l() -> UpstreamRecipe:
    """BiT-L: JFT-300M, about 300 million images of 18,291 classes, 1.26 labels each, about 2.93 million steps.

    40 epochs, a tenth of the rate after 10, 23, 30 and 37 (paper §3.3). Published top-1 of R152x4 fine-tuned on
    ILSVRC-2012: 87.54 % (paper Table 1).
    """
    return UpstreamRecipe(
        name="bit_l",
        epochs=40,
        decay_epochs=(10, 23, 30, 37),
        reference_num_examples=300_000_000,
        reference_num_classes=18_291,
    )


RECIPES: dict[str, Callable[[], UpstreamRecipe]] = {"bit_s": bit_s, "bit_m": bit_m, "bit_l": bit_l}
"""The recipes by name, as ``--recipe`` takes them."""
