"""Archives as publishers distribute them: where the bytes of each member lie, so that any of them is read alone.

A plain tar file is read in place. A compressed one has no such places: it is decompressed once, to a ``.tar`` beside
it.
"""

import gzip
import io
import logging
import os
import shutil
import tarfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from bit_ray.data import store
from bit_ray.errors import DataError

log = logging.getLogger(__name__)

_COMPRESSED = (".tar.gz", ".tgz")
_COPY_BYTES = 16 * 2**20
# Headers are read one by one; from an object store each would be a request, so more is read at once.
_LOCAL_BUFFER, _REMOTE_BUFFER = 8 * 2**10, 256 * 2**10


class Member(NamedTuple):
    """A file inside an archive or folder: ``length`` bytes of ``file`` from byte ``offset`` on."""

    name: str
    file: str
    offset: int
    length: int


def members(path: str | Path) -> Iterator[Member]:
    """Go through the regular files of a folder, a tar file or a compressed tar file, in their order there.

    Raises:
        DataError: not a tar file, or one that is damaged or cut short.
    """
    if store.is_local(path) and Path(path).is_dir():
        for name, length in store.list_tree(path)[0]:
            yield Member(name, store.join(path, name), 0, length)
    else:
        yield from tar_members(decompressed(path))


def tar_members(file: str | Path, start: int = 0, length: int | None = None) -> Iterator[Member]:
    """Go through the regular files of a tar file, or of one that is stored whole inside ``file``.

    Args:
        file: Path or URI.
        start: Byte at which the tar file begins.
        length: Its bytes; without it, up to the end.

    Raises:
        DataError: not a tar file, or one that is damaged or cut short.
    """
    files, path = store.filesystem(file)
    with store.explained(file):
        opened = files.open_input_file(path)
    with opened:
        end = opened.size() if length is None else start + length
        if end > opened.size():
            raise DataError(f"{file}: damaged or not a whole tar file (cut short at {opened.size():,}); fetch it again")
        raw = io.BufferedReader(_Range(opened, start, end), _LOCAL_BUFFER if store.is_local(file) else _REMOTE_BUFFER)
        with _damage_explained(file), tarfile.open(fileobj=raw, mode="r:") as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                if info.isreg():
                    yield Member(info.name.removeprefix("./"), str(file), start + info.offset_data, info.size)
            # tarfile takes a cut between two members, or inside a header, for the end.
            raw.seek(tar.offset)
            if raw.read(512) != bytes(512):
                raise tarfile.ReadError("it ends without an end mark")


def read_members(path: str | Path, names: Collection[str]) -> dict[str, bytes]:
    """Read some small files by name from a folder, a tar file or a compressed tar file, in one pass.

    Args:
        path: A local path.
        names: As in the archive; for a folder, relative to it or to the folder around it.

    Raises:
        DataError: one of them is not there, or the archive is damaged.
    """
    found: dict[str, bytes] = {}
    if Path(path).is_dir():
        for name in names:
            for place in (Path(path) / name, Path(path).parent / name):
                if place.is_file():
                    found[name] = store.read_bytes(place)
                    break
    else:
        with store.explained(path), _damage_explained(path), tarfile.open(path, "r:*") as tar:
            for info in tar:
                name = info.name.removeprefix("./")
                if name in names and info.isreg():
                    stream = tar.extractfile(info)
                    assert stream is not None
                    found[name] = stream.read()
                if len(found) == len(names):
                    break
    for name in names:
        if name not in found:
            raise DataError(f"{path}: has no {name}; accepted: the publisher's archive, unchanged; fetch it again")
    return found


def decompressed(path: str | Path) -> str:
    """Return the path of the plain tar file: the path itself, or for a compressed one its ``.tar`` beside it.

    Raises:
        DataError: the archive is damaged, the disk is full, or the folder cannot be written to.
    """
    text = str(path)
    suffix = next((suffix for suffix in _COMPRESSED if text.endswith(suffix)), None)
    if suffix is None:
        return text
    if not store.is_local(text):
        raise DataError(f"{text}: compressed, in an object store; accepted: plain .tar files there; decompress it")
    tar = text.removesuffix(suffix) + ".tar"
    if not os.path.exists(tar) or os.path.getmtime(tar) < os.path.getmtime(text):
        free = shutil.disk_usage(os.path.dirname(os.path.abspath(text))).free
        if free < os.path.getsize(text):
            raise DataError(
                f"{text}: must be decompressed beside itself, and {free / 1e9:.1f} GB are free; make space, or "
                f"decompress it to {tar} elsewhere and link it there"
            )
        log.info("%s: decompressing it to %s, once", text, os.path.basename(tar))
        with (
            store.explained(tar),
            store.renamed(tar, os.path.abspath(tar)) as partial,
            _damage_explained(text),
            gzip.open(text) as source,
            open(partial, "wb") as target,
        ):
            shutil.copyfileobj(source, target, _COPY_BYTES)
    return tar


class _Range(io.RawIOBase):
    """Bytes ``start`` to ``end`` of an open file, as a file."""

    def __init__(self, file: pa.NativeFile, start: int, end: int) -> None:
        self._file, self._start, self._end = file, start, end
        self._at = start

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = (self._start, self._at, self._end)[whence] + offset
        return self._at - self._start

    def tell(self) -> int:
        return self._at - self._start

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        length = max(0, min(len(buffer), self._end - self._at))
        if length:
            buffer[:length] = store.read_range(self._file, self._at, length)
            self._at += length
        return length


@contextmanager
def _damage_explained(path: str | Path) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: damaged or not a whole tar file ({reason}); fetch it again") from None
