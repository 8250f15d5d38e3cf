"""Row groups of shards in an object store: few requests each, and patience with a store that fails now and then.

The first row group that a process wants of a shard costs three requests (size, footer, row group), the others one.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from bit_ray.data import store
from bit_ray.data.layout import (
    MAGIC,
    SCHEMA,
    Chunk,
    LayoutError,
    footer_length,
    group_chunks,
    group_footer,
    value_extents,
)
from bit_ray.data.manifest import Shard
from bit_ray.errors import DamagedShardError

_FOOTER_BYTES = 32 * 1024  # 160 row groups; a longer footer takes another request
_MOST_OPEN = 256  # a footer of 64 row groups takes 150 kB of memory
_TIMES_UNREADABLE = 3

Pieces: TypeAlias = list[bytes | memoryview]
"""The bytes of a file, in order."""


def fetch_group(
    uri: str, shard: Shard, group: int, num_rows: int, columns: Sequence[str] = ("id", "image", "labels")
) -> Pieces:
    """Fetch one row group of a shard of the set at ``uri``.

    Args:
        uri: The shard set, in an object store.
        shard: The shard.
        group: Number of the row group.
        num_rows: Rows that the manifest says it has.
        columns: What will be read; the other columns are not fetched, and the file is not to be asked for them.

    Returns:
        The bytes of a Parquet file of this one row group, in pieces, with the pages as they were.

    Raises:
        DamagedShardError: the shard is missing, or not what the manifest says.
        DataError: the store refuses, or fails for longer than `store.PATIENCE_S`.
    """
    path = store.join(uri, shard.path)
    unreadable = 0
    while True:
        try:
            return store.patiently(path, lambda: _attempt(uri, path, shard, group, num_rows, columns))
        except FileNotFoundError:
            raise damaged(uri, path, "is in the manifest but missing") from None
        except LayoutError as error:  # the right number of bytes, but not the right bytes: the store, or the way here
            unreadable += 1
            if unreadable == _TIMES_UNREADABLE:
                raise damaged(uri, path, str(error)) from None


def damaged(uri: str | Path, path: str | Path, what: str) -> DamagedShardError:
    """Return the error for a shard of the set at ``uri``."""
    return DamagedShardError(
        f"{path}: {what}; run `bit-ray shards verify {uri}` and restore or write again what it names"
    )


class _Opened:
    """A shard's open file and footer; the lock makes one thread ask for them and the others wait."""

    def __init__(self, files: pafs.FileSystem) -> None:
        self.files = files
        self.lock = threading.Lock()
        self.file: pa.NativeFile | None = None
        self.metadata: pq.FileMetaData | None = None

    def open(self, uri: str, path: str, inner: str, shard: Shard) -> tuple[pa.NativeFile, pq.FileMetaData]:
        with self.lock:
            if self.file is None or self.metadata is None:
                file = self.files.open_input_file(inner)  # asks for the size
                size = file.size()
                if size != shard.num_bytes:
                    raise damaged(uri, path, f"has {size} bytes, the manifest says {shard.num_bytes}")
                self.metadata = _read_footer(file, size)
                self.file = file
            return self.file, self.metadata


_opened: OrderedDict[tuple[str, str], _Opened] = OrderedDict()
_opened_lock = threading.Lock()


def _attempt(uri: str, path: str, shard: Shard, group: int, num_rows: int, columns: Sequence[str]) -> Pieces:
    files, inner = store.filesystem(path)
    key = (path, shard.sha256)
    with _opened_lock:
        opened = _opened.get(key)
        if opened is None or opened.files is not files:  # another endpoint, or renewed credentials
            opened = _opened[key] = _Opened(files)
        _opened.move_to_end(key)
        if len(_opened) > _MOST_OPEN:
            _opened.popitem(last=False)
    try:
        file, metadata = opened.open(uri, path, inner, shard)
        chunks = group_chunks(metadata, group)
        if metadata.row_group(group).num_rows != num_rows:
            raise LayoutError("other rows than the manifest says")
        return _read_group(file, chunks, num_rows, columns)
    except Exception:
        # The next attempt begins with the size: whatever went wrong, it may be that the object has changed.
        with _opened_lock:
            if _opened.get(key) is opened:
                del _opened[key]
        raise


def _read_footer(file: pa.NativeFile, size: int) -> pq.FileMetaData:
    tail = memoryview(b"")
    wanted = min(size, _FOOTER_BYTES)
    while len(tail) < wanted:
        tail = store.read_range(file, size - wanted, wanted)
        wanted = footer_length(tail)
        if wanted > size:
            raise LayoutError("its footer is longer than the file")
    try:
        return pq.read_metadata(pa.BufferReader(tail[-wanted:]))
    except (OSError, pa.ArrowException) as error:
        raise LayoutError(f"its footer is damaged ({' '.join(str(error).split())})") from None


def _read_group(file: pa.NativeFile, chunks: Sequence[Chunk], num_rows: int, columns: Sequence[str]) -> Pieces:
    """Read some columns, those that lie side by side in one request, and put a footer behind them."""
    wanted = [chunk for name, chunk in zip(SCHEMA.names, chunks, strict=True) if name in columns]
    ranges: list[tuple[int, int]] = []
    for chunk in wanted:
        start = ranges.pop()[0] if ranges and ranges[-1][1] == chunk.offset else chunk.offset
        ranges.append((start, chunk.offset + chunk.length))
    pieces = [store.read_range(file, start, stop - start) for start, stop in ranges]
    bodies = {
        chunk.offset: piece[chunk.offset - start :][: chunk.length]
        for (start, stop), piece in zip(ranges, pieces, strict=True)
        for chunk in wanted
        if start <= chunk.offset < stop
    }
    _check(num_rows, chunks, bodies, columns)
    return [MAGIC, *pieces, _footer(num_rows, chunks, bodies)]


def _footer(num_rows: int, chunks: Sequence[Chunk], bodies: Mapping[int, memoryview]) -> bytes:
    moved, position = [], len(MAGIC)
    for chunk in chunks:
        moved.append(chunk._replace(offset=position))
        position += chunk.length if chunk.offset in bodies else 0
    return group_footer(num_rows, moved)


def _check(num_rows: int, chunks: Sequence[Chunk], bodies: Mapping[int, memoryview], columns: Sequence[str]) -> None:
    """Raise LayoutError unless the pages can be read: what a cache keeps must be whole, for the shard may be mended."""
    images = chunks[SCHEMA.get_field_index("image")]
    small = dict(bodies)
    if body := small.pop(images.offset, None):
        value_extents(lambda offset, n: body[offset : offset + n], images._replace(offset=0))
    names = [name for name in columns if name != "image"]
    if names:
        parts: Pieces = [
            MAGIC,
            *(small[chunk.offset] for chunk in chunks if chunk.offset in small),
            _footer(num_rows, chunks, small),
        ]
        try:
            pq.read_table(pa.BufferReader(b"".join(parts)), columns=names, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise LayoutError(f"row group is damaged ({' '.join(str(error).split())})") from None
