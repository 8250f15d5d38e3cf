"""State dicts as other programs save them: safetensors, or PyTorch files, which are read with ``weights_only``."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from bit_ray.errors import ModelError, brief

# Keys under which training scripts keep the network's weights.
_WRAPPED = ("state_dict", "model")


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a file by name, and its metadata.

    Raises:
        ModelError: It is damaged, unsafe to read, has other objects than tensors, or would unpack to more bytes.
    """
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except Exception as error:  # of types that PyTorch lacks, too
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"{path}: not a safetensors file ({reason}); download or save it again") from None
    try:
        _check_torch_zip(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ModelError(
            f"{path}: not a PyTorch file, or one with objects other than tensors, which are not read because they "
            f"could run code; accepted: a state dict; save it with torch.save(model.state_dict(), ...)"
        ) from None
    except Exception as error:  # the reader fails on other bytes in any way
        reason = str(error).partition("\n")[0][:200]
        raise ModelError(f"{path}: not a PyTorch file, or truncated ({reason}); download it again") from None
    for key in _WRAPPED:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if (
        not isinstance(loaded, Mapping)
        or not all(isinstance(name, str) for name in loaded)
        or not all(isinstance(tensor, Tensor) for tensor in loaded.values())
    ):
        raise ModelError(
            f"{path}: not a state dict; accepted: names and tensors; save it with torch.save(model.state_dict(), ...)"
        )
    tensors: dict[str, Tensor] = dict(loaded)
    left = path.stat().st_size
    for name, tensor in tensors.items():
        # A view may repeat the few numbers of its storage any number of times.
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            given = f"{brief(name)} is not a plain tensor"
            raise ModelError(f"{path}: {given}; accepted: dense tensors; save the model again")
        left -= tensor.numel() * tensor.element_size()
        if left < 0:
            given = "its tensors have more bytes than the file"
            raise ModelError(f"{path}: {given}; accepted: plain tensors; save the model again")
    return tensors, {}


def _check_torch_zip(path: Path) -> None:
    """Refuse a compressed file, which could unpack to more than its size: `torch.save` never compresses."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    unpacked = sum(member.file_size for member in members)
    if unpacked > path.stat().st_size or any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError(f"a compressed archive of {unpacked} bytes")
