"""The footer of a shard: its columns, and where its row groups are; and that of a file of one row group.

A shard is a Parquet file of plain, uncompressed columns. Footers are not trusted. They are read here, not by pyarrow,
which aborts on some damaged footers; pyarrow gets only footers that were made here.
"""

import io
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from bit_ray.data.shards.thrift import I32, I64, LIST, MALFORMED, STRUCT, Struct, read_struct, write_struct

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("labels", pa.list_(pa.field("element", pa.int32(), nullable=False)), nullable=False),
    ]
)
"""Columns of every shard."""
OPTIONAL_COLUMNS = ("annotation", "fingerprint")
"""Binary columns that a set may have after those of SCHEMA, in this order; empty where a row has no value."""
MAGIC = b"PAR1"
_TAIL_BYTES = 8  # length of the footer, then the magic
_MAX_FOOTER_BYTES = 2**24  # 80,000 row groups; a longer one would take minutes to read

# Field numbers of parquet.thrift.
_FILE_SCHEMA, _FILE_ROWS, _FILE_GROUPS = 2, 3, 4
_ELEMENT_TYPE, _ELEMENT_REPETITION, _ELEMENT_NAME, _ELEMENT_CHILDREN = 1, 3, 4, 5
_GROUP_COLUMNS, _GROUP_BYTES, _GROUP_ROWS, _GROUP_OFFSET, _GROUP_COMPRESSED = 1, 2, 3, 5, 6
_CHUNK_META = 3
_META_TYPE, _META_CODEC, _META_VALUES, _META_BYTES, _META_COMPRESSED, _META_PAGES = 1, 4, 5, 6, 7, 9
_META_DICTIONARY = 11
_META_OF_VALUES = (12, 13, 16)  # statistics, pages per encoding, sizes: optional, and valid only for the template's row


class LayoutError(ValueError):
    """Bytes that do not have the layout of `bit-ray shards write`."""


class Chunk(NamedTuple):
    """One column of one row group: where its pages are in the file, and their number of values."""

    offset: int
    length: int
    num_values: int


class Group(NamedTuple):
    """One row group: its chunks are adjacent, in the order of the columns."""

    num_rows: int
    chunks: tuple[Chunk, ...]

    @property
    def start(self) -> int:
        """First byte in the file."""
        return self.chunks[0].offset

    @property
    def stop(self) -> int:
        """Byte after the last."""
        return self.chunks[-1].offset + self.chunks[-1].length


class Footer(NamedTuple):
    """The content of a shard's footer."""

    columns: tuple[str, ...]
    """Names of SCHEMA, and those of OPTIONAL_COLUMNS that the shard has."""
    groups: tuple[Group, ...]

    def group(self, number: int) -> Group:
        """Return a row group.

        Raises:
            LayoutError: There is no row group of this number.
        """
        if not 0 <= number < len(self.groups):
            raise LayoutError(f"has {len(self.groups)} row groups, no number {number}")
        return self.groups[number]


def shard_schema(optional_columns: Sequence[str] = ()) -> pa.Schema:
    """Return SCHEMA with some of OPTIONAL_COLUMNS."""
    extra = [pa.field(name, pa.binary(), nullable=False) for name in optional_columns]
    return pa.schema([*SCHEMA, *extra])


def footer_length(tail: bytes | memoryview) -> int:
    """Return the length in bytes of the footer with its own tail, from the last bytes of a file.

    Raises:
        LayoutError: Not the end of a shard.
    """
    if len(tail) < _TAIL_BYTES or tail[-4:] != MAGIC:
        raise LayoutError("Parquet magic bytes not found at its end")
    length = int.from_bytes(tail[-_TAIL_BYTES:-4], "little") + _TAIL_BYTES
    if length > _MAX_FOOTER_BYTES:
        raise LayoutError(f"its footer has {length} bytes; accepted: at most {_MAX_FOOTER_BYTES}")
    return length


def read_footer(footer: bytes, file_size: int) -> Footer:
    """Read a shard's footer.

    Args:
        footer: The last `footer_length` bytes of the file.
        file_size: Bytes of the whole file.

    Raises:
        LayoutError: It is damaged, or has other columns, compressed or dictionary-encoded ones, or row groups that do
            not directly follow each other up to the footer.
    """
    try:
        fields = read_struct(footer, 0)[0]
        columns, types = _columns(_list(fields, _FILE_SCHEMA))
        groups = []
        position, end = len(MAGIC), file_size - len(footer)
        for fields_of_group in _list(fields, _FILE_GROUPS):
            group = _group(fields_of_group, columns, types, position)
            position = group.stop
            groups.append(group)
    except LayoutError:
        raise
    except (*MALFORMED, LookupError, TypeError, AttributeError):
        raise LayoutError("its footer is damaged") from None
    if position > end or sum(group.num_rows for group in groups) != _int(fields, _FILE_ROWS):
        raise LayoutError("its footer is damaged")
    return Footer(columns, tuple(groups))


