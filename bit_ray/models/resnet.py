"""BiT ResNet-v2: pre-activation bottlenecks with GroupNorm and Weight Standardization, in plain PyTorch.

With BatchNorm instead of GroupNorm, or without Weight Standardization, it is a network of the paper's ablation (§4.3).

Kolesnikov et al., "Big Transfer (BiT)", arXiv 1912.11370 §3.1. Details that the paper does not give follow the authors'
code exactly, including the padding (big_transfer:bit_pytorch/models.py), so that their published weights give their
published results.
"""

import copy
from collections import OrderedDict
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from bit_ray.errors import ConfigError, brief
from bit_ray.models.batch_norm import BatchNormReLU
from bit_ray.models.inputs import MIN_IMAGE_SIZE
from bit_ray.models.network import BatchStatistics, Network, Parts, check_input, check_num_classes

NUM_GROUPS = 32
STAGE_STRIDES = (1, 2, 2, 2)
# A description of a few bytes must not take minutes or all memory. The largest published network, R152x4, has 36 units
# in a stage and 1.1e9 parameters with the 21843 classes of ImageNet-21k.
MAX_UNITS = 64
MAX_WIDTH = 16
MAX_PARAMETERS = 10_000_000_000

Norm = Literal["gn", "bn", "syncbn"]


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """Shape of a BiT ResNet-v2."""

    units: tuple[int, ...]
    """Bottlenecks in each of the four stages; (3, 4, 6, 3) is a ResNet-50."""
    width: float
    """Factor on every hidden width, including the root's (paper §3.1); a multiple of 0.5."""
    num_classes: int
    """Outputs of the classifier."""
    norm: Norm = "gn"
    """GroupNorm, as BiT; BatchNorm over groups of a worker's images; BatchNorm over the whole batch of all workers."""
    standardize: bool = True
    """Weight Standardization of every convolution, as BiT."""

    min_image_size: ClassVar[int] = MIN_IMAGE_SIZE
    """Least side of an image, pixels: the network halves it five times."""

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            raise ConfigError.of("norm", brief(self.norm), ", ".join(get_args(Norm)), "choose one")
        if len(self.units) != len(STAGE_STRIDES) or not all(isinstance(n, int) and n >= 1 for n in self.units):
            accepted = "four whole numbers of at least 1"
            raise ConfigError.of("units", brief(self.units), accepted, "for example (3, 4, 6, 3)")
        if max(self.units) > MAX_UNITS:
            raise ConfigError.of("units", brief(self.units), f"at most {MAX_UNITS} in a stage", "R152 has 36")
        # The narrowest layers have 64 * width channels, and all others are multiples of them.
        if not 0 < self.width <= MAX_WIDTH or (64 * self.width) % NUM_GROUPS != 0:
            accepted = f"a positive multiple of {NUM_GROUPS / 64:g}, at most {MAX_WIDTH}"
            reason = f"the {NUM_GROUPS} groups of GroupNorm must divide 64 * width channels"
            raise ConfigError.of("width", f"{self.width:g}", accepted, reason)
        check_num_classes(self.num_classes)
        if self.num_parameters > MAX_PARAMETERS:
            network = f"{self.units} of width {self.width:g} with {self.num_classes} classes"
            given, accepted = f"{network} have {self.num_parameters:.2g} parameters", f"at most {MAX_PARAMETERS:.2g}"
            raise ConfigError.of("units", given, accepted, "choose a smaller network")

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of the root and of the output of each stage."""
        return int(64 * self.width), *(int(256 * self.width) * 2**stage for stage in range(len(self.units)))

    @property
    def batch_statistics(self) -> BatchStatistics:
        """Over which images it normalises in training."""
        statistics: dict[Norm, BatchStatistics] = {"gn": "none", "bn": "group", "syncbn": "batch"}
        return statistics[self.norm]

    def build(self) -> "ResNetV2":
        """Return a freshly initialised network with a zero head."""
        return ResNetV2(self)

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the network, computed from its shape."""
        root, *outputs = self.channels
        total = 7 * 7 * 3 * root + 2 * outputs[-1] + (outputs[-1] + 1) * self.num_classes
        for num_units, (before, after) in zip(self.units, pairwise(self.channels), strict=True):
            mid = after // 4
            inside = 4 * mid + 9 * mid * mid + mid * after
            total += num_units * inside + (2 + mid) * (before + (num_units - 1) * after) + before * after
        return total


