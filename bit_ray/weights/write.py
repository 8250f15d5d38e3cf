"""A network's weights for other programs: the authors' ``.npz``, one safetensors file, or a folder for timm or Hugging
Face, with class names and preprocessing if the format supports them.

Kernels are written raw, as all of these programs keep them. timm and transformers add 1e-8 to the variance of a kernel;
the authors and we add 1e-10. `eps_effect` says how much that matters, and ``rescale`` undoes it.
"""

import json
import os
from pathlib import Path
from typing import Literal

from torch import Tensor

from bit_ray.config import to_dict
from bit_ray.errors import ConfigError, ModelError
from bit_ray.locks import whole
from bit_ray.models.network import Network
from bit_ray.weights.folders import huggingface_files, timm_files
from bit_ray.weights.location import CONFIG_FILE
from bit_ray.weights.naming import NAMINGS, check_bit, is_kernel, to_theirs, weight_names
from bit_ray.weights.npz import save_npz
from bit_ray.weights.package import ModelSpec, save_package
from bit_ray.weights.read import SPEC_KEY
from bit_ray.weights.tensor_files import write_tensors

WeightFormat = Literal["package", "npz", "safetensors", "timm", "huggingface"]

_OUR_EPS, _THEIR_EPS = 1e-10, 1e-8


def write_weights(
    model: Network, spec: ModelSpec, path: str | os.PathLike[str], to: WeightFormat, *, rescale: bool = False
) -> None:
    """Write a network's weights in the format of another program, or as a saved model (``package``).

    Args:
        model: The network.
        spec: Its description; class names and preprocessing are written if the format supports them.
        path: A file for ``npz`` and ``safetensors``; else a new or empty folder.
        to: The format.
        rescale: timm and Hugging Face only: multiply all kernels by 10. Standardization undoes that, and their 1e-8
            then has the effect of our 1e-10: the same function even where kernels are tiny. But further training has
            another effective learning rate.

    Raises:
        ModelError: ``path`` cannot be written, or is not empty; or the network has BatchNorm or no Weight
            Standardization, which only a ``package`` supports.
        ConfigError: ``rescale`` with another format.
    """
    path = Path(path)
    folder = to in ("package", "timm", "huggingface")
    if rescale and to not in ("timm", "huggingface"):
        accepted = "on with timm and huggingface, which have another eps"
        raise ConfigError.of("rescale", f"on with {to}", accepted, "turn it off")
    if folder and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ModelError(f"{path}: not an empty folder; accepted: a new or empty one; choose another")
    if to == "package":
        save_package(path, model, spec)
        return
    network = check_bit(model.config, path)
    if to == "npz":
        if path.suffix != ".npz":
            raise ModelError(f"{path}: not the name of an .npz file; accepted: {path.with_suffix('.npz')}; rename it")
        save_npz(model, path)
    else:
        tensors = named_tensors(model, "bit_ray" if to == "safetensors" else to, 10 if rescale else 1)
        try:
            if to == "safetensors":
                _write_file(tensors, spec, path)
            else:
                path.mkdir(parents=True, exist_ok=True)
                with whole(path / "model.safetensors") as unfinished:
                    write_tensors(unfinished, tensors)
                files = (huggingface_files if to == "huggingface" else timm_files)(spec, network)
                # The file that makes the folder a model comes last.
                for name in sorted(files, key=lambda name: name == CONFIG_FILE):
                    text = json.dumps(files[name], indent=2, ensure_ascii=False) + "\n"
                    with whole(path / name) as unfinished:
                        unfinished.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ModelError(f"{path}: cannot be written ({error}); choose a writable folder") from None


def named_tensors(
    model: Network, naming: Literal["bit_ray", "timm", "huggingface", "big_vision", "bit_pytorch"], scale: float = 1
) -> dict[str, Tensor]:
    """Return a network's weights under the names and in the layout of another program, kernels times ``scale``."""
    names = weight_names(NAMINGS[naming], check_bit(model.config, naming).units)
    tensors = {}
    for ours, tensor in model.state_dict().items():
        tensor = tensor.detach().cpu()
        if scale != 1 and is_kernel(ours):
            tensor = tensor * scale
        tensors[names[ours]] = to_theirs(NAMINGS[naming], ours, tensor).contiguous()
    return tensors


def eps_effect(model: Network) -> float:
    """Return the largest relative change of a standardized filter by an eps of 1e-8 instead of 1e-10."""
    largest = 0.0
    for name, weight in model.state_dict().items():
        if is_kernel(name):
            variance = weight.double().flatten(1).var(dim=1, correction=0)
            largest = max(largest, (1 - ((variance + _OUR_EPS) / (variance + _THEIR_EPS)).sqrt()).max().item())
    return largest


def _write_file(tensors: dict[str, Tensor], spec: ModelSpec, path: Path) -> None:
    if path.suffix != ".safetensors":
        accepted = path.with_suffix(".safetensors")
        raise ModelError(f"{path}: not the name of a .safetensors file; accepted: {accepted}; rename it")
    metadata = {"format": "pt", SPEC_KEY: json.dumps(to_dict(spec), ensure_ascii=False)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as unfinished:
        write_tensors(unfinished, tensors, metadata)
