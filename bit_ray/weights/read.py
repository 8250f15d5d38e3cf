"""BiT weights of other programs: detects the format of a file or folder, and renames its weights to our names.

It reads the authors' ``.npz``, big_vision's ``.npz``, and state dicts of timm, Hugging Face transformers, the authors'
PyTorch code and bit_ray, as ``.safetensors`` or as PyTorch files. A folder of timm or Hugging Face also has class names
and preprocessing. PyTorch files are read with ``weights_only``: code in them never runs.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bit_ray.config import from_dict
from bit_ray.errors import ConfigError, ModelError, brief
from bit_ray.models.network import Network
from bit_ray.models.zoo import model_config, model_name
from bit_ray.store import file_sha256
from bit_ray.weights.class_names import read_text
from bit_ray.weights.folders import folder_spec
from bit_ray.weights.location import PROGRAM_SUFFIXES, SUFFIXES, check_file
from bit_ray.weights.naming import NAMINGS, NamingName, count_units, to_ours, weight_names
from bit_ray.weights.npz import npz_architecture, npz_tensors, read_arrays, read_headers
from bit_ray.weights.package import ModelSpec
from bit_ray.weights.state_dicts import read_tensors

SPEC_KEY = "bit_ray.spec"
"""Entry of a file's metadata that has our `ModelSpec` as JSON."""

_FOLDER_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
# Prefixes that wrappers of a network add to its names.
_PREFIXES = ("module.", "_orig_mod.", "model.")
_MOST_PREFIXES = 6
# Where a big_vision checkpoint keeps them (big_vision:utils.py, load_params).
_BIG_VISION_PREFIXES = ("params/", "opt/target/", "")


@dataclass(frozen=True, kw_only=True)
class ForeignWeights:
    """The weights of a BiT network as another program stored them, under our names."""

    path: str
    """Path of the file or folder."""
    naming: NamingName
    """The program whose names they had."""
    model: str
    """Name of the network."""
    num_classes: int
    """Outputs of the classifier; 0 if there is none."""
    tensors: Mapping[str, Tensor]
    """Tensors by our names, float32."""
    sha256: str
    """Digest of the file; for several files, of their digests."""
    spec: Mapping[str, Any] = field(default_factory=dict)
    """Other information in the file or folder, as fields of `ModelSpec`."""


def read_weights(path: str | os.PathLike[str]) -> ForeignWeights:
    """Read the weights in a file or folder of any of the formats.

    Raises:
        ModelError: It is missing, damaged, unsafe to read or not a BiT network; the message says which.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if path.suffix in PROGRAM_SUFFIXES:
        remedy = "use the model that it was made from"
        raise ModelError(f"{path}: an exported program; accepted: {', '.join(SUFFIXES)}; {remedy}")
    if path.suffix not in SUFFIXES:
        raise ModelError(
            f"{path}: {'unknown kind of file' if path.is_file() else 'no such file or folder'}; accepted: "
            f"{', '.join(SUFFIXES)}, or a folder with config.json; check the path"
        )
    check_file(path)
    if path.suffix == ".npz":
        return _read_npz(path)
    tensors, metadata = read_tensors(path)
    spec: Mapping[str, Any] = {}
    if SPEC_KEY in metadata:
        try:
            spec = vars(from_dict(ModelSpec, json.loads(metadata[SPEC_KEY])))
        except (ValueError, RecursionError) as error:  # ConfigError is one of them
            raise ModelError(f"{path}: metadata {SPEC_KEY}: {error}; save the model again") from None
    return _to_ours(path, tensors, _sha256([path]), spec)


def _read_folder(path: Path) -> ForeignWeights:
    spec = folder_spec(path)
    found = next((path / name for name in _FOLDER_FILES if (path / name).is_file()), None)
    if found is None:
        raise ModelError(f"{path}: no weights; accepted: one of {', '.join(_FOLDER_FILES)}; fetch the folder again")
    files = [found]
    if found.name.endswith(".index.json"):
        files = [path / name for name in _parts(found)]
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= read_tensors(file)[0]
    weights = _to_ours(path, tensors, _sha256(files), spec)
    names = spec.get("class_names")
    if names is not None and len(names) != weights.num_classes > 0:
        raise ModelError(
            f"{path / 'config.json'}: {len(names)} class names for a head of {weights.num_classes} classes; accepted: "
            f"one for each; correct it"
        )
    return weights


def _parts(index: Path) -> list[str]:
    """Return the files that an index names, all of which are next to it."""
    try:
        names = {*json.loads(read_text(index))["weight_map"].values()}
        if not names:
            raise ValueError("it names no file")
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors") or not name.isprintable():
                raise ValueError(f"it names {brief(name)}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ModelError(
            f"{index}: {reason}; accepted: a weight_map from tensors to .safetensors files in this folder; fetch the "
            "folder again"
        ) from None
    return sorted(names)


def _read_npz(path: Path) -> ForeignWeights:
    names = _npz_members(path)
    naming = NAMINGS["big_vision"]
    prefix = next((prefix for prefix in _BIG_VISION_PREFIXES if prefix + naming.root in names), None)
    if prefix is None:
        if any(name.endswith("conv_root/kernel") for name in names):
            raise ModelError(
                f"{path}: a ResNet-v1 of big_vision (models/bit.py); accepted: BiT (models/bit_paper.py); use weights "
                "of BiT"
            )
        units, width, num_classes = npz_architecture(path)
        name = model_name(units, width)
        return ForeignWeights(
            path=str(path),
            naming="npz",
            model=name,
            num_classes=num_classes,
            tensors=npz_tensors(_on_meta(path, name, num_classes), path, head="load" if num_classes else "zero"),
            sha256=_sha256([path]),
        )
    # The optimizer's state is next to the weights, and has the same names.
    held = {name for name in read_headers(path, prefix) if prefix or not name.startswith("opt/")}
    tensors = {}
    for name, array in read_arrays(path, held).items():
        try:
            if array.dtype == np.dtype("V2"):  # how NumPy stores bfloat16
                tensors[name[len(prefix) :]] = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
            else:
                tensors[name[len(prefix) :]] = torch.from_numpy(array)
        except (TypeError, ValueError) as error:
            reason = f"{brief(name)} is {brief(str(array.dtype))}: {' '.join(str(error).split())[:100]}"
            raise ModelError(f"{path}: damaged .npz file ({reason}); download or write it again") from None
    return _to_ours(path, tensors, _sha256([path]), {})


def _npz_members(path: Path) -> set[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except Exception as error:  # it fails on other bytes in any way
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{path}: not an .npz file, or truncated ({reason}); download or write it again") from None


def _on_meta(path: Path, name: str, num_classes: int) -> Network:
    """Make a file's network without allocating memory, if its size is within the bounds of a network."""
    try:
        config = model_config(name, max(num_classes, 1))
    except ConfigError as error:
        raise ModelError(f"{path}: {error}") from None
    with torch.device("meta"):
        return config.build()


