"""The authors' ``.npz`` weight files, read and written.

A file maps names such as ``resnet/block1/unit01/a/standardized_conv2d/kernel`` to arrays; kernels are HWIO and raw,
that is, not standardized (big_transfer:bit_pytorch/models.py, ``load_from``).
"""

import math
import os
import re
import zipfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bit_ray.errors import ModelError, brief
from bit_ray.locks import whole
from bit_ray.models.network import Network
from bit_ray.models.zoo import model_name
from bit_ray.weights.naming import NAMINGS, check_bit, to_theirs, weight_names

_ROOT = "resnet/root_block/standardized_conv2d/kernel"
_HEAD_BIAS = "resnet/head/conv2d/bias"
_UNIT = re.compile(r"resnet/block([1-4])/unit([0-9]{2,6})/")
_MOST_PER_BYTE = 1032  # bytes that deflate can make from one byte

_Header = tuple[tuple[int, ...], np.dtype[Any]]


def npz_architecture(path: str | os.PathLike[str]) -> tuple[tuple[int, ...], float, int]:
    """Infer (units, width, num_classes) from the headers of a file; num_classes is 0 if it has no classifier.

    Raises:
        ModelError: The file is missing, damaged or not a BiT ``.npz``.
    """
    path = Path(path)
    return _architecture(path, {name: header for name, (_, header) in _canonical_headers(path).items()})


def load_npz(model: Network, path: str | os.PathLike[str], *, head: Literal["load", "zero"] = "load") -> None:
    """Copy the weights of a BiT ``.npz`` file into the model, all or none of them.

    Args:
        model: A network of the file's depth and width.
        path: Local file.
        head: ``load`` takes the file's classifier and needs its number of classes; ``zero`` ignores it and zeroes the
            model's, for transfer (paper §4.1).

    Raises:
        ModelError: The file is missing, damaged, not a BiT ``.npz``, or does not fit the model.
    """
    tensors = npz_tensors(model, path, head=head)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for ours, tensor in tensors.items():
            parameters[ours].copy_(tensor)
        if head == "zero":
            model.head.weight.zero_()
            model.head.bias.zero_()


def npz_tensors(
    model: Network, path: str | os.PathLike[str], *, head: Literal["load", "zero"] = "load"
) -> dict[str, Tensor]:
    """Return the weights of a BiT ``.npz`` file by our names, for a model that may be on the meta device.

    Nothing is read before all headers have been compared with the model; see `load_npz`.

    Raises:
        ModelError: As for `load_npz`.
    """
    path = Path(path)
    if head not in ("load", "zero"):
        raise ModelError.of("head", repr(head), "'load' or 'zero'", "choose one")
    held = _canonical_headers(path)
    names = _npz_names(model, path)
    if head == "zero":
        names = {ours: theirs for ours, theirs in names.items() if not ours.startswith("head.")}
    _check(path, {name: header for name, (_, header) in held.items()}, model, names)
    arrays = read_arrays(path, {held[theirs][0] for theirs in names.values()})
    parameters = dict(model.named_parameters())
    tensors: dict[str, Tensor] = {}
    for ours, theirs in names.items():
        array = arrays.pop(held[theirs][0])
        if array.ndim == 4:
            array = array.transpose(3, 2, 0, 1)
        tensor = torch.from_numpy(np.ascontiguousarray(array, array.dtype.newbyteorder("=")))
        tensors[ours] = tensor.reshape(parameters[ours].shape).to(parameters[ours].dtype)
    return tensors


def save_npz(model: Network, path: str | os.PathLike[str]) -> None:
    """Write the model's weights under the authors' names, which their loaders and `load_npz` read; atomic.

    Types narrower than float32 are converted to it, which is exact.

    Raises:
        ModelError: The folder is missing or not writable.
    """
    path = Path(path)
    arrays = {}
    parameters = dict(model.named_parameters())
    for ours, theirs in _npz_names(model, path).items():
        tensor = parameters[ours].detach().cpu()
        tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        arrays[theirs] = to_theirs(NAMINGS["npz"], ours, tensor).numpy()
    try:
        with whole(path) as unfinished, unfinished.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
    except OSError as error:
        raise ModelError(f"{path}: cannot be written ({error.strerror}); choose a writable folder") from None


def _npz_names(model: Network, path: Path) -> dict[str, str]:
    """Return parameter name -> the authors' name, for every parameter of the model."""
    names = weight_names(NAMINGS["npz"], check_bit(model.config, path).units)
    return {name: names[name] for name, _ in model.named_parameters()}


def _canonical(key: str) -> str:
    """Undo name variants of the published files: ``standardized_conv2d_<digits>``, and any layer name in a proj."""
    key = re.sub(r"/standardized_conv2d_\d+/", "/standardized_conv2d/", key)
    return re.sub(r"/a/proj/[^/]+/kernel$", "/a/proj/standardized_conv2d/kernel", key)


