"""A row group of a shard: its checksum, where its images are, and a Parquet file made from its bytes.

The images of a row group are pages of ``[4-byte little-endian length][bytes]`` per value
(https://parquet.apache.org/docs/file-format/data-pages), so a reader that has read the lengths once can read one image
without its neighbours.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from bit_ray.data.shards.footer import MAGIC, Chunk, Footer, Group, LayoutError, group_footer
from bit_ray.data.shards.thrift import MALFORMED, read_struct

CHECKSUM_DIGITS = 8
_WINDOW_BYTES = 4096
_PIECE_BYTES = 2**17  # stays in a core's cache between reading and hashing

# Field numbers of parquet.thrift.
_PAGE_TYPE, _PAGE_SIZE, _PAGE_COMPRESSED_SIZE, _DATA_PAGE = 1, 2, 3, 5
_PAGE_VALUES, _PAGE_ENCODING = 1, 2

ReadAt: TypeAlias = Callable[[int, int], bytes | memoryview]
"""Bytes at (offset, number); fewer at the end of the file."""
Pieces: TypeAlias = list[bytes | memoryview]
"""The bytes of a file, in order."""


def checksum(pieces: Iterable[bytes | memoryview]) -> str:
    """Return the checksum of a row group's bytes, of all its columns: eight hex digits, the last of XXH3's 64 bits."""
    state = xxhash.xxh3_64()
    for piece in pieces:
        state.update(piece)
    return str(state.hexdigest()[-CHECKSUM_DIGITS:])


def group_checksum(read_at: ReadAt, group: Group) -> str:
    """Return the checksum of a row group of a file, read piece by piece."""
    starts = range(group.start, group.stop, _PIECE_BYTES)
    return checksum(read_at(start, min(_PIECE_BYTES, group.stop - start)) for start in starts)


def value_extents(read_at: ReadAt, chunk: Chunk) -> tuple[list[int], list[int]]:
    """Return where each value of a plain, required binary column is.

    Args:
        read_at: Reads the bytes to which the chunk's offset refers; about one small read per value or page.
        chunk: The column.

    Returns:
        Offsets and lengths in bytes, one per value.

    Raises:
        LayoutError: Pages that are damaged or of another kind.
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


def group_file(footer: Footer, group: Group, bodies: Mapping[str, Pieces]) -> Pieces:
    """Return a Parquet file of one row group that has some of its columns.

    Args:
        footer: Footer of the shard.
        group: The row group in it.
        bodies: The bytes of each of these columns. The other columns must not be read from the file.
    """
    chunks = []
    position = len(MAGIC)
    for name, chunk in zip(footer.columns, group.chunks, strict=True):
        chunks.append(chunk._replace(offset=position))
        position += chunk.length if name in bodies else 0
    ordered = [piece for name in footer.columns for piece in bodies.get(name, ())]
    return [MAGIC, *ordered, group_footer(footer, Group(group.num_rows, tuple(chunks)))]


def read_columns(read_at: ReadAt, footer: Footer, group: Group, names: Sequence[str]) -> pa.Table:
    """Read some columns of a row group, each by one call of ``read_at``.

    Raises:
        LayoutError: No such column, or damaged pages.
    """
    for name in names:
        if name not in footer.columns:
            raise LayoutError(f"has no column {name}")
    bodies: dict[str, Pieces] = {
        name: [read_at(chunk.offset, chunk.length)]
        for name, chunk in zip(footer.columns, group.chunks, strict=True)
        if name in names
    }
    return read_file(group_file(footer, group, bodies), names)


def read_file(file: Pieces, names: Sequence[str]) -> pa.Table:
    """Read columns of a Parquet file in memory.

    Raises:
        LayoutError: Damaged pages.
    """
    try:
        with pq.ParquetFile(pa.BufferReader(b"".join(file))) as parquet:
            return parquet.read(columns=list(names), use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise LayoutError(f"row group is damaged ({' '.join(str(error).split())})") from None


def _data_page(window: bytes) -> tuple[int, int, int]:
    """Return number of values, bytes of the header and bytes of the body of a plain data page."""
    try:
        header, length = read_struct(window, 0)
        page = header[_DATA_PAGE][1]
        kind, size, compressed = (header[n][1] for n in (_PAGE_TYPE, _PAGE_SIZE, _PAGE_COMPRESSED_SIZE))
        num_values, encoding = page[_PAGE_VALUES][1], page[_PAGE_ENCODING][1]
    except (*MALFORMED, LookupError, TypeError):
        raise LayoutError("a page header is damaged or of another kind than a shard has") from None
    if (kind, encoding) != (0, 0) or size != compressed or size < 0 or num_values < 0:
        raise LayoutError("a page is damaged, or not plain and uncompressed")
    return num_values, length, size