def _columns(elements: list[Struct]) -> tuple[tuple[str, ...], list[int]]:
    """Return the names of the columns, and the type of each column's values."""
    names = [str(element[_ELEMENT_NAME][1], "utf-8") for element in elements]
    optional = tuple(name for name in OPTIONAL_COLUMNS if name in names)
    expected = _list(_template(optional), _FILE_SCHEMA)
    if [_shape(element) for element in elements] != [_shape(element) for element in expected]:
        top = [name for name in names[1:] if name not in ("list", "element")]
        raise LayoutError(f"columns {', '.join(top)[:200]}, not those of a shard")
    types = [element[_ELEMENT_TYPE][1] for element in elements if _ELEMENT_TYPE in element]
    return (*SCHEMA.names, *optional), types


def _shape(element: Struct) -> list[tuple[int, object] | None]:
    return [element.get(n) for n in (_ELEMENT_TYPE, _ELEMENT_REPETITION, _ELEMENT_NAME, _ELEMENT_CHILDREN)]


def _group(fields: Struct, columns: tuple[str, ...], types: list[int], start: int) -> Group:
    num_rows = _int(fields, _GROUP_ROWS)
    chunks = []
    for name, type_of_values, column in zip(columns, types, _list(fields, _GROUP_COLUMNS), strict=True):
        meta = column[_CHUNK_META][1]
        if _META_DICTIONARY in meta or _int(meta, _META_CODEC, I32) != 0:
            raise LayoutError(f"column {name} is compressed or has a dictionary; a shard's is plain")
        chunk = Chunk(_int(meta, _META_PAGES), _int(meta, _META_COMPRESSED), _int(meta, _META_VALUES))
        if (
            _int(meta, _META_TYPE, I32) != type_of_values
            or chunk.length != _int(meta, _META_BYTES)
            or chunk.offset != start
            or min(chunk) < 0
            or (name != "labels" and chunk.num_values != num_rows)
        ):
            raise LayoutError("its footer is damaged")
        start += chunk.length
        chunks.append(chunk)
    return Group(num_rows, tuple(chunks))


def _int(fields: Struct, number: int, kind: int = I64) -> int:
    found, value = fields[number]
    if found != kind:
        raise TypeError
    return int(value)


def _list(fields: Struct, number: int) -> list[Struct]:
    found, (element, elements) = fields[number]
    if (found, element) != (LIST, STRUCT):
        raise TypeError
    return list(elements)


def group_footer(footer: Footer, group: Group) -> bytes:
    """Return the footer of a file that has one row group of a shard."""
    template = _template(footer.columns[len(SCHEMA) :])
    row_group: Struct = dict(template[_FILE_GROUPS][1][1][0])
    columns = []
    for column, chunk in zip(row_group[_GROUP_COLUMNS][1][1], group.chunks, strict=True):
        meta = {number: field for number, field in column[_CHUNK_META][1].items() if number not in _META_OF_VALUES}
        meta |= {
            _META_VALUES: (I64, chunk.num_values),
            _META_BYTES: (I64, chunk.length),
            _META_COMPRESSED: (I64, chunk.length),
            _META_PAGES: (I64, chunk.offset),
        }
        columns.append({**column, _CHUNK_META: (STRUCT, meta)})
    total = sum(chunk.length for chunk in group.chunks)
    row_group |= {
        _GROUP_COLUMNS: (LIST, (STRUCT, columns)),
        _GROUP_BYTES: (I64, total),
        _GROUP_ROWS: (I64, group.num_rows),
        _GROUP_OFFSET: (I64, group.start),
        _GROUP_COMPRESSED: (I64, total),
    }
    out = bytearray()
    write_struct(out, {**template, _FILE_ROWS: (I64, group.num_rows), _FILE_GROUPS: (LIST, (STRUCT, [row_group]))})
    return bytes(out) + len(out).to_bytes(4, "little") + MAGIC


@lru_cache(maxsize=4)
def _template(optional_columns: tuple[str, ...]) -> Struct:
    """Return the footer of a shard of one row, as pyarrow writes it."""
    sink = io.BytesIO()
    schema = shard_schema(optional_columns)
    columns = [pa.array([[] if field.name == "labels" else b""], field.type) for field in schema]
    pq.write_table(
        pa.table(columns, schema=schema), sink, compression="none", use_dictionary=False, write_statistics=False
    )
    data = sink.getvalue()
    return read_struct(data, len(data) - footer_length(data))[0]
