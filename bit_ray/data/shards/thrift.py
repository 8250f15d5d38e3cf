"""Structs in Thrift's compact protocol, the format of Parquet's footers and page headers.

Source: https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md. Reading untrusted bytes is
safe: malformed ones raise an exception of `MALFORMED`, and time and memory are in proportion to the bytes.
"""

from typing import Any, TypeAlias

TRUE, FALSE, I8, I16, I32, I64, DOUBLE, BINARY, LIST, SET, STRUCT = 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12
MALFORMED = (IndexError, ValueError)
"""Exceptions of reading if the bytes end too early or cannot be a struct."""

_MAX_DEPTH = 16
_MAX_SHIFT = 63  # a 64-bit integer takes at most ten bytes of seven bits

Struct: TypeAlias = dict[int, tuple[int, Any]]
"""Field number to (compact type, value); a list's value is (type of its elements, elements)."""


def read_struct(data: bytes, at: int, depth: int = 0) -> tuple[Struct, int]:
    """Read the struct at byte ``at``; return it and the position after it.

    Raises:
        IndexError: The bytes end too early.
        ValueError: They cannot be a struct.
    """
    fields: Struct = {}
    number = 0
    while data[at]:
        step, kind = divmod(data[at], 16)
        at += 1
        if step:
            number += step
        else:
            number, at = _read_int(data, at)
        fields[number], at = _read_field(data, at, kind, depth)
    return fields, at + 1


def _read_field(data: bytes, at: int, kind: int, depth: int) -> tuple[tuple[int, Any], int]:
    if kind in (TRUE, FALSE):  # the value of a field is its type
        return (kind, None), at
    value, at = _read_value(data, at, kind, depth)
    return (kind, value), at


def _read_value(data: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (I16, I32, I64):
        return _read_int(data, at)
    if kind in (TRUE, FALSE, I8):
        return data[at], at + 1
    if kind in (DOUBLE, BINARY):
        length, at = (8, at) if kind == DOUBLE else _read_varint(data, at)
        if at + length > len(data):
            raise IndexError
        return data[at : at + length], at + length
    if depth == _MAX_DEPTH:
        raise ValueError("nested too deep")
    if kind in (LIST, SET):
        size, element = divmod(data[at], 16)
        at += 1
        if size == 15:
            size, at = _read_varint(data, at)
        elements = []
        for _ in range(size):
            value, at = _read_value(data, at, element, depth + 1)
            elements.append(value)
        return (element, elements), at
    if kind == STRUCT:
        return read_struct(data, at, depth + 1)
    raise ValueError(f"type {kind}")


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while data[at] & 128:
        value |= (data[at] & 127) << shift
        shift += 7
        at += 1
        if shift > _MAX_SHIFT:
            raise ValueError("integer of more than 64 bits")
    return value | data[at] << shift, at + 1


def _read_int(data: bytes, at: int) -> tuple[int, int]:
    value, at = _read_varint(data, at)
    return value >> 1 ^ -(value & 1), at  # zigzag: the sign is the lowest bit


def write_struct(out: bytearray, fields: Struct) -> None:
    """Append a struct to ``out``."""
    previous = 0
    for number in sorted(fields):
        kind, value = fields[number]
        assert 0 < number - previous < 16, number
        out.append((number - previous) << 4 | kind)
        previous = number
        if kind not in (TRUE, FALSE):
            _write_value(out, kind, value)
    out.append(0)


def _write_value(out: bytearray, kind: int, value: Any) -> None:
    if kind in (I16, I32, I64):
        _write_varint(out, value << 1 if value >= 0 else (-value << 1) - 1)
    elif kind in (TRUE, FALSE, I8):
        out.append(value)
    elif kind in (DOUBLE, BINARY):
        if kind == BINARY:
            _write_varint(out, len(value))
        out += value
    elif kind in (LIST, SET):
        element, elements = value
        out.append(min(len(elements), 15) << 4 | element)
        if len(elements) >= 15:
            _write_varint(out, len(elements))
        for each in elements:
            _write_value(out, element, each)
    else:
        assert kind == STRUCT, kind
        write_struct(out, value)


def _write_varint(out: bytearray, value: int) -> None:
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