def _to_ours(path: Path, tensors: dict[str, Tensor], digest: str, spec: Mapping[str, Any]) -> ForeignWeights:
    tensors = _without_prefix(tensors)
    naming_name = _detect(path, tensors)
    naming = NAMINGS[naming_name]
    units = count_units(naming, tensors)
    root = tensors[naming.root]
    if min(units) == 0 or root.ndim != 4:
        raise ModelError(
            f"{path}: {naming.root} {brief(list(root.shape))}, units {'-'.join(map(str, units))}; accepted: a kernel "
            f"of four dimensions and four stages of units; use a complete BiT file"
        )
    width = root.shape[-1 if naming.kernel_layout == "HWIO" else 0] / 64
    name = model_name(units, width)
    num_classes = tensors[naming.head[1]].numel() if naming.head[1] in tensors else 0
    shapes = {k: v.shape for k, v in _on_meta(path, name, num_classes).named_parameters()}
    names = weight_names(naming, units)
    if not any(name in tensors for name in naming.head):
        names = {ours: theirs for ours, theirs in names.items() if not ours.startswith("head.")}
    for kind, odd in (
        ("lacks", set(names.values()) - set(tensors)),
        ("has the unexpected", set(tensors) - {*names.values()}),
    ):
        if odd:
            more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
            raise ModelError(
                f"{path}: {kind} {brief(min(odd))}{more}; accepted: exactly the {len(names)} weights of {name} as "
                f"{_OWNERS[naming_name]} names them; this is another network, or a part of one"
            )
    ours = {}
    for our_name, their_name in names.items():
        held = tensors[their_name]
        tensor = to_ours(naming, our_name, held)
        if tensor.shape != shapes[our_name] or not tensor.is_floating_point() or "float4" in str(tensor.dtype):
            raise ModelError(
                f"{path}: {their_name} is {brief(list(held.shape))} {str(held.dtype).removeprefix('torch.')}; "
                f"accepted: {list(shapes[our_name])} floating point, as in {name} in PyTorch's layout; use a complete "
                "BiT file"
            )
        ours[our_name] = tensor.float().contiguous()
    return ForeignWeights(
        path=str(path),
        naming=naming_name,
        model=name,
        num_classes=num_classes,
        tensors=ours,
        sha256=digest,
        spec=spec,
    )


_OWNERS: dict[NamingName, str] = {
    "bit_ray": "bit_ray",
    "npz": "the authors' npz",
    "big_vision": "big_vision",
    "timm": "timm",
    "huggingface": "Hugging Face",
    "bit_pytorch": "the authors' PyTorch code",
}


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for _ in range(_MOST_PREFIXES):
        prefix = next((p for p in _PREFIXES if tensors and all(name.startswith(p) for name in tensors)), "")
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if "embedder.convolution.weight" in tensors:  # Hugging Face's BitModel, without a classifier
        tensors = {f"bit.{name}": tensor for name, tensor in tensors.items()}
    return tensors


def _detect(path: Path, names: Collection[str]) -> NamingName:
    if any(name.endswith("running_mean") for name in names):
        accepted = "BiT, with group normalization"
        raise ModelError(f"{path}: a network with batch normalization; accepted: {accepted}; use BiT weights")
    for naming_name, naming in NAMINGS.items():
        if naming.root in names:
            return naming_name
    some = ", ".join(brief(name)[1:-1] for name in sorted(names)[:3]) or "nothing"
    raise ModelError(
        f"{path}: has {some}...; accepted: the weights of BiT as the authors, big_vision, timm (resnetv2_*_bit) or "
        f"Hugging Face (BitForImageClassification) name them; use such a file"
    )


def _sha256(files: list[Path]) -> str:
    digests = [file_sha256(path) for path in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
