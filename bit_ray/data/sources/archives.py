"""Archives as publishers distribute them: where the bytes of each member are, so that each can be read alone.

A plain tar file is read in place. In a compressed one that is not possible: it is decompressed once, to a ``.tar`` next
to it.
"""

import gzip
import io
import logging
import os
import shutil
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pyarrow as pa

from bit_ray import store
from bit_ray.data.sources.tar import TarError, regular_files
from bit_ray.errors import DataError
from bit_ray.locks import whole

log = logging.getLogger(__name__)

MAX_WHOLE_BYTES = 2**30
"""Largest file that is read as a whole: the scenes of CLEVR are 200 MB, a split of CIFAR-100 is 155 MB."""
_COMPRESSED = (".tar.gz", ".tgz")
_GZIP = b"\x1f\x8b"
# Lists and tables compress to a tenth of their size, masks perhaps to a fiftieth; zeros to a thousandth.
_MAX_RATIO, _ANY_RATIO_BYTES = 100, 2**24
_COPY_BYTES = 16 * 2**20
# Headers are read one by one; from an object store each would be a request, so more bytes are read at once.
_LOCAL_BUFFER, _REMOTE_BUFFER = 8 * 2**10, 256 * 2**10


class Member(NamedTuple):
    """A file inside an archive or folder: ``length`` bytes of ``file`` from byte ``offset`` on."""

    name: str
    file: str
    offset: int
    length: int


def members(path: str | Path) -> Iterator[Member]:
    """Iterate over the regular files of a folder, a tar file or a compressed tar file, in their order there.

    Raises:
        DataError: Not a tar file, or one that is damaged or cut short.
    """
    if store.is_local(path) and Path(path).is_dir():
        for name, length in store.list_tree(path)[0]:
            yield Member(name, store.join(path, name), 0, length)
    else:
        yield from tar_members(decompressed(path))


def tar_members(file: str | Path, start: int = 0, length: int | None = None) -> Iterator[Member]:
    """Iterate over the regular files of a tar file, or of one that is stored uncompressed inside ``file``.

    Args:
        file: Path or URI.
        start: Byte at which the tar file begins.
        length: Its number of bytes; None: up to the end.

    Raises:
        DataError: Not a tar file, or one that is damaged or cut short.
    """
    with store.open_file(file) as opened:
        end = opened.size() if length is None else start + length
        if end > opened.size():
            raise DataError(f"{file}: damaged or incomplete tar file ({opened.size():,} bytes); fetch it again")
        raw = io.BufferedReader(_Range(opened, start, end), _LOCAL_BUFFER if store.is_local(file) else _REMOTE_BUFFER)
        with store.explained(file), _damage_explained(file):
            for found in regular_files(raw, end - start):
                yield Member(found.name.removeprefix("./"), str(file), start + found.offset, found.length)


def read_members(path: str | Path, names: Collection[str]) -> dict[str, bytes]:
    """Read some files of at most ``MAX_WHOLE_BYTES`` by name from a folder, a tar file or a compressed tar file.

    Args:
        path: A local path.
        names: As in the archive; for a folder, relative to it or to its parent folder.

    Raises:
        DataError: One of them is missing or too large, or the archive is damaged, or unpacks to 100 times its size.
    """
    found: dict[str, bytes] = {}
    if Path(path).is_dir():
        for name in names:
            for where in (Path(path) / name, Path(path).parent / name):
                if where.is_file():
                    found[name] = store.read_bytes(where, MAX_WHOLE_BYTES)
                    break
    else:
        store.check_file(path)
        with store.explained(path), open(path, "rb") as file, _damage_explained(path):
            num_bytes = os.path.getsize(path)
            stream: io.BufferedIOBase = file
            if file.read(2) == _GZIP:
                stream, num_bytes = unpacked(path, file)
            for member in regular_files(stream, num_bytes):
                name = member.name.removeprefix("./")
                if name in names:
                    if member.length > MAX_WHOLE_BYTES:
                        raise TarError(f"{name} has {member.length:,} bytes, more than {MAX_WHOLE_BYTES:,}")
                    stream.seek(member.offset)
                    found[name] = stream.read(member.length)
                    if len(found[name]) < member.length:
                        raise TarError(f"it ends inside {name}")
                if len(found) == len(names):
                    break
    for name in names:
        if name not in found:
            raise DataError(f"{path}: no {name} in it; accepted: the publisher's archive, unchanged; fetch it again")
    return found


def as_text(data: bytes, where: str | Path) -> str:
    """Return the content of a text file; ``where`` is its name in messages.

    Raises:
        DataError: It is not UTF-8.
    """
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise DataError(f"{where}: not text in UTF-8; accepted: the publisher's file; fetch it again") from None


def decompressed(path: str | Path) -> str:
    """Return the path of the plain tar file: the path itself, or for a compressed one its ``.tar`` next to it.

    Raises:
        DataError: The archive is damaged or unpacks to 100 times its size, the disk is full, or the folder cannot be
            written to.
    """
    text = str(path)
    suffix = next((suffix for suffix in _COMPRESSED if text.endswith(suffix)), None)
    if suffix is None:
        return text
    if not store.is_local(text):
        raise DataError(f"{text}: compressed, in an object store; accepted: plain .tar files there; decompress it")
    tar = text.removesuffix(suffix) + ".tar"
    if not os.path.exists(tar) or os.path.getmtime(tar) < os.path.getmtime(text):
        store.check_file(text)
        free = shutil.disk_usage(os.path.dirname(os.path.abspath(text))).free
        if free < os.path.getsize(text):
            raise DataError(
                f"{text}: to be decompressed in its folder, but only {free / 1e9:.1f} GB are free; make space, or "
                f"decompress it elsewhere and link {tar} to it"
            )
        log.info("%s: decompressing it to %s, once", text, os.path.basename(tar))
        target = Path(tar)
        with (
            store.explained(tar),
            open(text, "rb") as source,
            whole(target) as unfinished,
            open(unfinished, "wb") as plain,
            _damage_explained(text),
        ):
            shutil.copyfileobj(unpacked(text, source)[0], plain, _COPY_BYTES)
    return tar


def unpacked(path: str | Path, file: BinaryIO) -> tuple[io.BufferedReader, int]:
    """Return a gzip file as an unpacked stream, to be read forwards, and the most bytes it may unpack to.

    Reading beyond that limit raises a TarError.
    """
    file.seek(0)
    max_bytes = max(_ANY_RATIO_BYTES, _MAX_RATIO * os.path.getsize(path))
    return io.BufferedReader(_Unpacked(gzip.GzipFile(fileobj=file), max_bytes)), max_bytes


class _Unpacked(io.RawIOBase):
    """The unpacked content of a gzip file, forwards only."""

    def __init__(self, source: gzip.GzipFile, max_bytes: int) -> None:
        self._source, self._max_bytes, self._at = source, max_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET, whence
        while self._at < offset and self._next(offset - self._at):
            pass
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._next(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _next(self, num_bytes: int) -> bytes:
        data = self._source.read(min(num_bytes, _COPY_BYTES))
        self._at += len(data)
        if self._at > self._max_bytes:
            raise TarError(f"it unpacks to more than {self._max_bytes:,} bytes, {_MAX_RATIO} times its size")
        return data


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
    except (TarError, zlib.error, EOFError, gzip.BadGzipFile) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: damaged or incomplete tar file ({reason}); fetch it again") from None
