"""The node's cache of row groups from object stores: on disk, bounded, shared by all processes of the node.

An epoch visits every row group once, in random order. For a set that does not fit, a cache that evicts the least
recently used entry would delete each entry before its next use. So the entries of a set never evict each other: what
fits stays, and is a hit in every later epoch (Mohan et al., Analyzing and Mitigating Data Stalls in DNN Training, VLDB
2021, section 4.1). Other sets are evicted, the least recently used first, except sets used in the last minutes. An
entry without room passes through: it is written for its reader, and for neighbours that need it soon, and is not kept.

Below the directory, each file a Parquet file of one row group:
  sets/<set>/<set>-<shard>-<group>.parquet               kept entries; the file ``usage`` has their total bytes
  passing/<set>-<shard>-<group>.parquet                  the latest that were not kept, up to a small share of the bound
  passing/<set>-<shard>-<group>.parquet.<time>-<number>  a reader's own hard link to one, unlinked after opening
  partial/<set>-<shard>-<group>.parquet                  being fetched: the holder of its flock fetches, others wait
A set is identified by its URI and its manifest's digest together, so that no set gets data of another set.
Files get their final names when they are complete, and a lock ends with its holder, so a process may be killed at any
moment.
"""

import errno
import fcntl
import hashlib
import os
import stat
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from bit_ray import store
from bit_ray.data.shards.fetch import fetch_group, local_group
from bit_ray.data.shards.footer import MAGIC
from bit_ray.data.shards.manifest import Shard
from bit_ray.data.shards.row_group import Pieces
from bit_ray.data.stream.kept import Kept, entries, size_of
from bit_ray.data.stream.settings import CacheConfig
from bit_ray.errors import DataError
from bit_ray.locks import is_at

# Share of the bound, and most bytes, of entries that pass through and stay for neighbours and the next window.
_PASSING_SHARE, _PASSING_BYTES = 1 / 8, 2 * 10**9
# A link that no reader has opened for this long has no reader; a reader that comes later locates again.
_STALE_S = 1800.0


class Located(NamedTuple):
    """Where a row group can be read on this node."""

    path: str
    """Local shard, or a Parquet file of this one row group."""
    group: int
    """Number of the row group in that file."""
    fetched_bytes: int
    """Bytes that were fetched for it now; 0 if it was on the node."""
    hit: bool
    """Whether it was on the node."""
    transient: bool
    """Whether the reader must unlink the file after opening it; no other reader uses it."""


