"""The interface that a network must have to be trained, saved and served. PyTorch only.

Training, inference and saved models use a network only through this module, and do not depend on its layers. A new
family is a module next to `bit_ray.models.resnet` and a line in `bit_ray.models.zoo`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, Self

from torch import Tensor, nn

from bit_ray.errors import ConfigError, brief

# JFT has 30,000 classes, the heads of ImageNet-21k 21,843.
MAX_CLASSES = 1_000_000

BatchStatistics = Literal["none", "group", "batch"]
"""Over which images a network in training normalises: each by itself, groups of a worker, or the whole batch."""


class NetworkConfig(Protocol):
    """The shape of a network: a frozen dataclass."""

    min_image_size: ClassVar[int]
    """Least side of an image, pixels."""

    @property
    def num_classes(self) -> int:
        """Outputs of the classifier."""

    @property
    def batch_statistics(self) -> BatchStatistics:
        """Over which images it normalises in training."""

    def build(self) -> "Network":
        """Return a freshly initialised network with a zero head."""


@dataclass(frozen=True)
class Parts:
    """The parts of a network, in the order of its forward pass."""

    stem: nn.Module
    stages: Sequence[nn.Module]
    norm: nn.Module
    """Norm after the last stage."""
    head: nn.Linear


class Network(nn.Module):
    """A trunk that makes one vector from an image, and a linear classifier called ``head``.

    A family overrides every member that raises NotImplementedError. An abstract module, not a `typing.Protocol`: it is
    also moved, saved, copied and wrapped as a module.
    """

    config: NetworkConfig
    head: nn.Linear

    @property
    def num_features(self) -> int:
        """Length D of the feature vector."""
        raise NotImplementedError

    def forward_features(self, x: Tensor) -> Tensor:
        """Map ``[B, 3, H, W] float`` in [-1, 1] to the features ``[B, D]``."""
        raise NotImplementedError

    def forward_map(self, x: Tensor) -> Tensor:
        """Map ``[B, 3, H, W] float`` to ``[B, D, h, w]``, whose mean over h and w is the features."""
        raise NotImplementedError

    def forward_head(self, features: Tensor) -> Tensor:
        """Map features ``[B, D]`` to logits ``[B, num_classes]``."""
        logits: Tensor = self.head(features)
        return logits

    def forward(self, x: Tensor, feature_mask: Tensor | None = None) -> Tensor:
        """Map ``[B, 3, H, W] float`` in [-1, 1] to logits ``[B, num_classes]``.

        Args:
            x: Images.
            feature_mask: ``[B, D]`` factors of the features, for dropout; the training code draws them.

        Raises:
            ConfigError: The input has another shape or type, or is too small.
        """
        features = self.forward_features(x)
        return self.forward_head(features if feature_mask is None else features * feature_mask)

    def parts(self) -> Parts:
        """Return the parts, for training some of them."""
        raise NotImplementedError

    def units(self) -> list[nn.Module]:
        """Return modules without parts in common, in the order of the forward pass, each of which fits on a device.

        A training in shards gathers the weights of one after the other. What is in none of them is gathered throughout.
        """
        raise NotImplementedError

    def recompute_kernels(self) -> None:
        """Compute in the backward pass again what was computed from weights alone, instead of keeping it until then."""

    def convolutions(self) -> list[nn.Module]:
        """Return the modules whose ``weight`` ``[O, I, H, W]`` is a kernel."""
        return [module for module in self.modules() if isinstance(module, nn.Conv2d)]

    def norms(self) -> list[nn.Module]:
        """Return the normalisation layers, whose parameters are scales and shifts."""
        raise NotImplementedError

    def baked(self) -> Self:
        """Return a copy on the CPU, in evaluation mode, that does not compute its kernels in every forward pass."""
        raise NotImplementedError


def check_num_classes(num_classes: int) -> None:
    """Refuse a number of classes that no network is built for.

    Raises:
        ConfigError: It is out of range.
    """
    if num_classes < 1:
        raise ConfigError.of("num_classes", brief(num_classes), "at least 1", "for features alone use forward_features")
    if num_classes > MAX_CLASSES:
        raise ConfigError.of("num_classes", brief(num_classes), f"at most {MAX_CLASSES}", "check the class list")


def check_input(x: Tensor, min_image_size: int, halvings: str) -> None:
    """Refuse a batch of images that a network cannot take; can be traced by `torch.export`.

    Args:
        x: ``[B, 3, H, W] float``.
        min_image_size: Least H and W, pixels.
        halvings: The reason, such as "the network halves them five times".

    Raises:
        ConfigError: It has another shape or type, or is too small.
    """
    if x.ndim != 4 or x.shape[1] != 3 or not x.is_floating_point():
        given = f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}"
        accepted = "[B, 3, H, W] floating point in [-1, 1]"
        raise ConfigError.of("input", given, accepted, "permute and scale the images first")
    if x.shape[2] < min_image_size or x.shape[3] < min_image_size:
        given, accepted = f"{x.shape[2]}x{x.shape[3]} pixels", f"at least {min_image_size}x{min_image_size}"
        raise ConfigError.of("input", given, accepted, f"resize the images: {halvings}")
