"""TFRecord files of ``tf.train.Example``, read without TensorFlow: where each image is, and the values next to it.

A record is its length (uint64), a checksum of that, the message and a checksum of it
(tensorflow.org/tutorials/load_data/tfrecord). Messages are in the encoding of protocol buffers. Checksums are not
verified; decoding an image verifies it.
"""

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bit_ray import store
from bit_ray.errors import DataError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Record:
    """One example: its features by name."""

    extents: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """First byte in the file, and length, of each value of the features that are bytes."""
    texts: dict[str, list[bytes]] = field(default_factory=dict)
    """Those values that are shorter than 1,024 bytes."""
    floats: dict[str, list[float]] = field(default_factory=dict)
    """Values of the features that are numbers."""
    integers: dict[str, list[int]] = field(default_factory=dict)
    """Values of the features that are whole numbers."""


def read_records(path: Path) -> Iterator[Record]:
    """Iterate over the records of a file.

    Raises:
        DataError: Not a TFRecord file of examples, or cut short.
    """
    store.check_file(path)
    if not path.stat().st_size:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = 0
        while at < len(data):
            try:
                (length,) = struct.unpack_from("<Q", data, at)
                if at + 16 + length > len(data):
                    raise ValueError("truncated")
                record = _example(data, at + 12, at + 12 + length)
            except (ValueError, IndexError, struct.error) as error:
                raise DataError(
                    f"{path}: byte {at}: not a complete record of an example ({error}); fetch it again"
                ) from None
            yield record
            at += 16 + length


def _example(data: mmap.mmap, start: int, stop: int) -> Record:
    record = Record()
    for _, begin, end in _fields(data, start, stop, wanted=1):  # Example.features
        for _, entry, entry_end in _fields(data, begin, end, wanted=1):  # Features.feature, a map
            name, value = b"", (0, 0)
            for number, low, high in _fields(data, entry, entry_end):
                if number == 1:
                    name = data[low:high]
                else:
                    value = (low, high)
            _feature(record, name.decode(), data, *value)
    return record


def _feature(record: Record, name: str, data: mmap.mmap, start: int, stop: int) -> None:
    for kind, begin, end in _fields(data, start, stop):
        if kind == 1:  # BytesList
            extents = [(low, high - low) for _, low, high in _fields(data, begin, end, wanted=1)]
            record.extents[name] = extents
            record.texts[name] = [data[low : low + length] for low, length in extents if length < 1024]
        elif kind == 2:  # FloatList, packed
            for _, low, high in _fields(data, begin, end, wanted=1):
                record.floats.setdefault(name, []).extend(struct.unpack(f"<{(high - low) // 4}f", data[low:high]))
        elif kind == 3:  # Int64List, packed or not
            values = record.integers.setdefault(name, [])
            for _, low, high in _fields(data, begin, end, wanted=1):
                while low < high:
                    number, low = _varint(data, low)
                    values.append(number - 2**64 if number >= 2**63 else number)


def _fields(data: mmap.mmap, start: int, stop: int, wanted: int = 0) -> Iterator[tuple[int, int, int]]:
    """Number, first byte and end of each field of a message, or of those of one number."""
    while start < stop:
        key, start = _varint(data, start)
        number, kind = key >> 3, key & 7
        if kind == _BYTES:
            length, begin = _varint(data, start)
            start = begin + length
        elif kind in (_FIXED64, _FIXED32):
            begin, start = start, start + (8 if kind == _FIXED64 else 4)
        elif kind == _VARINT:
            begin, (_, start) = start, _varint(data, start)
        else:
            raise ValueError(f"field of kind {kind}")
        if start > stop:
            raise ValueError("field after the end of its message")
        if not wanted or number == wanted:
            yield number, begin, start


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("number of more than 64 bits")