class NodeCache:
    """The cache of this node; all objects with the same directory, in any process and thread, share it."""

    def __init__(self, config: CacheConfig) -> None:
        default = Path(tempfile.gettempdir()) / f"bit_ray_cache-{os.getuid()}"
        self.directory = Path(config.directory).expanduser().absolute() if config.directory else default
        self._is_default = not config.directory
        self._sets, self._passing, self._partial = (self.directory / n for n in ("sets", "passing", "partial"))
        num_bytes = int(config.max_gb * 1e9)
        self._max_passing = int(min(num_bytes * _PASSING_SHARE, _PASSING_BYTES))
        self._kept = Kept(self.directory, num_bytes - self._max_passing)

    def locate(self, set_uri: str, set_key: str, shard: Shard, group: int, row_group_size: int) -> Located:
        """Return a local file that has a row group; fetch the group if it is not on this node.

        The file of a remote set may be evicted before it is opened: on FileNotFoundError, locate again.

        Args:
            set_uri: The shard set.
            set_key: Digest of its manifest.
            shard: The shard.
            group: Number of the row group in the shard.
            row_group_size: Rows of every row group except a shard's last.

        Raises:
            DamagedShardError: The shard is missing, or not what the manifest says.
            DataError: The store refuses or cannot be reached, or the directory cannot be written.
        """
        if store.is_local(set_uri):
            path = local_group(set_uri, shard, group, _rows(shard, group, row_group_size))
            return Located(path, group, 0, True, False)
        of_set = hashlib.sha256(f"{set_key} {set_uri}".encode()).hexdigest()[:32]
        name = f"{of_set}-{shard.sha256[:32]}-{group:05d}.parquet"
        kept = self._sets / of_set / name
        with self._explained():
            self._prepare()
            self._use(kept.parent)
            if _is_whole(kept):
                return Located(str(kept), 0, 0, True, False)
            with self._turn(self._partial / name) as partial:  # one process fetches, its neighbours wait here
                if _is_whole(kept):
                    return Located(str(kept), 0, 0, True, False)
                passing = self._passing / name
                if _is_whole(passing) and (link := self._link(passing)):
                    return Located(link, 0, 0, True, True)
                num_rows = _rows(shard, group, row_group_size)
                pieces = fetch_group(set_uri, shard, group, num_rows)
                return self._keep(kept, partial, pieces)

    def discard(self, found: Located) -> None:
        """Delete an entry that is damaged on this node's disk, so that the next `locate` fetches it again."""
        path = Path(found.path)
        if self.directory in path.parents:
            with self._explained():
                path.unlink(missing_ok=True)
                self._kept.forget()

    def _keep(self, kept: Path, partial: int, pieces: Pieces) -> Located:
        """Write fetched data and give the file its final name, among the kept entries if there is room."""
        size = sum(map(len, pieces))
        fits = self._kept.reserve(kept.parent, partial, size)
        try:
            with open(partial, "wb", closefd=False, buffering=0) as file:
                for piece in pieces:
                    rest = memoryview(piece)
                    while rest:
                        rest = rest[file.write(rest) :]
        except BaseException:
            if fits:
                self._kept.give_back(size)
            raise
        written = self._partial / kept.name
        if fits:
            try:
                written.replace(kept)
            except FileNotFoundError:  # the directory was empty, and was removed as unused
                kept.parent.mkdir(parents=True, exist_ok=True)
                written.replace(kept)
            return Located(str(kept), 0, size, False, False)
        link = self._link(written)
        assert link is not None, "it is ours until our turn ends"
        with suppress(FileNotFoundError):
            written.replace(self._passing / kept.name)
        self._trim_passing()
        return Located(link, 0, size, False, True)

    def _link(self, source: Path) -> str | None:
        """Return a new link of a reader to a file that passes through, None if there is no such file."""
        link = self._passing / f"{source.name}.{int(time.time())}-{uuid.uuid4().hex[:12]}"
        try:
            os.link(source, link)
        except FileNotFoundError:
            return None
        except OSError:  # a file system without hard links: no sharing
            source.replace(link)
        return str(link)

    def _trim_passing(self) -> None:
        """Delete all files that pass through except the latest, and links whose readers never came."""
        room = self._max_passing if self._kept.free() > 0 else 0
        files = []
        for entry in entries(self._passing):
            _, is_link, link = entry.name.partition(".parquet.")
            with suppress(FileNotFoundError):
                if not is_link:
                    files.append((entry.stat().st_mtime, size_of(entry), Path(entry.path)))
                elif time.time() - int(link.partition("-")[0]) > _STALE_S:
                    os.unlink(entry.path)
        for _, size, path in sorted(files, reverse=True):
            room -= size
            if room < 0:
                path.unlink(missing_ok=True)

    def _prepare(self) -> None:
        """Make the directories and, once in each process, remove files that dead processes left behind."""
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self._is_default:
            _check_private(self.directory)
        for directory in (self._sets, self._passing, self._partial):
            directory.mkdir(exist_ok=True)
        with _prepared_lock:
            if self.directory in _prepared:
                return
            _prepared.add(self.directory)
        for entry in entries(self._partial):
            with suppress(FileNotFoundError), open(entry.path, "rb") as file, suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if is_at(file.fileno(), Path(entry.path)):
                    os.unlink(entry.path)
                    self._kept.forget()
        self._trim_passing()

    def _use(self, directory: Path) -> None:
        """Record that a set is used: its directory's modification time is the time of the last use."""
        try:
            os.utime(directory)
        except FileNotFoundError:
            directory.mkdir(exist_ok=True)

    @contextmanager
    def _turn(self, path: Path) -> Iterator[int]:
        """Wait until no other process or thread holds the partial file; yield its descriptor, with the file empty."""
        while True:
            partial = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(partial, fcntl.LOCK_EX)
                if not is_at(partial, path):
                    continue  # its holder has renamed or removed it
                os.ftruncate(partial, 0)
                try:
                    yield partial
                finally:
                    if is_at(partial, path):
                        path.unlink()
                return
            finally:
                fcntl.flock(partial, fcntl.LOCK_UN)  # a forked child may hold a copy of the descriptor
                os.close(partial)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            what = "its disk is full" if full else f"cannot be written ({error.strerror or error})"
            accepted = "a directory on a local disk that can be written and has room"
            remedy = "choose another, or make room"
            given = f"{self.directory}: {what}"
            raise DataError.of("runtime.cache.directory", given, accepted, remedy) from error


_prepared: set[Path] = set()
_prepared_lock = threading.Lock()


def _check_private(directory: Path) -> None:
    """Raise PermissionError if another user can put files there; the default's name is known to every user."""
    status = os.lstat(directory)
    if stat.S_ISLNK(status.st_mode):
        raise PermissionError(errno.EPERM, "is a symbolic link")
    if status.st_uid != os.getuid():
        raise PermissionError(errno.EPERM, "belongs to another user")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(errno.EPERM, "can be written by other users")


def _rows(shard: Shard, group: int, row_group_size: int) -> int:
    return min(row_group_size, shard.num_examples - group * row_group_size)


def _is_whole(path: Path) -> bool:
    """Return whether a file exists and has its end; a power failure may truncate a file with its final name."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return os.pread(descriptor, 4, max(0, os.fstat(descriptor).st_size - 4)) == MAGIC
    finally:
        os.close(descriptor)
