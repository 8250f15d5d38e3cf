"""Class names and preprocessing in the folders of timm and Hugging Face, read and written."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bit_ray.errors import ModelError, brief
from bit_ray.models.resnet import ResNetConfig
from bit_ray.weights.class_names import class_names, in_order, read_text
from bit_ray.weights.location import CONFIG_FILE
from bit_ray.weights.package import ModelSpec

PROCESSOR_FILE = "preprocessor_config.json"

# Settings of Hugging Face's BitConfig that make another network of the same weights, with BiT's values.
_HUGGINGFACE_BIT: dict[str, Any] = {
    "layer_type": "preactivation",
    "global_padding": None,
    "embedding_dynamic_padding": False,
    "num_groups": 32,
    "hidden_act": "relu",
    "output_stride": 32,
    "num_channels": 3,
}
# timm:models/resnetv2.py registers these; other depths and widths need its ResNetV2 class.
_TIMM_MODELS = ("R50x1", "R50x3", "R101x1", "R101x3", "R152x2", "R152x4")
_BILINEAR = 2  # Pillow's number
_LARGEST_STATISTIC = 1e6  # of a mean or deviation; pixels are in 0..1 or 0..255


def folder_spec(path: Path) -> dict[str, Any]:
    """Return the content of ``config.json`` and its companion files, as fields of `ModelSpec`.

    Raises:
        ModelError: The folder has no ``config.json``, or one of a network that is not BiT.
    """
    config_path = path / CONFIG_FILE
    config = _read(config_path)
    if config is None:
        accepted = "a folder of timm's or Hugging Face's BiT"
        raise ModelError(f"{path}: no {CONFIG_FILE}; accepted: {accepted}; check the path")
    try:
        if config.get("model_type") == "bit":
            return _from_huggingface(config_path, config, _read(path / PROCESSOR_FILE) or {})
        if str(config.get("architecture")).startswith("resnetv2_"):
            return _from_timm(config_path, config)
        kind = config.get("model_type") or config.get("architecture") or "unknown"
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ModelError(f"{config_path}: {reason}; accepted: the config of a BiT model; correct it") from None
    raise ModelError(f"{config_path}: model {brief(kind)}; accepted: BiT of timm or Hugging Face; use such a folder")


def huggingface_files(spec: ModelSpec, network: ResNetConfig) -> dict[str, dict[str, Any]]:
    """Return file name -> content, for ``BitForImageClassification`` and ``BitImageProcessor``."""
    root, *outputs = network.channels
    config = _HUGGINGFACE_BIT | {
        "model_type": "bit",
        "architectures": ["BitForImageClassification"],
        "depths": list(network.units),
        "embedding_size": root,
        "hidden_sizes": outputs,
        "width_factor": 1,  # the sizes above include it: BitForImageClassification does not widen all of its layers
        "drop_path_rate": 0.0,
        "id2label": {str(index): name for index, name in enumerate(spec.class_names)},
        "label2id": {name: index for index, name in enumerate(spec.class_names)},
        "problem_type": "multi_label_classification" if spec.multi_label else "single_label_classification",
    }
    mean, std = _mean_std(spec)
    crop = {"height": spec.crop_size, "width": spec.crop_size}
    square = spec.resize_mode == "square"
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": crop if square else {"shortest_edge": spec.resize_size},
        "resample": _BILINEAR,
        "do_center_crop": not square,
        "crop_size": crop,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [mean] * 3,
        "image_std": [std] * 3,
        "do_convert_rgb": True,
    }
    return {CONFIG_FILE: config, PROCESSOR_FILE: processor}


def timm_files(spec: ModelSpec, network: ResNetConfig) -> dict[str, dict[str, Any]]:
    """Return file name -> content, for ``timm.create_model("local-dir:...", pretrained=True)``."""
    mean, std = _mean_std(spec)
    square = spec.resize_mode == "square"
    pretrained = {
        "num_classes": spec.num_classes,
        "input_size": [3, spec.crop_size, spec.crop_size],
        "crop_pct": 1.0 if square else spec.crop_size / spec.resize_size,
        "crop_mode": "squash" if square else "center",
        "interpolation": "bilinear",
        "mean": [mean] * 3,
        "std": [std] * 3,
        "first_conv": "stem.conv",
        "classifier": "head.fc",
    }
    config = {
        "architecture": timm_name(spec.model) or f"resnetv2_{spec.model.lower()}_bit",
        "num_classes": spec.num_classes,
        "num_features": network.channels[-1],
        "label_names": list(spec.class_names),
        "pretrained_cfg": pretrained,
    }
    return {CONFIG_FILE: config}


def timm_name(model: str) -> str:
    """Return timm's name of a network, empty if it has none."""
    return f"resnetv2_{model[1:]}_bit" if model in _TIMM_MODELS else ""