def read_headers(path: Path, start: str) -> dict[str, _Header]:
    """Return name -> (shape, dtype) of the arrays whose names begin with ``start``, without reading the arrays.

    Raises:
        ModelError: The file is missing, damaged, or has too few bytes for an array.
    """
    headers: dict[str, _Header] = {}
    try:
        num_bytes = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                if not name.startswith(start):
                    continue
                if name in headers:
                    raise ValueError(f"{brief(name)} is there twice")
                if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise ValueError(f"{brief(name)} is compressed in a way that NumPy does not write")
                num_bytes -= member.compress_size
                if num_bytes < 0 or member.file_size > _MOST_PER_BYTE * (member.compress_size + 1):
                    raise ValueError(f"{brief(name)} cannot have {member.file_size} bytes in this file")
                with archive.open(member) as file:
                    npy = np.lib.format
                    first = npy.read_magic(file) == (1, 0)
                    shape, _, dtype = (npy.read_array_header_1_0 if first else npy.read_array_header_2_0)(file)
                    left = member.file_size - file.tell()
                if min(shape, default=0) < 0 or (math.prod(shape) * dtype.itemsize > left and not dtype.hasobject):
                    raise ValueError(f"{brief(name)} says {brief(list(shape))} {brief(dtype.str)} and has {left} bytes")
                headers[name] = shape, dtype
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; accepted: a BiT .npz file; check the path") from None
    except Exception as error:  # zipfile and NumPy fail on other bytes in any way
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(f"{path}: not an .npz file, or truncated ({reason}); download or write it again") from None
    return headers


def read_arrays(path: Path, names: Collection[str]) -> dict[str, np.ndarray]:
    """Return the arrays of some names, whose headers `read_headers` has accepted.

    Raises:
        ModelError: They are damaged.
    """
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                if name in names:
                    with archive.open(member) as file:
                        arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(f"{path}: damaged .npz file ({reason}); download or write it again") from None
    return arrays


def _canonical_headers(path: Path) -> dict[str, tuple[str, _Header]]:
    """Return canonical name -> (name in the file, (shape, dtype)), without other arrays of a training."""
    headers: dict[str, tuple[str, _Header]] = {}
    for key, header in read_headers(path, "resnet/").items():
        if (name := _canonical(key)) in headers:
            raise ModelError(f"{path}: {brief(headers[name][0])} and {brief(key)} are the same weight; remove one")
        headers[name] = key, header
    if _ROOT not in headers:
        accepted = "a BiT .npz file in the authors' format"
        raise ModelError(f"{path}: no {_ROOT!r} in it; accepted: {accepted}; check the path")
    return headers


def _architecture(path: Path, headers: dict[str, _Header]) -> tuple[tuple[int, ...], float, int]:
    units = [0, 0, 0, 0]
    for name in headers:
        if match := _UNIT.match(name):
            stage = int(match[1]) - 1
            units[stage] = max(units[stage], int(match[2]))
    root, _ = headers[_ROOT]
    if len(root) != 4 or min(units) == 0:
        raise ModelError(
            f"{path}: {_ROOT} {brief(list(root))}, units {_join(units)}; accepted: a kernel [7, 7, 3, 64 * width] and "
            f"four blocks of units; use a complete BiT .npz file"
        )
    bias, _ = headers.get(_HEAD_BIAS, ((0,), None))
    return tuple(units), root[-1] / 64, bias[0] if len(bias) == 1 else 0


def _check(path: Path, headers: dict[str, _Header], model: Network, names: dict[str, str]) -> None:
    """Raise the most helpful error if the file does not have exactly ``names``, in the shapes of the model."""
    units, width, num_classes = _architecture(path, headers)
    config = check_bit(model.config, path)
    if (units, width) != (config.units, config.width):
        held, wanted = model_name(units, width), model_name(config.units, config.width)
        raise ModelError(
            f"{path}: weights of {held} (units {_join(units)}, width {width:g}); accepted: those of the model, "
            f"{wanted} (units {_join(config.units)}, width {config.width:g}); use create_model({held!r}, ...)"
        )
    with_head = "head.weight" in names
    if with_head and num_classes != config.num_classes:
        given = f"a head of {num_classes} classes" if num_classes else "no head"
        raise ModelError(
            f"{path}: {given}; accepted: {config.num_classes} classes, as in the model; "
            f"pass head='zero' to ignore the file's head, or create the model with the file's number of classes"
        )
    wanted_names = set(names.values())
    held_names = {name for name in headers if with_head or not name.startswith("resnet/head/")}
    for kind, odd in (("lacks", wanted_names - held_names), ("has the unexpected", held_names - wanted_names)):
        if odd:
            more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
            raise ModelError(
                f"{path}: file {kind} {brief(min(odd))}{more}; accepted: exactly the {len(names)} weights of "
                f"{model_name(units, width)}; use a complete BiT .npz file"
            )
    for ours, theirs in names.items():
        shape, dtype = headers[theirs]
        if dtype.kind != "f" or dtype.itemsize > 8:
            given = f"{theirs} is {str(dtype)[:80]}"
            raise ModelError(f"{path}: {given}; accepted: float16, float32 or float64; convert the file")
        expected = tuple(model.get_parameter(ours).shape)
        if ours == "head.weight":
            expected = (*expected, 1, 1)
        if len(expected) == 4:
            expected = tuple(expected[axis] for axis in (2, 3, 1, 0))
        if shape != expected:
            raise ModelError(
                f"{path}: {theirs} has shape {brief(list(shape))}; accepted: {list(expected)}, as in "
                f"{model_name(units, width)}; use a complete BiT .npz file"
            )


def _join(units: Iterable[int]) -> str:
    return "-".join(map(str, units))
