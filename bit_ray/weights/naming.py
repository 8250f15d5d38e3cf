"""Names and layouts of a BiT network's weights in other programs.

Sources: big_transfer:bit_pytorch/models.py (``npz`` and ``bit_pytorch``), big_vision:models/bit_paper.py,
timm:models/resnetv2.py (``resnetv2_*_bit``), transformers:models/bit/modeling_bit.py.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from bit_ray.errors import ModelError
from bit_ray.models.network import NetworkConfig
from bit_ray.models.resnet import ResNetConfig

NamingName = Literal["bit_ray", "npz", "big_vision", "timm", "huggingface", "bit_pytorch"]


@dataclass(frozen=True, kw_only=True)
class Naming:
    """Templates of names: stage and layer count from 0, block and unit from 1; n is 1 to 3, part a to c."""

    root: str
    conv: str
    proj: str
    norm: str
    last_norm: str
    affine: tuple[str, str]
    """Endings of a norm's scale and shift."""
    head: tuple[str, str]
    """Weight and bias of the classifier."""
    head_layout: Literal["[N, D]", "[N, D, 1, 1]", "[D, N]", "[1, 1, D, N]"]
    """Layout of the classifier's weight: N classes, D features."""
    kernel_layout: Literal["OIHW", "HWIO"]
    norm_layout: Literal["[C]", "[1, 1, 1, C]"] = "[C]"


NAMINGS: dict[NamingName, Naming] = {
    "bit_ray": Naming(
        root="root.weight",
        conv="stages.{stage}.{layer}.conv{n}.weight",
        proj="stages.{stage}.{layer}.proj.weight",
        norm="stages.{stage}.{layer}.gn{n}",
        last_norm="gn",
        affine=(".weight", ".bias"),
        head=("head.weight", "head.bias"),
        head_layout="[N, D]",
        kernel_layout="OIHW",
    ),
    "npz": Naming(
        root="resnet/root_block/standardized_conv2d/kernel",
        conv="resnet/block{block}/unit{unit:02d}/{part}/standardized_conv2d/kernel",
        proj="resnet/block{block}/unit{unit:02d}/a/proj/standardized_conv2d/kernel",
        norm="resnet/block{block}/unit{unit:02d}/{part}/group_norm",
        last_norm="resnet/group_norm",
        affine=("/gamma", "/beta"),
        head=("resnet/head/conv2d/kernel", "resnet/head/conv2d/bias"),
        head_layout="[1, 1, D, N]",
        kernel_layout="HWIO",
    ),
    "big_vision": Naming(
        root="root_block/conv_root/kernel",
        conv="block{block}/unit{unit:02d}/conv{n}/kernel",
        proj="block{block}/unit{unit:02d}/conv_proj/kernel",
        norm="block{block}/unit{unit:02d}/gn{n}",
        last_norm="norm-pre-head",
        affine=("/scale", "/bias"),
        head=("head/kernel", "head/bias"),
        head_layout="[D, N]",
        kernel_layout="HWIO",
        norm_layout="[1, 1, 1, C]",
    ),
    "timm": Naming(
        root="stem.conv.weight",
        conv="stages.{stage}.blocks.{layer}.conv{n}.weight",
        proj="stages.{stage}.blocks.{layer}.downsample.conv.weight",
        norm="stages.{stage}.blocks.{layer}.norm{n}",
        last_norm="norm",
        affine=(".weight", ".bias"),
        head=("head.fc.weight", "head.fc.bias"),
        head_layout="[N, D, 1, 1]",
        kernel_layout="OIHW",
    ),
    "huggingface": Naming(
        root="bit.embedder.convolution.weight",
        conv="bit.encoder.stages.{stage}.layers.{layer}.conv{n}.weight",
        proj="bit.encoder.stages.{stage}.layers.{layer}.downsample.conv.weight",
        norm="bit.encoder.stages.{stage}.layers.{layer}.norm{n}",
        last_norm="bit.norm",
        affine=(".weight", ".bias"),
        head=("classifier.1.weight", "classifier.1.bias"),
        head_layout="[N, D]",
        kernel_layout="OIHW",
    ),
    "bit_pytorch": Naming(
        root="root.conv.weight",
        conv="body.block{block}.unit{unit:02d}.conv{n}.weight",
        proj="body.block{block}.unit{unit:02d}.downsample.weight",
        norm="body.block{block}.unit{unit:02d}.gn{n}",
        last_norm="head.gn",
        affine=(".weight", ".bias"),
        head=("head.conv.weight", "head.conv.bias"),
        head_layout="[N, D, 1, 1]",
        kernel_layout="OIHW",
    ),
}
assert set(NAMINGS) == set(get_args(NamingName))


