"""A network made of the weights of another program, and the settings to classify images with it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from bit_ray.errors import ConfigError, ModelError
from bit_ray.models.network import Network
from bit_ray.models.zoo import model_config
from bit_ray.weights.class_names import label_names
from bit_ray.weights.package import ModelSpec
from bit_ray.weights.read import ForeignWeights


def build_network(
    weights: ForeignWeights, num_classes: int | None = None, *, head: Literal["load", "zero"] = "load"
) -> Network:
    """Make the network from some weights.

    Args:
        weights: From `read_weights`; the network shares their memory.
        num_classes: Outputs wanted; by default as many as the file has.
        head: ``load`` takes the file's classifier; ``zero`` makes a new one of zeros, for transfer (paper §4.1).

    Raises:
        ModelError: ``load``, and the file has no classifier or one of another size.
        ConfigError: ``head`` has another value.
    """
    if head not in ("load", "zero"):
        raise ConfigError.of("head", repr(head), "'load' or 'zero'", "choose one")
    wanted = num_classes if num_classes is not None else weights.num_classes
    if head == "load" and (wanted != weights.num_classes or wanted == 0):
        held = f"a head of {weights.num_classes} classes" if weights.num_classes else "no head"
        raise ModelError(
            f"{weights.path}: {held}; accepted: {f'a head of {wanted} classes' if wanted else 'a head'}; pass "
            f"head='zero' and num_classes for a new head of zeros, or fine-tune the weights on your classes (--init)"
        )
    with torch.device("meta"):
        model = model_config(weights.model, max(wanted, 1)).build()
    tensors = dict(weights.tensors)
    if head == "zero":
        tensors |= {name: torch.zeros(model.get_parameter(name).shape) for name in ("head.weight", "head.bias")}
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def foreign_spec(
    weights: ForeignWeights, labels: str | Sequence[str] = "", crop_size: int = 0, *, features_only: bool = False
) -> ModelSpec:
    """Return the settings that are needed to classify images with some weights.

    Settings that their folder does not give are taken from the published files' names (``-ILSVRC2012``: squares of 480
    pixels, ``-CIFAR10``: of 128, big_transfer:bit_hyperrule.py). Otherwise they are those of the upstream evaluation:
    shorter side 256, centre crop 224. A head of 21843 classes has independent scores (big_transfer#26).

    Args:
        weights: From `read_weights`.
        labels: Class names, or a file of them; see `bit_ray.weights.class_names.label_names`.
        crop_size: Side of the square that images are resized to, pixels; 0: as said above.
        features_only: Describe a network with a head of one output instead, which needs no class names.

    Raises:
        ModelError: There is no classifier, or no names for its outputs.
        ConfigError: ``crop_size`` is too small.
    """
    if not weights.num_classes and not features_only:
        remedy = "fine-tune the weights on your classes (--init)"
        raise ModelError(f"{weights.path}: no head; accepted: weights with a head; {remedy}")
    name = Path(weights.path).name
    square = 480 if "ILSVRC2012" in name else 128 if "CIFAR10" in name else 0
    fields: dict[str, Any] = {
        "resize_mode": "square" if square else "shorter_side",
        "resize_size": square or 256,
        "crop_size": square or 224,
        "multi_label": weights.num_classes == 21843,
        "provenance": {"parent": name, "parent_digest": weights.sha256},
    }
    fields |= weights.spec
    if crop_size:
        fields |= {"resize_mode": "square", "resize_size": crop_size, "crop_size": crop_size}
    if features_only:
        fields["class_names"] = ("none",)
    elif labels or "class_names" not in fields:
        fields["class_names"] = label_names(weights.num_classes, labels, model=weights.path)
    return ModelSpec(**fields | {"model": weights.model, "num_classes": 1 if features_only else weights.num_classes})