def standardize(weight: Tensor) -> Tensor:
    """Weight Standardization: every output filter to mean 0 and variance 1 (Qiao et al., arXiv 1903.10520).

    The variance is the biased one, and 1e-10 is added inside the root (big_transfer:bit_pytorch/models.py).

    Args:
        weight: ``[O, I, H, W]`` of any floating type.

    Returns:
        ``[O, I, H, W]``, at least float32 also under autocast, in the memory format of ``weight``.
    """
    # 1e-10 is zero in float16. The result stays float32: autocast never lowers layer_norm.
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    # The same formula as LayerNorm over a filter, whose fused kernels are several times faster than var_mean.
    if weight.is_contiguous() or not weight.is_contiguous(memory_format=torch.channels_last):
        return functional.layer_norm(weight, weight.shape[1:], eps=1e-10)
    by_rows = weight.permute(0, 2, 3, 1)  # contiguous, so that channels_last costs no copies
    return functional.layer_norm(by_rows, by_rows.shape[1:], eps=1e-10).permute(0, 3, 1, 2)


class PlainConv2d(nn.Conv2d):
    """A convolution without bias."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        # Padding independent of the image size, as the authors' "fixed padding"; not TensorFlow's SAME.
        super().__init__(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)

    def reset_parameters(self) -> None:
        """Draw the kernel from a Kaiming normal over the fan-in (He et al., arXiv 1502.01852).

        Weight Standardization makes the forward pass invariant to the kernel's scale, so the scale chosen here only
        sets the effective learning rate (gradients scale with 1/std). The paper does not give it; flax, which the
        authors used, draws over the fan-in as well.
        """
        if not self.weight.is_meta:  # only shapes are asked for; drawing there imports torch._dynamo, three seconds
            nn.init.kaiming_normal_(self.weight, mode="fan_in", nonlinearity="relu")


class StdConv2d(PlainConv2d):
    """A convolution without bias whose kernel is standardized in every forward pass."""

    recompute = False
    """Whether it is standardized again in the backward pass, which takes no memory between the two."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``[B, I, H, W]`` to ``[B, O, H', W']``."""
        if self.recompute and torch.is_grad_enabled():
            # It ends where it has all that the backward pass needs, before it would convolve again.
            y: Tensor = checkpoint(self._convolve, x, use_reentrant=False, preserve_rng_state=False)
            return y
        return self._convolve(x)

    def _convolve(self, x: Tensor) -> Tensor:
        weight = standardize(self.weight).to(self.weight.dtype)
        return functional.conv2d(x, weight, None, self.stride, self.padding)


