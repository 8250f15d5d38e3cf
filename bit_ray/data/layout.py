"""Where the bytes of a row group lie inside a shard, and a Parquet file of one row group made of those bytes.

The images of a row group are a plain, uncompressed Parquet column: pages of ``[4-byte little-endian length][bytes]``
per value (https://parquet.apache.org/docs/file-format/data-pages). So a reader that has walked the lengths once can
read one image without its neighbours. Page headers and footers are Thrift structs in the compact protocol
(https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md).
"""

import io
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("labels", pa.list_(pa.field("element", pa.int32(), nullable=False)), nullable=False),
    ]
)
MAGIC = b"PAR1"
_TAIL_BYTES = 8  # length of the footer, then the magic
_WINDOW_BYTES = 4096
_MAX_DEPTH = 16

# Thrift's compact types, and the field numbers of parquet.thrift.
_TRUE, _FALSE, _I8, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12
_PAGE_TYPE, _PAGE_SIZE, _PAGE_COMPRESSED_SIZE, _DATA_PAGE = 1, 2, 3, 5
_PAGE_VALUES, _PAGE_ENCODING = 1, 2
_FILE_ROWS, _FILE_GROUPS = 3, 4
_GROUP_COLUMNS, _GROUP_BYTES, _GROUP_ROWS, _GROUP_OFFSET, _GROUP_COMPRESSED = 1, 2, 3, 5, 6
_CHUNK_META = 3
_META_VALUES, _META_BYTES, _META_COMPRESSED, _META_PAGES = 5, 6, 7, 9
_META_OF_VALUES = (12, 13, 16)  # statistics, pages per encoding, sizes: optional, and true of the template's row only

Struct: TypeAlias = dict[int, tuple[int, Any]]
"""Field number to (compact type, value); a list's value is (type of its elements, elements)."""
ReadAt: TypeAlias = Callable[[int, int], bytes | memoryview]
"""Bytes at (offset, number); fewer at the end of the file."""


class LayoutError(ValueError):
    """Bytes that are not the layout `bit-ray shards write` makes."""


class Chunk(NamedTuple):
    """One column of one row group: where its pages lie in the file, and how many values they hold."""

    offset: int
    length: int
    num_values: int


def footer_length(tail: bytes | memoryview) -> int:
    """Return the length in bytes of the footer with its own tail, from the last bytes of a file.

    Raises:
        LayoutError: not the end of a Parquet file.
    """
    if len(tail) < _TAIL_BYTES or tail[-4:] != MAGIC:
        raise LayoutError("Parquet magic bytes not found at its end")
    return int.from_bytes(tail[-_TAIL_BYTES:-4], "little") + _TAIL_BYTES


def group_chunks(metadata: pq.FileMetaData, group: int) -> list[Chunk]:
    """Return the chunks of a row group, one for each column of SCHEMA.

    Raises:
        LayoutError: no such row group, other columns, or columns that are compressed or have a dictionary.
    """
    if not metadata.schema.equals(_parquet_schema()):
        raise LayoutError(f"columns {', '.join(metadata.schema.names)}, not those of a shard")
    if not 0 <= group < metadata.num_row_groups:
        raise LayoutError(f"has {metadata.num_row_groups} row groups, no number {group}")
    row_group = metadata.row_group(group)
    chunks = []
    for column in (row_group.column(i) for i in range(row_group.num_columns)):
        if column.compression != "UNCOMPRESSED" or column.has_dictionary_page:
            raise LayoutError(f"column {column.path_in_schema} is compressed or has a dictionary; a shard's is plain")
        chunks.append(Chunk(column.data_page_offset, column.total_compressed_size, column.num_values))
    return chunks


def value_extents(read_at: ReadAt, chunk: Chunk) -> tuple[list[int], list[int]]:
    """Return where each value of a plain, required binary column lies.

    Args:
        read_at: The bytes that the chunk's offset counts in; about one small read per value or page.
        chunk: The column.

    Returns:
        Offsets and lengths in bytes, one per value.

    Raises:
        LayoutError: pages that are damaged or of another kind.
    """
    offsets: list[int] = []
    lengths: list[int] = []
    position, end = chunk.offset, chunk.offset + chunk.length
    window, base = b"", 0
    while position < end:
        window, base = bytes(read_at(position, min(_WINDOW_BYTES, end - position))), position
        num_values, header, size = _data_page(window)
        position += header
        page_end = position + size
        if page_end > end:
            raise LayoutError("a page goes beyond its column")
        for _ in range(num_values):
            if position + 4 > page_end:
                raise LayoutError("a page has fewer values than its header says")
            at = position - base
            if at + 4 > len(window):
                window, base, at = bytes(read_at(position, min(_WINDOW_BYTES, end - position))), position, 0
                if len(window) < 4:
                    raise LayoutError("ends inside a page")
            length = int.from_bytes(window[at : at + 4], "little")
            offsets.append(position + 4)
            lengths.append(length)
            position += 4 + length
        if position != page_end:
            raise LayoutError("the values of a page do not fill it")
    if len(offsets) != chunk.num_values:
        raise LayoutError(f"a column has {len(offsets)} values, the footer says {chunk.num_values}")
    return offsets, lengths


