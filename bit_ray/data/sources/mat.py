"""Variables of a MATLAB file, version 5, with scipy, a dependency of scikit-learn.

scipy trusts the sizes in a file and follows any depth of nesting, until the memory or the stack is full. So the file is
unpacked and checked first (MathWorks, "MAT-File Format", 2019).
"""

import io
import math
import struct
import zlib
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bit_ray.errors import DataError

_MAX_BYTES = 2**30  # SVHN's training images are 230 MB
_MAX_DEPTH = 4  # a structure of arrays has 2
_HEADER_BYTES = 128
_MATRIX, _COMPRESSED = 14, 15
_SPARSE, _LAST_CLASS = 5, 15
_LARGEST = 2**53


def read_mat(data: bytes, where: str, *names: str) -> dict[str, npt.NDArray[Any]]:
    """Read variables without their dimensions of length 1; ``where`` is the file's name in messages.

    Raises:
        DataError: Not a MATLAB file, damaged, or without one of them.
    """
    from scipy.io import loadmat

    try:
        found = loadmat(io.BytesIO(_unpacked(data)), variable_names=names, squeeze_me=True)
    except Exception as error:  # a damaged file may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{where}: not readable as a MATLAB file ({reason}); fetch it again") from None
    for name in names:
        if name not in found:
            raise DataError(f"{where}: no {name} in it; accepted: the publisher's file; fetch it again")
    return {name: np.atleast_1d(found[name]) for name in names}


def whole_numbers(values: npt.NDArray[Any], where: str) -> npt.NDArray[np.int64]:
    """Return the values of a variable as ``[N] int64``.

    Raises:
        DataError: Some are not integers.
    """
    fits = values.dtype.kind in "iuf" and (np.abs(values) < _LARGEST).all() and (values == np.floor(values)).all()
    if not fits:
        raise DataError(f"{where}: values other than whole numbers; accepted: the publisher's file; fetch it again")
    return values.ravel().astype(np.int64)


def _unpacked(data: bytes) -> bytes:
    """Return the file uncompressed, after checking that each element is inside its parent."""
    if 0 in data[:4]:  # version 4, which has no elements, and arrays of any claimed size
        return data
    order = {b"IM": "<", b"MI": ">"}.get(data[126:_HEADER_BYTES])
    if order is None:
        raise ValueError("not a file of version 5")
    parts, total, at = [data[:_HEADER_BYTES]], 0, _HEADER_BYTES
    while at < len(data):
        found = _element(data, at, len(data), order)
        if found.kind == _COMPRESSED:
            part = zlib.decompressobj().decompress(data[found.start : found.stop], _MAX_BYTES - total + 1)
            at = found.stop
        else:
            part = data[at : found.after]
            at = found.after
        total += len(part)
        if total > _MAX_BYTES:
            raise ValueError(f"more than {_MAX_BYTES:,} bytes")
        _check(part, 0, len(part), order, 0)
        parts.append(part)
    return b"".join(parts)


class _Element(NamedTuple):
    """Where an element's bytes are, and where the next one is, on a multiple of eight bytes."""

    kind: int
    start: int
    stop: int
    after: int


def _element(data: bytes, at: int, end: int, order: str) -> _Element:
    if at + 8 > end:
        raise ValueError("it is truncated")
    kind, length = struct.unpack_from(f"{order}II", data, at)
    if kind >> 16:  # up to four bytes, in the tag itself
        found = _Element(kind & 0xFFFF, at + 4, at + 4 + (kind >> 16), at + 8)
    else:
        found = _Element(kind, at + 8, at + 8 + length, min(end, at + 8 + -(-length // 8) * 8))
    if found.stop > min(end, found.after):
        raise ValueError("an element after its end")
    return found


def _check(data: bytes, at: int, end: int, order: str, depth: int) -> None:
    """Check a list of elements, and those of each array in it."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"arrays nested deeper than {_MAX_DEPTH}")
    while at < end:
        found = _element(data, at, end, order)
        if found.kind == _COMPRESSED:
            raise ValueError("an element compressed twice")
        if found.kind == _MATRIX and found.stop > found.start:
            flags = _element(data, found.start, found.stop, order)
            dimensions = _element(data, flags.after, found.stop, order)
            array_class = struct.unpack_from(f"{order}I", data, flags.start)[0] & 0xFF
            num_bytes = found.stop - found.start
            count = math.prod(
                struct.unpack_from(f"{order}{(dimensions.stop - dimensions.start) // 4}I", data, dimensions.start)
            )
            # Any value takes at least a byte, and the publishers' files have no arrays of other classes.
            if not 1 <= array_class <= _LAST_CLASS or array_class == _SPARSE or count > num_bytes:
                raise ValueError(f"an array of class {array_class} and {count:,} values in {num_bytes:,} bytes")
            _check(data, found.start, found.stop, order, depth + 1)
        at = found.after