def check_bit(config: NetworkConfig, where: object) -> ResNetConfig:
    """Return the configuration of a network that other programs have names for: a BiT network.

    Args:
        config: Configuration of any network.
        where: What was to be read or written, for the error.

    Raises:
        ModelError: It is another network.
    """
    if not isinstance(config, ResNetConfig) or config.norm != "gn" or not config.standardize:
        raise ModelError(
            f"{where}: not a BiT ResNet with GroupNorm and Weight Standardization; accepted: such a network, because "
            "other programs have no names for others; save it as a package, or export it"
        )
    return config


def weight_names(naming: Naming, units: Collection[int]) -> dict[str, str]:
    """Return our name -> their name of every weight, including the classifier's, for the units of each stage."""
    ours = NAMINGS["bit_ray"]
    names = {ours.root: naming.root}
    norms = {ours.last_norm: naming.last_norm}
    for stage, num_units in enumerate(units):
        for layer in range(num_units):
            for n, part in enumerate("abc", start=1):
                position = _position(stage, layer) | {"n": n, "part": part}
                names[ours.conv.format(**position)] = naming.conv.format(**position)
                norms[ours.norm.format(**position)] = naming.norm.format(**position)
        names[ours.proj.format(**_position(stage, 0))] = naming.proj.format(**_position(stage, 0))
    for norm, theirs in norms.items():
        names |= {norm + a: theirs + b for a, b in zip(ours.affine, naming.affine, strict=True)}
    return names | dict(zip(ours.head, naming.head, strict=True))


def count_units(naming: Naming, names: Collection[str]) -> tuple[int, ...]:
    """Count the consecutive units of each of the four stages among the names of a file."""
    units = []
    for stage in range(4):
        layer = 0
        while naming.conv.format(**_position(stage, layer), n=1, part="a") in names:
            layer += 1
        units.append(layer)
    return tuple(units)


def to_ours(naming: Naming, name: str, tensor: Tensor) -> Tensor:
    """Return their weight in our layout; ``name`` is ours. A weight of another rank is not changed."""
    if name == "head.weight" and tensor.ndim == naming.head_layout.count(",") + 1:
        match naming.head_layout:
            case "[N, D, 1, 1]":
                return tensor.flatten(1)
            case "[D, N]":
                return tensor.mT
            case "[1, 1, D, N]":
                return tensor.squeeze((0, 1)).mT
    if tensor.ndim == 4 and is_kernel(name) and naming.kernel_layout == "HWIO":
        return tensor.permute(3, 2, 0, 1)
    if tensor.ndim == 4 and _is_norm(name) and naming.norm_layout == "[1, 1, 1, C]":
        return tensor.flatten()
    return tensor


def to_theirs(naming: Naming, name: str, tensor: Tensor) -> Tensor:
    """Return our weight in their layout; ``name`` is ours."""
    if name == "head.weight":
        match naming.head_layout:
            case "[N, D, 1, 1]":
                return tensor[..., None, None]
            case "[D, N]":
                return tensor.mT
            case "[1, 1, D, N]":
                return tensor.mT[None, None]
    if is_kernel(name) and naming.kernel_layout == "HWIO":
        return tensor.permute(2, 3, 1, 0)
    if _is_norm(name) and naming.norm_layout == "[1, 1, 1, C]":
        return tensor[None, None, None]
    return tensor


def is_kernel(name: str) -> bool:
    """Return whether our name is that of a convolution's kernel, all of which are standardized."""
    return not name.startswith("head.") and not _is_norm(name)


def _is_norm(name: str) -> bool:
    return "gn" in name


def _position(stage: int, layer: int) -> dict[str, int]:
    return {"stage": stage, "layer": layer, "block": stage + 1, "unit": layer + 1}
