"""Where weights are that a user names: nothing is read here, and PyTorch is not needed."""

import os
from pathlib import Path

from bit_ray import store
from bit_ray.errors import ModelError
from bit_ray.weights.known import fetch_by_name, is_name, known_weights

DESCRIPTION_FILE = "model.json"
"""File that makes a folder a saved model."""
CONFIG_FILE = "config.json"
"""What a folder has that timm or Hugging Face saved."""
TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".tar", ".ckpt")
SUFFIXES = (".npz", ".safetensors", *TORCH_SUFFIXES)
"""Endings of files of weights of other programs."""
PROGRAM_SUFFIXES = (".onnx", ".pt2")
"""Endings of exported programs, which are refused."""


def is_foreign(path: str | os.PathLike[str]) -> bool:
    """Return whether a local path looks like weights of another program."""
    path = Path(path)
    if path.is_dir():
        return (path / CONFIG_FILE).is_file() and not (path / DESCRIPTION_FILE).is_file()
    return path.suffix in (*SUFFIXES, *PROGRAM_SUFFIXES)  # the latter for the better error


def foreign_path(uri: str) -> str:
    """Return the local path of weights of another program, fetched if they have a name; empty for a saved model.

    Raises:
        ModelError: They are not on this machine, or cannot be fetched.
    """
    if uri.startswith("models:/"):
        return ""
    if (fetched := fetch_by_name(uri)) is not None:
        return str(fetched)
    if not store.is_local(uri):
        if uri.endswith(SUFFIXES):
            given = "weights of another program, not on this machine"
            raise ModelError(f"{uri}: {given}; accepted: a local file; download it")
        return ""
    path = _local(uri)
    return path if is_foreign(path) else ""


def check_there(uri: str) -> None:
    """Refuse weights that cannot be there: an unknown name, or a local path with nothing at it. Nothing is fetched.

    Raises:
        ModelError: As reading them would.
    """
    if uri.startswith("models:/") or is_name(uri) or not store.is_local(uri):
        return
    if is_foreign(path := _local(uri)):
        check_file(Path(path))
    else:
        check_folder(Path(store.filesystem(uri)[1]))


def check_file(path: Path) -> None:
    """Refuse weights of another program that are not there."""
    if not path.is_file():
        name = next((known.name for known in known_weights() if known.file == path.name), "")
        remedy = f"check the path, or give the name {name}: it is fetched then" if name else "check the path"
        raise ModelError(f"{path}: no such file; accepted: BiT weights; {remedy}")


def check_folder(path: Path) -> None:
    """Refuse a saved model that is not there."""
    if not path.is_dir():
        accepted = "a saved model, models:/NAME@ALIAS, or a name that bit-ray models known lists"
        raise ModelError(f"{path}: no such directory; accepted: {accepted}; check the path")


def _local(uri: str) -> str:
    return os.path.expanduser(uri.removeprefix("file://"))
