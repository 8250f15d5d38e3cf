"""The networks by name: the published sizes, and a free form for small ones.

``R50x1`` is a depth and a width; ``R1-1-1-1x0.5`` spells out the units of each stage instead of the depth.
"""

import difflib
import re

from bit_ray.errors import ConfigError, brief
from bit_ray.models.resnet import ResNetConfig, ResNetV2

# big_transfer:bit_pytorch/models.py; R26 is big_vision:models/bit.py's.
_UNITS: dict[str, tuple[int, ...]] = {
    "26": (2, 2, 2, 2),
    "50": (3, 4, 6, 3),
    "101": (3, 4, 23, 3),
    "152": (3, 8, 36, 3),
}

PUBLISHED = ("R26x1", "R50x1", "R50x3", "R101x1", "R101x3", "R152x1", "R152x2", "R152x4")
"""Sizes of the paper and of the authors' code; R152x4 is the default of BiT-L."""

_NAME = re.compile(r"R([0-9]+|[0-9]+-[0-9]+-[0-9]+-[0-9]+)x([0-9]+(?:\.[0-9]+)?)")
_LONGEST_NAME = 64


def model_config(name: str, num_classes: int) -> ResNetConfig:
    """Return the configuration of a name such as ``R50x1`` or ``R1-1-1-1x0.5``.

    Raises:
        ConfigError: an unknown name, or a depth, width or number of classes that cannot be built or is out of bounds.
    """
    name = name if isinstance(name, str) else str(name)
    match = _NAME.fullmatch(name) if len(name) <= _LONGEST_NAME else None
    if match is None or ("-" not in match[1] and match[1] not in _UNITS):
        nearest = difflib.get_close_matches(name[:_LONGEST_NAME], PUBLISHED, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise ConfigError(
            f"model: unknown name {brief(name)}; accepted: {', '.join(PUBLISHED)}, or units and width as in "
            f"R1-1-1-1x0.5{hint}"
        )
    units = _UNITS.get(match[1]) or tuple(int(count) for count in match[1].split("-"))
    try:
        return ResNetConfig(units=units, width=float(match[2]), num_classes=num_classes)
    except ConfigError as error:
        raise ConfigError(f"model {name}: {error}") from None


def model_name(units: tuple[int, ...], width: float) -> str:
    """Return the name of a depth and width, the published one where there is one: the inverse of `model_config`."""
    depths = {known: depth for depth, known in _UNITS.items()}
    return f"R{depths.get(units, '-'.join(map(str, units)))}x{width:g}"


def create_model(name: str, num_classes: int) -> ResNetV2:
    """Return a freshly initialised network with a zero head; see `model_config` for names and errors."""
    return ResNetV2(model_config(name, num_classes))
