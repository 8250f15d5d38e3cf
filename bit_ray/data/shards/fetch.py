"""Row groups of shards: from local files, or from an object store with few requests each and with retries.

The first row group that a process reads from a shard in a store costs three requests (size, footer, row group), each
other one costs one. On Google's store the first costs four: pyarrow begins to read the whole object when it is asked
whether a file is open, and holds Python's lock until the first bytes come.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from io import FileIO
from pathlib import Path
from typing import NamedTuple, TypeVar

import pyarrow as pa
from pyarrow import fs as pafs

from bit_ray import store
from bit_ray.data.shards.footer import Footer, Group, LayoutError, footer_length, read_footer
from bit_ray.data.shards.manifest import Shard
from bit_ray.data.shards.row_group import Pieces, ReadAt, checksum, group_file, read_columns, read_file, value_extents
from bit_ray.errors import DamagedShardError, DataError

_FOOTER_BYTES = 32 * 1024  # 160 row groups; a longer footer takes another request
_MOST_OPEN = 256  # a footer of 64 row groups takes 40 kB of memory
_TIMES_UNREADABLE = 3

T = TypeVar("T")


class ShardFile(NamedTuple):
    """An open shard."""

    read_at: ReadAt
    footer: Footer


def fetch_group(uri: str, shard: Shard, number: int, num_rows: int) -> Pieces:
    """Read one row group, all of its columns, and check it: by the manifest's checksum, or else by parsing its pages.

    Args:
        uri: The shard set.
        shard: The shard.
        number: Number of the row group.
        num_rows: Its rows by the manifest.

    Returns:
        The bytes of a Parquet file of this one row group, in pieces, with the pages unchanged.

    Raises:
        DamagedShardError: The shard is missing, or not what the manifest says.
        DataError: The store refuses, or fails for longer than `store_failures.PATIENCE_S`.
    """
    return _read(uri, shard, lambda file: _whole_group(file, shard, number, num_rows))


def fetch_columns(uri: str, shard: Shard, number: int, num_rows: int, names: Sequence[str]) -> pa.Table:
    """Read columns of one row group: with the images among them like `fetch_group`, else only these columns.

    Args and errors are those of `fetch_group`. A checksum covers all columns, so it does not check some of them alone.
    """

    def columns(file: ShardFile) -> pa.Table:
        if "image" in names:
            return read_file(_whole_group(file, shard, number, num_rows), names)
        return read_columns(file.read_at, file.footer, _group(file.footer, number, num_rows), names)

    return _read(uri, shard, columns)


def local_group(uri: str, shard: Shard, number: int, num_rows: int) -> str:
    """Return the path of a shard of a local set, after checking its size and footer against the manifest.

    Args and errors are those of `fetch_group`.
    """
    _read(uri, shard, lambda file: _group(file.footer, number, num_rows))
    return store.filesystem(store.join(uri, shard.path))[1]


def damaged(uri: str | Path, path: str | Path, what: str) -> DamagedShardError:
    """Return the error for a shard of the set at ``uri``."""
    return DamagedShardError(
        f"{path}: {what}; run `bit-ray shards verify {uri}` and restore or write again what it names"
    )


@contextmanager
def local_shard(path: str | Path, num_bytes: int | None = None) -> Iterator[tuple[FileIO, ShardFile]]:
    """Open a local shard, of ``num_bytes`` if they are given; its footer is read once while the file stays the same.

    Raises:
        FileNotFoundError: There is no such file.
        DataError: No permission to read it.
        LayoutError: It is not a shard, is damaged, or has another size.
    """
    try:
        file = FileIO(path)
    except PermissionError:
        raise DataError(f"{path}: permission denied; check the owner and mode of the path") from None
    with file:
        status = os.fstat(file.fileno())
        if num_bytes is not None and status.st_size != num_bytes:
            raise LayoutError(_other_size(status.st_size, num_bytes))
        footer = _local_footer(str(path), status.st_ino, status.st_mtime_ns, status.st_size)
        yield file, ShardFile(lambda offset, n: os.pread(file.fileno(), n, offset), footer)


@lru_cache(maxsize=64)
def _local_footer(path: str, inode: int, mtime_ns: int, size: int) -> Footer:
    with FileIO(path) as file:
        return _read_footer(lambda offset, n: os.pread(file.fileno(), n, offset), size)


def _read(uri: str, shard: Shard, read: Callable[[ShardFile], T]) -> T:
    path = store.join(uri, shard.path)
    if store.is_local(uri):
        local = store.filesystem(path)[1]
        try:
            with local_shard(local, shard.num_bytes) as (_, file):
                return read(file)
        except FileNotFoundError:
            raise damaged(uri, path, "is in the manifest but missing") from None
        except (OSError, LayoutError) as error:
            raise damaged(uri, path, " ".join(str(error).split())) from None
    unreadable = 0
    while True:
        try:
            return store.patiently(path, lambda: _attempt(uri, path, shard, read))
        except FileNotFoundError:
            raise damaged(uri, path, "is in the manifest but missing") from None
        except LayoutError as error:  # the right number of bytes, but wrong bytes: the store or the network
            unreadable += 1
            if unreadable == _TIMES_UNREADABLE:
                raise damaged(uri, path, str(error)) from None


def _other_size(found: int, expected: int) -> str:
    return f"{found} bytes; accepted: {expected}, as in the manifest"


class _Opened:
    """A shard's open file and footer; by the lock, one thread requests them and the others wait."""

    def __init__(self, files: pafs.FileSystem) -> None:
        self.files = files
        self.lock = threading.Lock()
        self.file: ShardFile | None = None

    def open(self, uri: str, path: str, inner: str, shard: Shard) -> ShardFile:
        with self.lock:
            if self.file is None:
                file = self.files.open_input_file(inner)  # requests the size
                size = file.size()
                if size != shard.num_bytes:
                    raise damaged(uri, path, _other_size(size, shard.num_bytes))
                read_at = partial(store.read_range, file)
                self.file = ShardFile(read_at, _read_footer(read_at, size))
            return self.file


