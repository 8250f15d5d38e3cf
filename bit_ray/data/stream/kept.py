"""How much the cache of a node keeps: within a bound and what the disk has free, and other sets give way.

The file ``usage`` has the total bytes of the kept entries, under a lock that ends with its holder. A killed process may
leave the count too high; then it is counted again.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Always left free on the disk: this share of it, or this number of bytes if that is less.
_FREE_SHARE, _FREE_BYTES = 0.05, 2 * 10**9
# A set used more recently than this is not evicted: two runs side by side would evict each other all the time.
_IN_USE_S = 180.0
# Evicted at a time, so that a directory is not searched for every entry.
_EVICT_SHARE = 1 / 64
# How long a count that says the cache is full is trusted; a killed process may leave it too high.
_RECOUNT_S = 600.0


class Kept:
    """The entries that stay: those in ``sets``, and those in ``partial`` that will.

    Args:
        directory: Of the cache.
        max_bytes: Most bytes of them.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._directory, self._sets, self._partial = directory, directory / "sets", directory / "partial"

    def give_back(self, size: int) -> None:
        """Take an entry that was not written out of the count."""
        with self._usage() as usage:
            usage.num_bytes -= size

    def forget(self) -> None:
        """Have everything counted again: a file that may have been counted was deleted."""
        with self._usage() as usage:
            usage.counted = 0.0

    def reserve(self, directory: Path, partial: int, size: int) -> bool:
        """Count an entry of ``directory`` as kept if room can be made; its partial file gets its size."""
        with self._usage() as usage:
            short = self._short(usage, size)
            if short > 0 and size <= self.max_bytes:
                if not 0 <= time.time() - usage.counted < _RECOUNT_S:
                    usage.num_bytes, usage.counted = self._count(), time.time()
                    short = self._short(usage, size)
                if short > 0:
                    usage.num_bytes -= self._evict(directory, short + int(self.max_bytes * _EVICT_SHARE))
                    short = self._short(usage, size)
            if short > 0:
                return False
            usage.num_bytes += size
            usage.write()  # first: if killed here, the count is too high, which the next count corrects
            os.ftruncate(partial, size)
            return True

    def _short(self, usage: "_Usage", size: int) -> int:
        return max(usage.num_bytes + size - self.max_bytes, size - self.free())

    def free(self) -> int:
        """Return bytes that may still be written to the disk."""
        disk = os.statvfs(self._directory)
        return disk.f_bavail * disk.f_frsize - int(min(disk.f_blocks * disk.f_frsize * _FREE_SHARE, _FREE_BYTES))

    def _count(self) -> int:
        directories = [self._partial, *(Path(entry.path) for entry in entries(self._sets))]
        return sum(size_of(entry) for directory in directories for entry in entries(directory))

    def _evict(self, directory: Path, wanted: int) -> int:
        """Delete entries of other sets, those of the least recently used set first; return how many bytes."""
        others = []
        for entry in entries(self._sets):
            with suppress(FileNotFoundError):
                others.append((entry.stat().st_mtime, Path(entry.path)))
        evicted = 0
        for used, other in sorted(others):
            if other == directory or evicted >= wanted or time.time() - used < _IN_USE_S:
                continue
            for entry in entries(other):
                if evicted >= wanted:
                    break
                size = size_of(entry)
                Path(entry.path).unlink(missing_ok=True)
                evicted += size
            with suppress(OSError):
                other.rmdir()
            with suppress(FileNotFoundError):
                os.utime(other, (used, used))  # deleting does not help
        return evicted

    @contextmanager
    def _usage(self) -> Iterator["_Usage"]:
        """Lock and read the count of kept bytes, and write it back."""
        descriptor = os.open(self._directory / "usage", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            usage = _Usage(descriptor)
            if usage.counted < 0:
                usage.num_bytes, usage.counted = self._count(), time.time()
            yield usage
            usage.write()
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


class _Usage:
    """The count of kept bytes, and the time of the last full count over all files."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        try:
            num_bytes, counted = os.pread(descriptor, 64, 0).split()
            self.num_bytes, self.counted = int(num_bytes), float(counted)
        except ValueError:
            self.num_bytes, self.counted = 0, -1.0  # never

    def write(self) -> None:
        os.pwrite(self._descriptor, f"{self.num_bytes:020d} {self.counted:020.3f}\n".encode(), 0)


def entries(directory: Path) -> Iterator[os.DirEntry[str]]:
    """Yield what is in a directory; nothing if it is gone."""
    with suppress(FileNotFoundError), os.scandir(directory) as found:
        yield from found


def size_of(entry: os.DirEntry[str]) -> int:
    """Return the bytes of a file, 0 if it is gone."""
    with suppress(FileNotFoundError):
        return entry.stat().st_size
    return 0
