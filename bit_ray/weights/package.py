"""A saved model: a directory with ``model.safetensors`` (the weights) and ``model.json`` (everything else).

``model.json`` has the digest of the weights and is written last, so a directory without it is not a model. Other files
may be in the same directory: a training checkpoint is such a package with the optimizer next to it.

The weights may be in several files, each with some of the tensors whole, as the workers of a training in shards write
them. Such a package is read as any other.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bit_ray.config import from_json, read_document, to_dict
from bit_ray.errors import ConfigError, ModelError
from bit_ray.locks import whole
from bit_ray.models.inputs import ResizeMode
from bit_ray.models.network import Network
from bit_ray.models.zoo import model_config
from bit_ray.weights.location import DESCRIPTION_FILE, check_folder
from bit_ray.weights.tensor_files import WEIGHTS_FILE, Weights, verify_weights, write_tensors

MAX_IMAGE_SIZE = 16384
"""Largest side of a network's view, pixels: such a view takes 0.8 GB."""
MAX_INPUT = 1000.0
"""Largest absolute pixel value after scaling; the widest range in use is 0 to 255."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A saved network's architecture, input and origin."""

    model: str
    """Name of the network, as `bit_ray.create_model` takes it."""
    num_classes: int
    """Outputs of the classifier."""
    class_names: tuple[str, ...]
    """One name for each output, in order; two may have the same, as some of ImageNet-21k do."""
    multi_label: bool
    """Scores are independent (sigmoid) rather than one distribution (softmax)."""
    resize_mode: ResizeMode
    """How an image is resized: see `bit_ray.data.images.resize.eval_view`."""
    resize_size: int
    """Shorter side after the resize, pixels; without effect for ``square``."""
    crop_size: int
    """Side of the square that the network sees, pixels."""
    input_range: tuple[float, float] = (-1.0, 1.0)
    """What pixel values 0 and 255 become (big_transfer#26)."""
    convert_images: bool = False
    """What is not 8-bit RGB is converted, as in training, or refused."""
    upright: bool = False
    """Images are turned as their EXIF orientation says, as in training."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """The settings of the training run, as plain data."""
    provenance: dict[str, str] = field(default_factory=dict)
    """Digests and names that tie the weights to their origin: manifest_digest, config_digest, code_revision, parent."""

    def __post_init__(self) -> None:
        for name in ("crop_size", "resize_size"):
            if getattr(self, name) > MAX_IMAGE_SIZE:
                raise ConfigError.of(name, getattr(self, name), f"at most {MAX_IMAGE_SIZE} pixels")
        least = model_config(self.model, self.num_classes).min_image_size
        if len(self.class_names) != self.num_classes:
            given = f"{len(self.class_names)} names for a head of {self.num_classes} classes"
            remedy = "correct num_classes or class_names"
            raise ConfigError.of("class_names", given, "one name for each class", remedy)
        if not all(self.class_names):
            given = f"name {self.class_names.index('')} is empty"
            raise ConfigError.of("class_names", given, "a name for each class", "add it")
        if self.crop_size < least:
            remedy = "the network halves its input five times"
            raise ConfigError.of("crop_size", self.crop_size, f"at least {least} pixels", remedy)
        if self.resize_mode == "shorter_side" and self.resize_size < self.crop_size:
            accepted, remedy = f"at least crop_size ({self.crop_size})", "a crop cannot be larger than the image"
            raise ConfigError.of("resize_size", self.resize_size, accepted, remedy)
        low, high = self.input_range
        if not -MAX_INPUT <= low < high <= MAX_INPUT:
            accepted = f"low < high, both from {-MAX_INPUT:g} to {MAX_INPUT:g}"
            raise ConfigError.of("input_range", self.input_range, accepted, "for example (-1.0, 1.0)")


@dataclass(frozen=True, kw_only=True)
class Description:
    """The content of ``model.json``."""

    format: Literal[1] = 1
    spec: ModelSpec
    weights: Weights


def save_package(directory: str | os.PathLike[str], model: Network, spec: ModelSpec) -> Weights:
    """Write the model and its description into a local directory, which is made if missing.

    Raises:
        ModelError: ``spec`` describes another network, or the directory is not writable.
        ConfigError: ``spec`` has a value that JSON cannot represent.
    """
    if model_config(spec.model, spec.num_classes) != model.config:
        raise ModelError(
            f"{directory}: the description says {spec.model} with {spec.num_classes} classes; accepted: one of the "
            f"model, {model.config}; pass the spec of this model"
        )
    try:
        return write_package(Path(directory), model.state_dict(), spec)
    except OSError as error:
        raise ModelError(f"{directory}: cannot be written ({error}); choose a writable directory") from None


def write_package(directory: Path, model: Mapping[str, Tensor], spec: ModelSpec) -> Weights:
    """Write the tensors of the network that ``spec`` describes, and its description.

    Raises:
        OSError: They cannot be written.
        ConfigError: ``spec`` has a value that JSON cannot represent.
    """
    _written(spec, None)  # what JSON or UTF-8 cannot represent is refused before any file is changed
    weights_path = directory / WEIGHTS_FILE
    directory.mkdir(parents=True, exist_ok=True)
    # While weights are being replaced, there must be no old description.
    (directory / DESCRIPTION_FILE).unlink(missing_ok=True)
    with whole(weights_path) as unfinished:
        write_tensors(unfinished, model)
    weights = Weights.of(weights_path)
    describe(directory, spec, weights)
    return weights


def describe(directory: Path, spec: ModelSpec, weights: Weights) -> None:
    """Write ``model.json`` next to the weights, with which the directory is a model.

    Raises:
        ConfigError: ``spec`` has a value that JSON cannot represent.
    """
    with whole(directory / DESCRIPTION_FILE) as unfinished:
        unfinished.write_bytes(_written(spec, weights))


def _written(spec: ModelSpec, weights: Weights | None) -> bytes:
    """Return what is written into ``model.json``; without parts as before there were any."""
    plain: dict[str, Any] = {"format": 1, "spec": to_dict(spec)}
    if weights is not None:
        plain["weights"] = {name: value for name, value in to_dict(weights).items() if name != "parts" or value}
    try:
        return (json.dumps(plain, indent=2, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError as error:
        raise ConfigError.of("spec", error, "text that UTF-8 can encode") from None


def parse_description(data: bytes, where: str) -> tuple[ModelSpec, Weights]:
    """Read the bytes of a ``model.json``; ``where`` names them in errors.

    Raises:
        ModelError: They are not a description that this version can read.
    """
    try:
        description = from_json(Description, data)
    except ConfigError as error:
        raise ModelError(f"{where}: not a model description ({error}); save the model again") from None
    return description.spec, description.weights


def read_spec(directory: str | os.PathLike[str]) -> tuple[ModelSpec, Weights]:
    """Read the description of a package.

    Raises:
        ModelError: There is no such directory, no model in it, or a description that cannot be read.
    """
    directory = Path(directory)
    check_folder(directory)
    path = directory / DESCRIPTION_FILE
    try:
        data = read_document(path)
    except FileNotFoundError:
        raise ModelError(
            f"{directory}: no {DESCRIPTION_FILE} in it; accepted: the directory of a saved model; check the path"
        ) from None
    except OSError as error:
        given = f"cannot be read ({error.strerror})"
        raise ModelError(f"{path}: {given}; accepted: a readable file; check its permissions") from None
    return parse_description(data, str(path))


def load_package(directory: str | os.PathLike[str]) -> tuple[Network, ModelSpec]:
    """Load a package onto the CPU, in evaluation mode, after verifying the size and digest of its weights.

    Raises:
        ModelError: The package is missing, damaged, or its weights do not fit its description.
    """
    directory = Path(directory)
    spec, weights = read_spec(directory)
    verify_weights(directory, weights.files)
    tensors: dict[str, Tensor] = {}
    for file in weights.files:
        path = directory / file.file
        try:
            found = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path}: not a safetensors file ({error}); save the model again") from None
        if twice := tensors.keys() & found.keys():
            raise ModelError(f"{path}: {min(twice)!r} is in another part as well; save the model again")
        tensors |= found
    path = directory / weights.file
    # The network uses the loaded tensors themselves: nothing is initialised only to be overwritten.
    with torch.device("meta"):
        model = model_config(spec.model, spec.num_classes).build()
    _check_tensors(path, tensors, model, spec)
    model.load_state_dict(tensors, assign=True)
    return model.eval(), spec


def _check_tensors(path: Path, tensors: dict[str, Tensor], model: Network, spec: ModelSpec) -> None:
    expected = model.state_dict()
    for kind, odd in (("lacks", expected.keys() - tensors.keys()), ("has the unexpected", tensors.keys() - expected)):
        if odd:
            more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
            raise ModelError(
                f"{path}: {kind} {min(odd)!r}{more}; accepted: exactly the {len(expected)} tensors of {spec.model}; "
                f"save the model again"
            )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape or not tensor.is_floating_point():
            raise ModelError(
                f"{path}: {name} is {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}; accepted: "
                f"{list(expected[name].shape)} floating point, as in {spec.model} with {spec.num_classes} classes; "
                f"save the model again"
            )