class GroupNormReLU(nn.GroupNorm):
    """GroupNorm with 32 groups, eps 1e-5 and an affine per channel, then ReLU; one module so that it can be fused."""

    def __init__(self, num_channels: int) -> None:
        super().__init__(NUM_GROUPS, num_channels, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[B, C, H, W]`` and apply ReLU."""
        return functional.relu(super().forward(x), inplace=True)


class Bottleneck(nn.Module):
    """Pre-activation bottleneck with the stride in its 3x3 convolution (He et al., arXiv 1603.05027)."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, *, norm: Norm = "gn", standardize: bool = True
    ) -> None:
        super().__init__()
        mid_channels = out_channels // 4
        conv = StdConv2d if standardize else PlainConv2d
        # The names of saved weights have gn for any norm.
        self.gn1 = _norm(norm, in_channels)
        self.conv1 = conv(in_channels, mid_channels, 1)
        self.gn2 = _norm(norm, mid_channels)
        self.conv2 = conv(mid_channels, mid_channels, 3, stride)
        self.gn3 = _norm(norm, mid_channels)
        self.conv3 = conv(mid_channels, out_channels, 1)
        self.proj = conv(in_channels, out_channels, 1, stride) if stride != 1 or in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` to ``[B, out_channels, H/stride, W/stride]``."""
        activated = self.gn1(x)
        # A projection gets the pre-activated input; the identity is the raw input.
        shortcut = x if self.proj is None else self.proj(activated)
        residual = self.conv1(activated)
        residual = self.conv2(self.gn2(residual))
        residual = self.conv3(self.gn3(residual))
        return residual + shortcut


class ResNetV2(Network):
    """BiT ResNet-v2; the input is ``[B, 3, H, W] float`` in [-1, 1], H and W at least 32 pixels."""

    config: ResNetConfig

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.channels
        self.root = (StdConv2d if config.standardize else PlainConv2d)(3, channels[0], 7, stride=2)
        # Padded with zeros: MaxPool2d(padding=1) would pad with -inf, which changes the border
        # (google-research/big_transfer#74).
        self.pool = nn.Sequential(nn.ZeroPad2d(1), nn.MaxPool2d(3, stride=2))
        self.stages = nn.Sequential()
        kind: dict[str, Any] = {"norm": config.norm, "standardize": config.standardize}
        for num_units, stride, (before, after) in zip(config.units, STAGE_STRIDES, pairwise(channels), strict=True):
            stage = [Bottleneck(before, after, stride, **kind)]
            stage += [Bottleneck(after, after, 1, **kind) for _ in range(num_units - 1)]
            self.stages.append(nn.Sequential(*stage))
        self.gn = _norm(config.norm, channels[-1])
        self.head = _zero_head(channels[-1], config.num_classes)

    @property
    def num_features(self) -> int:
        """Length D of the pooled feature vector."""
        return self.config.channels[-1]

    def parts(self) -> Parts:
        """Return the parts, for training some of them."""
        return Parts(self.root, tuple(self.stages), self.gn, self.head)

    def units(self) -> list[nn.Module]:
        """Return the bottlenecks and the head, whose weights a training in shards gathers one after the other."""
        return [*(unit for stage in self.stages for unit in stage.children()), self.head]

    def recompute_kernels(self) -> None:
        """Standardize kernels again in the backward pass, instead of keeping all of them until then."""
        for module in self.modules():
            if isinstance(module, StdConv2d):
                module.recompute = True

    def norms(self) -> list[nn.Module]:
        """Return the normalisation layers, whose parameters are scales and shifts."""
        return [module for module in self.modules() if isinstance(module, (GroupNormReLU, BatchNormReLU))]

    def reset_head(self, num_classes: int) -> None:
        """Replace the classifier by a zero-initialised one, as on every transfer (paper §4.1).

        Raises:
            ConfigError: ``num_classes`` is less than 1.
        """
        self.config = replace(self.config, num_classes=num_classes)
        self.head = _zero_head(self.num_features, num_classes).to(self.head.weight.device, self.head.weight.dtype)

    def forward_stem(self, x: Tensor) -> Tensor:
        """Check the input ``[B, 3, H, W] float`` and map it to the input of stage 1, ``[B, 64 * width, H/4, W/4]``."""
        check_input(x, MIN_IMAGE_SIZE, "the network halves them five times")
        return self.pool(self.root(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Map ``[B, 3, H, W] float`` to the pooled features ``[B, D]`` ("pre_logits")."""
        return self.forward_map(x).mean(dim=(2, 3))

    def forward_map(self, x: Tensor) -> Tensor:
        """Map ``[B, 3, H, W] float`` to the features before pooling, ``[B, D, H/32, W/32]``."""
        features: Tensor = self.gn(self.stages(self.forward_stem(x)))
        return features

    def forward_intermediates(self, x: Tensor) -> "OrderedDict[str, Tensor]":
        """Map ``[B, 3, H, W] float`` to the named features ``stem``, ``stage1`` ... ``stage4`` and ``pre_logits``.

        The stages' are the raw residual stream at strides 4, 8, 16 and 32 (names of big_vision:models/bit_paper.py).
        """
        features = OrderedDict(stem=self.forward_stem(x))
        for number, stage in enumerate(self.stages, start=1):
            features[f"stage{number}"] = stage(next(reversed(features.values())))
        features["pre_logits"] = self.gn(next(reversed(features.values()))).mean(dim=(2, 3))
        return features

    def baked(self) -> "ResNetV2":
        """Return a copy on the CPU, in evaluation mode, with its kernels standardized once."""
        baked = copy.deepcopy(self).cpu().eval().requires_grad_(False)
        for name, module in list(baked.named_modules()):
            if isinstance(module, StdConv2d):
                size, stride = module.kernel_size[0], module.stride[0]
                with torch.device("meta"):
                    plain = PlainConv2d(module.in_channels, module.out_channels, size, stride)
                plain.weight = nn.Parameter(standardize(module.weight.float()), requires_grad=False)
                baked.set_submodule(name, plain)
        return baked


def _norm(norm: Norm, num_channels: int) -> nn.Module:
    return GroupNormReLU(num_channels) if norm == "gn" else BatchNormReLU(num_channels, over_workers=norm == "syncbn")


def _zero_head(num_features: int, num_classes: int) -> nn.Linear:
    head = nn.Linear(num_features, num_classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head