def _from_huggingface(config_path: Path, config: Mapping[str, Any], processor: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in _HUGGINGFACE_BIT.items():
        if config.get(name, value) != value:
            raise ModelError(
                f"{config_path}: {name}: {brief(config[name])}; accepted: {value!r}, as in BiT; these weights are "
                "of another network"
            )
    spec: dict[str, Any] = {}
    names = in_order(config.get("id2label", {}))
    if names and names != [f"LABEL_{index}" for index in range(len(names))]:  # the default without names
        spec["class_names"] = class_names(names, f"{config_path}: id2label")
    if config.get("problem_type") is not None:
        spec["multi_label"] = config["problem_type"] == "multi_label_classification"
    processor_path = config_path.with_name(PROCESSOR_FILE)
    size, crop = processor.get("size", {}), processor.get("crop_size", {})
    if "shortest_edge" in size:
        resize = _side(processor_path, "size", size["shortest_edge"])
        side = _side(processor_path, "crop_size", crop["height"]) if processor.get("do_center_crop", True) else resize
        spec |= {"resize_mode": "shorter_side", "resize_size": max(resize, side), "crop_size": side}
    elif "height" in size:
        side = _side(processor_path, "size", size["height"])
        spec |= {"resize_mode": "square", "resize_size": side, "crop_size": side}
    return spec | _input_range(processor_path, processor.get("image_mean"), processor.get("image_std"))


def _from_timm(config_path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    about = {**config, **config.get("pretrained_cfg", {})}
    spec: dict[str, Any] = {}
    if names := about.get("label_names"):
        names = in_order(names) if isinstance(names, dict) else names
        described = about.get("label_descriptions") or {}
        spec["class_names"] = class_names((described.get(name, name) for name in names), f"{config_path}: label_names")
    if "input_size" in about:
        crop = _side(config_path, "input_size", about["input_size"][-1])
        square = about.get("crop_mode") == "squash"
        share = about.get("crop_pct", 0.875)
        if not isinstance(share, (int, float)) or not 0.01 <= share <= 1:
            raise ModelError(
                f"{config_path}: crop_pct: {brief(share)}; accepted: a share, for example 0.875; correct it"
            )
        # timm rounds down; the small number is for quotients such as 224 / (224 / 256), slightly below 256.
        resize = crop if square else math.floor(crop / share + 1e-6)
        mode = "square" if square else "shorter_side"
        spec |= {"resize_mode": mode, "resize_size": resize, "crop_size": crop}
    return spec | _input_range(config_path, about.get("mean"), about.get("std"))


def _mean_std(spec: ModelSpec) -> tuple[float, float]:
    low, high = spec.input_range
    return -low / (high - low), 1 / (high - low)


def _input_range(config_path: Path, mean: Any, std: Any) -> dict[str, Any]:
    """Return the range of pixels after ``(x / 255 - mean) / std``; ours is the same for all channels."""
    if mean is None or std is None:
        return {}
    numbers = [*mean, *std]
    if not mean or not std or not all(type(x) in (int, float) and abs(x) <= _LARGEST_STATISTIC for x in numbers):
        raise ModelError(f"{config_path}: mean {brief(mean)}, std {brief(std)}; accepted: lists of numbers; correct it")
    if len({*mean}) != 1 or len({*std}) != 1:
        raise ModelError(
            f"{config_path}: mean {list(mean)}, std {list(std)}; accepted: one value for all channels, 0.5 in BiT; "
            f"these weights are for another input"
        )
    if std[0] < 1 / _LARGEST_STATISTIC:
        raise ModelError(f"{config_path}: std {std[0]}; accepted: a positive number, 0.5 in BiT; correct it")
    return {"input_range": ((0 - mean[0]) / std[0], (1 - mean[0]) / std[0])}


def _side(config_path: Path, name: str, value: Any) -> int:
    """Return a number of pixels; `ModelSpec` checks its range."""
    if type(value) is not int:
        raise ModelError(f"{config_path}: {name}: {brief(value)}; accepted: a whole number of pixels; correct it")
    return value


def _read(config_path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(read_text(config_path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{config_path}: cannot be read ({error}); fetch the folder again") from None
    if not isinstance(content, dict):
        raise ModelError(f"{config_path}: not a JSON object; accepted: a model's settings; fetch the folder again")
    return content
