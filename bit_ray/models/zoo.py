"""The networks by name: the published sizes, and a free form for small ones.

``R50x1`` is a depth and a width; ``R1-1-1-1x0.5`` has the units of each stage instead of the depth. Suffixes replace
BiT's GroupNorm and Weight Standardization (paper §4.3), in this order: ``-bn`` BatchNorm over groups of a worker's
images, ``-syncbn`` BatchNorm over the whole batch of all workers; ``-nows`` no Weight Standardization. So the four
networks of the paper's Table 4 are ``R50x1``, ``R50x1-nows``, ``R50x1-bn`` and ``R50x1-bn-nows``.
"""

import re

from bit_ray.errors import ConfigError, brief, did_you_mean
from bit_ray.models.network import Network, NetworkConfig
from bit_ray.models.resnet import Norm, ResNetConfig

# big_transfer:bit_pytorch/models.py; R26 is big_vision:models/bit.py's.
_UNITS: dict[str, tuple[int, ...]] = {
    "26": (2, 2, 2, 2),
    "50": (3, 4, 6, 3),
    "101": (3, 4, 23, 3),
    "152": (3, 8, 36, 3),
}

PUBLISHED = ("R26x1", "R50x1", "R50x3", "R101x1", "R101x3", "R152x1", "R152x2", "R152x4")
"""Sizes of the paper and of the authors' code; R152x4 is the default of BiT-L."""

_RESNET = re.compile(
    r"R(?P<units>[0-9]+|[0-9]+-[0-9]+-[0-9]+-[0-9]+)x(?P<width>[0-9]+(?:\.[0-9]+)?)(?:-(?P<norm>bn|syncbn))?(?P<plain>-nows)?"
)
_LONGEST_NAME = 64


def model_config(name: str, num_classes: int) -> NetworkConfig:
    """Return the configuration of a name such as ``R50x1``, ``R1-1-1-1x0.5`` or ``R50x1-bn-nows``.

    Raises:
        ConfigError: An unknown name, or a depth, width or number of classes that cannot be built or is out of bounds.
    """
    name = name if isinstance(name, str) else str(name)
    config = _resnet(name, num_classes) if len(name) <= _LONGEST_NAME else None
    if config is None:
        hint = did_you_mean(name[:_LONGEST_NAME], PUBLISHED)
        own = "units and width as in R1-1-1-1x0.5, with -bn or -syncbn and -nows at the end"
        accepted = f"{', '.join(PUBLISHED)}, or {own}{hint}"
        raise ConfigError.of("model", f"unknown name {brief(name)}", accepted, "choose one")
    return config


def _resnet(name: str, num_classes: int) -> ResNetConfig | None:
    """Return the configuration of a ResNet; None for another name."""
    match = _RESNET.fullmatch(name)
    if match is None or ("-" not in match["units"] and match["units"] not in _UNITS):
        return None
    units = _UNITS.get(match["units"]) or tuple(int(count) for count in match["units"].split("-"))
    norms: dict[str | None, Norm] = {None: "gn", "bn": "bn", "syncbn": "syncbn"}
    try:
        return ResNetConfig(
            units=units,
            width=float(match["width"]),
            num_classes=num_classes,
            norm=norms[match["norm"]],
            standardize=match["plain"] is None,
        )
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}").about("model") from None


def model_name(units: tuple[int, ...], width: float, norm: Norm = "gn", *, standardize: bool = True) -> str:
    """Return the name of a ResNet, with the published depth if there is one: the inverse of `model_config`."""
    depths = {known: depth for depth, known in _UNITS.items()}
    size = f"R{depths.get(units, '-'.join(map(str, units)))}x{width:g}"
    return size + ("" if norm == "gn" else f"-{norm}") + ("" if standardize else "-nows")


def create_model(name: str, num_classes: int) -> Network:
    """Return a freshly initialised network with a zero head; see `model_config` for names and errors."""
    return model_config(name, num_classes).build()
