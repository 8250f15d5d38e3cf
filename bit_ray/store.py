"""Files by URI: a local path, ``file://``, ``s3://`` or ``gs://``, through one small set of functions.

Writes are atomic: a local file is written under another name and renamed, an object appears when its upload is
complete.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from pyarrow import fs as pafs

from bit_ray.config import MAX_DOCUMENT_BYTES, from_dict
from bit_ray.errors import ConfigError, DataError
from bit_ray.locks import partial, whole
from bit_ray.store_access import absolute as absolute
from bit_ray.store_access import check_uri as check_uri
from bit_ray.store_access import filesystem as filesystem
from bit_ray.store_access import is_local as is_local
from bit_ray.store_access import join as join
from bit_ray.store_access import scheme_of
from bit_ray.store_failures import PATIENCE_S as PATIENCE_S
from bit_ray.store_failures import explained as explained
from bit_ray.store_failures import failure as failure
from bit_ray.store_failures import patiently as patiently

_NUM_THREADS = 32
_COPY_BYTES = 16 * 2**20
T = TypeVar("T")


class UnfitFileError(DataError):
    """A file that exists but must not be read: a pipe, a device, or larger than accepted."""

    def __init__(self, uri: str | Path, reason: str) -> None:
        self.uri, self.reason = uri, reason
        super().__init__(f"{uri}: {reason}")


def exists(uri: str | Path) -> bool:
    """Return whether a file or directory exists."""
    files, path = filesystem(uri)
    with explained(uri):
        return bool(files.get_file_info(path).type != pafs.FileType.NotFound)


def check_file(uri: str | Path) -> None:
    """Make sure that a path is a file before it is opened: opening a pipe or a device may wait or read without end.

    Symbolic links are followed; an object is always a file. A missing path is no error here, but when it is opened.

    Raises:
        UnfitFileError: It is a pipe, a socket, a device or a directory.
    """
    if not is_local(uri):
        return
    try:
        mode = os.stat(filesystem(uri)[1]).st_mode
    except (OSError, ValueError):
        return
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a directory"}
        raise UnfitFileError(uri, f"{kinds.get(stat.S_IFMT(mode), 'a device')}; accepted: a file; correct the path")


def open_file(uri: str | Path) -> pa.NativeFile:
    """Open a file for reading.

    Raises:
        StoreError: No such file, or the store cannot be reached or refuses.
        UnfitFileError: It is not a regular file.
    """
    files, path = filesystem(uri)
    check_file(uri)
    with explained(uri):
        return files.open_input_file(path)


def read_bytes(uri: str | Path, max_bytes: int | None = None) -> bytes:
    """Return the whole content of a file, of at most ``max_bytes``.

    Raises:
        StoreError: No such file, or the store cannot be reached or refuses.
        UnfitFileError: It is not a regular file, or is larger; nothing of it is read then.
    """
    files, path = filesystem(uri)
    check_file(uri)

    def check(size: int) -> None:
        if max_bytes is not None and size > max_bytes:
            raise UnfitFileError(uri, f"{size:,} bytes; accepted: at most {max_bytes:,}; correct the file")

    def read() -> bytes:
        if scheme_of(uri) == "gs":
            # pyarrow asks for the whole object, with Python's lock held, when the size of an open one is asked for.
            size = files.get_file_info(path).size
            if size is not None:
                check(size)
            with files.open_input_stream(path) as stream:
                data = bytes(stream.read())
            if len(data) != size:
                raise OSError(f"{len(data)} bytes came, of {size}")
            return data
        with files.open_input_file(path) as file:
            check(file.size())
            return bytes(read_range(file, 0, file.size()))

    with explained(uri):
        return patiently(uri, read, patience_s=5.0)


def read_range(file: pa.NativeFile, start: int, num_bytes: int) -> memoryview:
    """Return ``num_bytes`` of an open file from byte ``start`` on; any number of threads may read one file.

    Raises:
        OSError: There are fewer. The file system itself accepts an answer that is too short, and does not fill the
            remaining memory.
    """
    data = np.empty(num_bytes, np.uint8).data  # not bytearray, which would fill it with zeros first
    mark = os.urandom(min(16, num_bytes))
    data[num_bytes - len(mark) :] = mark
    with file.get_stream(start, num_bytes) as stream:
        got = stream.readinto(data) if num_bytes else 0
    if got != num_bytes or (len(mark) == 16 and data[-16:] == mark):
        raise OSError(f"the answer was too short: less than {num_bytes} bytes")
    return data


def read_json(
    uri: str | Path, object_hook: Callable[[dict[str, Any]], Any] | None = None, max_bytes: int | None = None
) -> Any:
    """Return the content of a JSON file, each object in it replaced by the result of ``object_hook``.

    Raises:
        DataError: No such file, one of more than ``max_bytes``, or not a complete JSON text.
    """
    with suppress(ValueError, RecursionError):
        return json.loads(read_bytes(uri, max_bytes), object_hook=object_hook)
    # An object that is replaced by a longer one between the question for its size and the reading is cut off.
    try:
        return json.loads(read_bytes(uri, max_bytes), object_hook=object_hook)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{uri}: not valid JSON ({reason}), perhaps truncated; restore or rewrite the file") from None


def read_record(
    cls: type[T],
    uri: str | Path,
    remedy: str = "restore the file",
    *,
    max_bytes: int | None = MAX_DOCUMENT_BYTES,
) -> T:
    """Return the dataclass in a JSON file; ``remedy`` is the advice in the error.

    Raises:
        DataError: No such file, one of more than ``max_bytes``, not JSON, or not the fields of this dataclass.
    """
    plain = read_json(uri, max_bytes=max_bytes)
    try:
        json.dumps(plain, ensure_ascii=False).encode()  # a lone surrogate cannot be written
        return from_dict(cls, plain)
    except (ValueError, RecursionError) as error:  # ConfigError is one of them
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{uri}: {reason}; {remedy}") from None


def write_bytes(uri: str | Path, data: bytes) -> None:
    """Write a file, completely or not at all, and make its parent directories."""
    files, path = filesystem(uri)
    google = scheme_of(uri) == "gs"

    def write() -> None:
        with renamed(uri, path) as target, files.open_output_stream(target) as stream:
            stream.write(data)
        if google:
            _check_size(uri, len(data))

    with explained(uri):
        patiently(uri, write, patience_s=60.0 if google else 0.0)


def write_json(uri: str | Path, data: Any) -> None:
    """Write plain data as JSON text, completely or not at all."""
    write_bytes(uri, json.dumps(data, ensure_ascii=False, indent=1).encode() + b"\n")


def upload_file(local: str | Path, uri: str | Path) -> None:
    """Copy a local file to the URI, completely or not at all; to an object store with retries, see `patiently`."""
    files, path = filesystem(uri)

    def copy() -> None:
        with renamed(uri, path) as target:
            pafs.copy_files(os.path.abspath(local), target, pafs.LocalFileSystem(), files, chunk_size=_COPY_BYTES)
        _check_size(uri, os.stat(local).st_size)

    with explained(uri):
        patiently(uri, copy)


def _check_size(uri: str | Path, num_bytes: int) -> None:
    """Make sure that what was written is there with its size.

    Google's uploads are resumed after an error, and one that was resumed wrongly ends without an error in an empty
    object.
    """
    files, path = filesystem(uri)
    if (found := files.get_file_info(path).size) != num_bytes:
        raise OSError(f"{found} bytes are there, of {num_bytes} that were written")


def download_file(uri: str | Path, local: str | Path) -> None:
    """Copy a file to a local path, completely or not at all."""
    files, path = filesystem(uri)
    check_file(uri)
    with explained(uri), renamed(local, os.path.abspath(local)) as target:
        pafs.copy_files(path, target, files, pafs.LocalFileSystem(), chunk_size=_COPY_BYTES)


def download_directory(uri: str | Path, local: str | Path) -> None:
    """Copy a directory with all its content to the local path, absent or empty before; completely or not at all.

    Raises:
        DataError: No such directory, the local path is not empty, or the store cannot be reached or refuses.
    """
    local = Path(local).absolute()
    if local.is_file() or (local.is_dir() and any(local.iterdir())):
        raise DataError(f"{local}: not empty; accepted: a new or empty directory to copy {uri} to; choose another")
    relative = list_files(uri)
    if not relative:
        raise DataError(f"{uri}: no such directory, or empty; check the path")
    with explained(local):
        local.parent.mkdir(parents=True, exist_ok=True)
        with partial(local, directory=True) as unfinished:
            with ThreadPoolExecutor(_NUM_THREADS) as pool:
                list(pool.map(lambda name: download_file(join(uri, name), unfinished / name), relative))
            unfinished.replace(local)


def list_files(uri: str | Path) -> list[str]:
    """Return the paths of all files below a directory, relative to it, sorted; none if it does not exist."""
    return [name for name, _ in list_tree(uri)[0]]


def list_tree(uri: str | Path, *, recursive: bool = True) -> tuple[list[tuple[str, int]], list[str]]:
    """Return the files (relative path, bytes) and the directories below ``uri``, each sorted.

    Pipes and devices count as files of no bytes, so that opening one gives an error. Without ``recursive``, only those
    directly below.

    Raises:
        DataError: A name that is not UTF-8.
    """
    files, path = filesystem(uri)
    flat = scheme_of(uri) == "gs"  # pyarrow lists Google's objects, all of them, and no directories
    with explained(uri):
        infos = files.get_file_info(pafs.FileSelector(path, recursive=recursive or flat, allow_not_found=True))
    try:
        found = [(info.path[len(path) :].strip("/"), info) for info in infos]
    except UnicodeDecodeError as error:
        name = os.fsdecode(error.object)
        raise DataError(f"{name}: the name is not UTF-8; accepted: names in UTF-8; rename it") from None
    is_file = (pafs.FileType.File, pafs.FileType.Unknown)
    sizes = [(name, int(info.size or 0)) for name, info in found if info.type in is_file]
    directories = {name for name, info in found if info.type == pafs.FileType.Directory and name}
    if flat:
        directories |= {name[: slash.start()] for name, _ in found for slash in re.finditer("/", name)}
        if not recursive:
            sizes = [(name, size) for name, size in sizes if "/" not in name]
            directories = {name for name in directories if "/" not in name}
    return sorted(sizes), sorted(directories)


def file_sizes(uris: Iterable[str]) -> list[int | None]:
    """Return the size in bytes of each file, None for a missing one; with parallel requests."""

    def size(uri: str) -> int | None:
        files, path = filesystem(uri)
        with explained(uri):
            info = files.get_file_info(path)
        return int(info.size) if info.type == pafs.FileType.File else None

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return list(pool.map(size, uris))


def delete_files(uris: Iterable[str]) -> None:
    """Delete the files; missing ones are no error."""

    def delete(uri: str) -> None:
        files, path = filesystem(uri)
        with explained(uri):
            if files.get_file_info(path).type == pafs.FileType.File:
                files.delete_file(path)

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        list(pool.map(delete, uris))


def delete_directory(uri: str | Path) -> None:
    """Delete a directory with all files below it; a missing one is no error."""
    files, path = filesystem(uri)
    with explained(uri):
        # Deleting file by file would leave an object that stands for the empty directory.
        if files.get_file_info(path).type == pafs.FileType.Directory:
            if scheme_of(uri) == "gs":
                files.delete_dir_contents(path, missing_dir_ok=True)  # the whole of a directory without that object
                if files.get_file_info(path).type == pafs.FileType.NotFound:
                    return
            files.delete_dir(path)


@contextmanager
def renamed(uri: str | Path, path: str) -> Iterator[str]:
    """Yield the path to write to: an object's own, or for a local file another that is renamed at the end."""
    if not is_local(uri):
        yield path
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with whole(Path(path)) as unfinished:
        yield str(unfinished)


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a local file, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """Return this user's cache folder, absolute: ``$BIT_RAY_CACHE`` if set and not empty, else ``~/.cache/bit_ray``.

    Raises:
        ConfigError: It is in the home folder, and that is not known.
    """
    folder = os.environ.get("BIT_RAY_CACHE") or "~/.cache/bit_ray"
    try:
        return Path(folder).expanduser().absolute()
    except RuntimeError:
        raise ConfigError(
            f"BIT_RAY_CACHE: {folder}: no such home folder; accepted: a folder; set it to an absolute path"
        ) from None