def group_footer(num_rows: int, chunks: Sequence[Chunk]) -> bytes:
    """Return what must follow the chunks, one for each column of SCHEMA, to make a Parquet file of one row group."""
    template = _template()
    row_group: Struct = dict(template[_FILE_GROUPS][1][1][0])
    columns = []
    for column, chunk in zip(row_group[_GROUP_COLUMNS][1][1], chunks, strict=True):
        meta = {number: field for number, field in column[_CHUNK_META][1].items() if number not in _META_OF_VALUES}
        meta |= {
            _META_VALUES: (_I64, chunk.num_values),
            _META_BYTES: (_I64, chunk.length),
            _META_COMPRESSED: (_I64, chunk.length),
            _META_PAGES: (_I64, chunk.offset),
        }
        columns.append({**column, _CHUNK_META: (_STRUCT, meta)})
    total = sum(chunk.length for chunk in chunks)
    row_group |= {
        _GROUP_COLUMNS: (_LIST, (_STRUCT, columns)),
        _GROUP_BYTES: (_I64, total),
        _GROUP_ROWS: (_I64, num_rows),
        _GROUP_OFFSET: (_I64, min(chunk.offset for chunk in chunks)),
        _GROUP_COMPRESSED: (_I64, total),
    }
    footer = bytearray()
    _write_struct(footer, {**template, _FILE_ROWS: (_I64, num_rows), _FILE_GROUPS: (_LIST, (_STRUCT, [row_group]))})
    return bytes(footer) + len(footer).to_bytes(4, "little") + MAGIC


@lru_cache(maxsize=1)
def _example_file() -> bytes:
    """A shard of one row: pyarrow's own schema and footer to go by."""
    sink = io.BytesIO()
    columns = [pa.array([value], field.type) for value, field in zip(["", b"", []], SCHEMA, strict=True)]
    pq.write_table(
        pa.table(columns, schema=SCHEMA), sink, compression="none", use_dictionary=False, write_statistics=False
    )
    return sink.getvalue()


@lru_cache(maxsize=1)
def _parquet_schema() -> pq.ParquetSchema:
    return pq.read_metadata(io.BytesIO(_example_file())).schema


@lru_cache(maxsize=1)
def _template() -> Struct:
    data = _example_file()
    return _read_struct(data, len(data) - footer_length(data))[0]


def _data_page(window: bytes) -> tuple[int, int, int]:
    """Return number of values, bytes of the header and bytes of the body of a plain data page."""
    try:
        header, length = _read_struct(window, 0)
        page = header[_DATA_PAGE][1]
        kind, size, compressed = (header[n][1] for n in (_PAGE_TYPE, _PAGE_SIZE, _PAGE_COMPRESSED_SIZE))
        num_values, encoding = page[_PAGE_VALUES][1], page[_PAGE_ENCODING][1]
    except (LookupError, TypeError, ValueError):
        raise LayoutError("a page header is damaged or of another kind than a shard has") from None
    if (kind, encoding) != (0, 0) or size != compressed or size < 0 or num_values < 0:
        raise LayoutError("a page is damaged, or not plain and uncompressed")
    return num_values, length, size


def _read_struct(data: bytes, at: int, depth: int = 0) -> tuple[Struct, int]:
    """Read a struct; IndexError where the bytes end, ValueError where they cannot be one."""
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
    if kind in (_TRUE, _FALSE):  # the value of a field is its type
        return (kind, None), at
    value, at = _read_value(data, at, kind, depth)
    return (kind, value), at


def _read_value(data: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (_I16, _I32, _I64):
        return _read_int(data, at)
    if kind in (_TRUE, _FALSE, _I8):
        return data[at], at + 1
    if kind in (_DOUBLE, _BINARY):
        length, at = (8, at) if kind == _DOUBLE else _read_varint(data, at)
        if at + length > len(data):
            raise IndexError
        return data[at : at + length], at + length
    if depth == _MAX_DEPTH:
        raise ValueError("nested too deep")
    if kind in (_LIST, _SET):
        size, element = divmod(data[at], 16)
        at += 1
        if size == 15:
            size, at = _read_varint(data, at)
        elements = []
        for _ in range(size):
            value, at = _read_value(data, at, element, depth + 1)
            elements.append(value)
        return (element, elements), at
    if kind == _STRUCT:
        return _read_struct(data, at, depth + 1)
    raise ValueError(f"type {kind}")


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while data[at] & 128:
        value |= (data[at] & 127) << shift
        shift += 7
        at += 1
    return value | data[at] << shift, at + 1


def _read_int(data: bytes, at: int) -> tuple[int, int]:
    value, at = _read_varint(data, at)
    return value >> 1 ^ -(value & 1), at  # zigzag: the sign is the lowest bit


def _write_struct(out: bytearray, fields: Struct) -> None:
    previous = 0
    for number in sorted(fields):
        kind, value = fields[number]
        assert 0 < number - previous < 16, number
        out.append((number - previous) << 4 | kind)
        previous = number
        if kind not in (_TRUE, _FALSE):
            _write_value(out, kind, value)
    out.append(0)


def _write_value(out: bytearray, kind: int, value: Any) -> None:
    if kind in (_I16, _I32, _I64):
        _write_varint(out, value << 1 if value >= 0 else (-value << 1) - 1)
    elif kind in (_TRUE, _FALSE, _I8):
        out.append(value)
    elif kind in (_DOUBLE, _BINARY):
        if kind == _BINARY:
            _write_varint(out, len(value))
        out += value
    elif kind in (_LIST, _SET):
        element, elements = value
        out.append(min(len(elements), 15) << 4 | element)
        if len(elements) >= 15:
            _write_varint(out, len(elements))
        for each in elements:
            _write_value(out, element, each)
    else:
        assert kind == _STRUCT, kind
        _write_struct(out, value)


def _write_varint(out: bytearray, value: int) -> None:
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