_opened: OrderedDict[tuple[str, str], _Opened] = OrderedDict()
_opened_lock = threading.Lock()


def _attempt(uri: str, path: str, shard: Shard, read: Callable[[ShardFile], T]) -> T:
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
        return read(opened.open(uri, path, inner, shard))
    except Exception:
        # The next attempt begins with the size: the object may have changed.
        with _opened_lock:
            if _opened.get(key) is opened:
                del _opened[key]
        raise


def _read_footer(read_at: ReadAt, size: int) -> Footer:
    tail = read_at(max(0, size - _FOOTER_BYTES), min(size, _FOOTER_BYTES))
    length = footer_length(tail)
    if length > size:
        raise LayoutError("its footer is longer than the file")
    if length > len(tail):
        tail = read_at(size - length, length)
    return read_footer(bytes(tail[-length:]), size)


def _group(footer: Footer, number: int, num_rows: int) -> Group:
    group = footer.group(number)
    if group.num_rows != num_rows:
        raise LayoutError("not the rows of the manifest")
    return group


def _whole_group(file: ShardFile, shard: Shard, number: int, num_rows: int) -> Pieces:
    """Read all columns in one request and append a footer."""
    group = _group(file.footer, number, num_rows)
    data = memoryview(file.read_at(group.start, group.stop - group.start))
    if len(data) != group.stop - group.start:
        raise LayoutError("ends inside a row group")
    expected = shard.checksum(number)
    if not expected:
        _check_pages(file.footer, group, data)
    elif checksum([data]) != expected:
        raise LayoutError(f"row group {number} does not have the manifest's checksum")
    bodies: dict[str, Pieces] = {name: [] for name in file.footer.columns}
    bodies[file.footer.columns[0]] = [data]  # one piece for all
    return group_file(file.footer, group, bodies)


def _check_pages(footer: Footer, group: Group, data: memoryview) -> None:
    """Raise LayoutError unless the pages can be read: a cache must not keep damage, as the shard may be repaired."""

    def read_at(offset: int, n: int) -> memoryview:
        return data[offset - group.start :][:n]

    value_extents(read_at, group.chunks[footer.columns.index("image")])
    read_columns(read_at, footer, group, [name for name in footer.columns if name != "image"])
