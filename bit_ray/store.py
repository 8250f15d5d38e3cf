"""Files by URI: a local path, ``file://``, ``s3://`` or ``gs://``, through one small set of functions.

Writes are atomic: a local file is written under another name and renamed, an object appears when its upload is
complete.
"""

import hashlib
import json
import os
import random
import re
import socket
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from pyarrow import fs as pafs

from bit_ray.config import MAX_DOCUMENT_BYTES, from_dict
from bit_ray.errors import ConfigError, DataError, StoreError
from bit_ray.locks import partial, whole
from bit_ray.uris import MASK

_REMOTE = ("s3", "gs")
_PUBLIC = "anonymous@"
"""Prefix of a Google bucket that is read without a key."""
_GIVE_KEYS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS",
}
_METADATA_HOST = "metadata.google.internal"
"""Name of what gives machines in Google's cloud their credentials; it is known nowhere else."""
_VARIABLES = ("AWS_", "GOOGLE_", "CLOUD_STORAGE_")
_NUM_THREADS = 32
_COPY_BYTES = 16 * 2**20
T = TypeVar("T")

# How long a read of training data is retried while the store fails, seconds.
PATIENCE_S = float(os.environ.get("BIT_RAY_STORE_PATIENCE_S", "120"))
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 10.0
# Number of attempts of each single request, 25 ms to 3 s apart: at 20 % failures one request in 2,000,000 fails, and a
# store that does not exist fails after 6 s.
_ATTEMPTS = 9


class UnfitFileError(DataError):
    """A file that exists but must not be read: a pipe, a device, or larger than accepted."""

    def __init__(self, uri: str | Path, reason: str) -> None:
        self.uri, self.reason = uri, reason
        super().__init__(f"{uri}: {reason}")


def is_local(uri: str | Path) -> bool:
    """Return whether the URI is a path on this machine, with or without ``file://``."""
    return _scheme(str(uri)) == "file"


def filesystem(uri: str | Path) -> tuple[pafs.FileSystem, str]:
    """Return the file system that serves the URI, and the path inside it.

    An S3 endpoint comes from ``AWS_ENDPOINT_URL`` or from the URI (``s3://bucket/key?endpoint_override=host:port``).
    A public Google bucket is read without credentials as ``gs://anonymous@bucket/path``.

    Raises:
        DataError: the scheme is not one of file, s3 and gs, the bucket is not named, or there is a key in the URI.
        StoreError: there are no credentials for Google's store.
    """
    text = str(uri)
    check_uri(text)
    scheme = _scheme(text)
    if scheme == "file":
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(text.removeprefix("file://")))
    rest, _, query = text.partition("://")[2].partition("?")
    path = rest.strip("/")
    if not path:
        raise DataError(f"{text}: no bucket; accepted: {scheme}://bucket/path; add the bucket")
    if scheme == "s3":
        _check_endpoint()
        # Stores older than AWS's trailing checksums (Ceph, MinIO, rclone) answer them with HTTP 411.
        os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    elif "retry_limit_seconds" not in query:
        query = "&".join(filter(None, (query, "retry_limit_seconds=60")))  # the library's own limit is 15 minutes
    environment = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith(_VARIABLES)))
    with explained(text):
        return _remote(scheme, path.split("/", 1)[0], query, environment), path.removeprefix(_PUBLIC)


def check_uri(uri: str | Path) -> None:
    """Refuse a URI with a key or a password in it: it would be recorded, logged and shown.

    Raises:
        DataError: it has a key or a password, or the scheme is not one of file, s3 and gs.
    """
    text = str(uri)
    scheme = _scheme(text)
    if scheme == "file":
        return
    rest, _, query = text.partition("://")[2].partition("?")
    bucket = rest.strip("/").split("/", 1)[0]
    if re.search("[@:]", bucket.removeprefix(_PUBLIC) if scheme == "gs" else bucket) or "@" in query:
        given = f"{scheme}://{MASK}" + (f"@{text.rpartition('@')[2]}" if "@" in text else "")
        raise DataError(
            f"{given}: a key or a password in a URI, which would be recorded; accepted: {scheme}://bucket/path; "
            f"{_GIVE_KEYS[scheme]}"
        )


def _check_endpoint() -> None:
    """Refuse an endpoint with a password in it, which no store accepts and every message of the library repeats."""
    endpoint = _endpoint()
    if "@" in endpoint:
        raise DataError(
            f"AWS_ENDPOINT_URL: {MASK}@{endpoint.rpartition('@')[2]}: a user in it; accepted: http(s)://host:port; "
            f"{_GIVE_KEYS['s3']}"
        )


def _endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def _check_google_credentials(bucket: str) -> None:
    """Refuse to look for credentials where there are none, which takes Google's library a minute."""
    own = os.path.expanduser("~/.config/gcloud/application_default_credentials.json")  # of `gcloud auth`
    if os.environ.get("GOOGLE_APPLICATION_CREDENTIALS") or os.path.exists(own):
        return
    try:
        socket.getaddrinfo(os.environ.get("GCE_METADATA_ROOT") or _METADATA_HOST, 80)
    except OSError:
        raise StoreError(f"gs://{bucket}: {_no_credentials('none are given')}") from None


def _no_credentials(why: str) -> str:
    return (
        f"no credentials for Google Cloud Storage ({why}); set GOOGLE_APPLICATION_CREDENTIALS to a key file, "
        "run `gcloud auth application-default login`, or write 'anonymous@' before the name of a public bucket"
    )


@lru_cache(maxsize=64)
def _remote(scheme: str, authority: str, query: str, environment: tuple[Any, ...]) -> pafs.FileSystem:
    if scheme == "gs" and not authority.startswith(_PUBLIC):
        _check_google_credentials(authority)
    # Only the bucket goes through the URL parser: keys may have spaces and percent signs.
    files = pafs.FileSystem.from_uri(f"{scheme}://{authority}" + (f"?{query}" if query else ""))[0]
    if scheme != "s3":
        return files
    # from_uri reads AWS_ENDPOINT_URL and finds the bucket's region, but its retries cannot be set, and it retries only
    # a refused connection. Its pickle has the values that it found.
    options = {name: value for name, value in files.__reduce__()[1][0].items() if value not in (None, "", -1.0)}
    del options["proxy_options"]  # from_uri sets none, and empty ones are refused
    return pafs.S3FileSystem(**options, retry_strategy=pafs.AwsDefaultS3RetryStrategy(max_attempts=_ATTEMPTS))


def join(uri: str | Path, *parts: str) -> str:
    """Return the URI of something inside the directory ``uri``, keeping a query such as ``?endpoint_override=...``."""
    base, mark, query = str(uri).partition("?") if not is_local(uri) else (str(uri), "", "")
    return "/".join([base.rstrip("/"), *(part.strip("/") for part in parts)]) + mark + query


def absolute(uri: str | Path) -> str:
    """Return the URI in a form that is also valid in a process with another working directory.

    Raises:
        DataError: the scheme is not one of file, s3 and gs, or there is a key in the URI.
    """
    check_uri(uri)
    return filesystem(uri)[1] if is_local(uri) else str(uri).rstrip("/")


def exists(uri: str | Path) -> bool:
    """Return whether a file or directory exists."""
    files, path = filesystem(uri)
    with explained(uri):
        return bool(files.get_file_info(path).type != pafs.FileType.NotFound)


def check_file(uri: str | Path) -> None:
    """Make sure that a path is a file before it is opened: opening a pipe or a device may wait or read for ever.

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
        StoreError: no such file, or the store cannot be reached or refuses.
        UnfitFileError: It is not a regular file.
    """
    files, path = filesystem(uri)
    check_file(uri)
    with explained(uri):
        return files.open_input_file(path)


def read_bytes(uri: str | Path, max_bytes: int | None = None) -> bytes:
    """Return the whole content of a file, of at most ``max_bytes``.

    Raises:
        StoreError: no such file, or the store cannot be reached or refuses.
        UnfitFileError: It is not a regular file, or is larger; nothing of it is read then.
    """
    files, path = filesystem(uri)
    check_file(uri)

    def check(size: int) -> None:
        if max_bytes is not None and size > max_bytes:
            raise UnfitFileError(uri, f"{size:,} bytes; accepted: at most {max_bytes:,}; correct the file")

    def read() -> bytes:
        if _scheme(str(uri)) == "gs":
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
        OSError: there are fewer. The file system itself accepts an answer that is too short, and does not fill the
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


def patiently(uri: str | Path, attempt: Callable[[], T], patience_s: float | None = None) -> T:
    """Return the result of ``attempt``, with retries while the store fails for temporary reasons.

    The pauses grow from 0.1 s to 10 s, with jitter, so that many readers do not retry at the same time.

    Args:
        uri: What is read, for messages.
        attempt: Reads; exceptions that are not the store's are not retried.
        patience_s: Seconds after which no new attempt starts; by default PATIENCE_S. A local file has one attempt.

    Raises:
        FileNotFoundError: no such file, at once.
        StoreError: the store refuses, at once; or it still fails after ``patience_s``.
    """
    patience_s = PATIENCE_S if patience_s is None else patience_s
    start = time.monotonic()
    longest = _FIRST_PAUSE_S
    while True:
        try:
            return attempt()
        except FileNotFoundError:
            raise
        except (OSError, ValueError, pa.ArrowException) as error:
            if not _is_of_the_store(error):
                raise
            pause = random.uniform(longest / 2, longest)
            elapsed = time.monotonic() - start
            if is_local(uri) or _refusal(error) or elapsed + pause > patience_s:
                tried = f" (tried for {elapsed:.0f} s)" if elapsed > 1 else ""
                raise StoreError(f"{uri}: {_explanation(uri, error)}{tried}") from error
            longest = min(2 * longest, _LONGEST_PAUSE_S)
        time.sleep(pause)


def read_json(
    uri: str | Path, object_hook: Callable[[dict[str, Any]], Any] | None = None, max_bytes: int | None = None
) -> Any:
    """Return the content of a JSON file, each object in it replaced by the result of ``object_hook``.

    Raises:
        DataError: no such file, one of more than ``max_bytes``, or not a complete JSON text.
    """
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
        DataError: no such file, one of more than ``max_bytes``, not JSON, or not the fields of this dataclass.
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

    def write() -> None:
        with renamed(uri, path) as target, files.open_output_stream(target) as stream:
            stream.write(data)

    with explained(uri):
        _wholly(uri, write, len(data))


def write_json(uri: str | Path, data: Any) -> None:
    """Write plain data as JSON text, completely or not at all."""
    write_bytes(uri, json.dumps(data, ensure_ascii=False, indent=1).encode() + b"\n")


def upload_file(local: str | Path, uri: str | Path, *, patience_s: float = 0.0) -> None:
    """Copy a local file to the URI, completely or not at all; see `patiently` for ``patience_s``."""
    files, path = filesystem(uri)

    def copy() -> None:
        with renamed(uri, path) as target:
            pafs.copy_files(os.path.abspath(local), target, pafs.LocalFileSystem(), files, chunk_size=_COPY_BYTES)

    with explained(uri):
        if patience_s and _scheme(str(uri)) == "s3":
            patiently(uri, copy, patience_s)
        else:
            _wholly(uri, copy, os.stat(local).st_size)


def _wholly(uri: str | Path, write: Callable[[], None], num_bytes: int) -> None:
    """Write a file; to Google's store until it is there with its size.

    Its uploads are resumed after an error, and one that was resumed wrongly ends without an error in an empty object.
    """
    if _scheme(str(uri)) != "gs":
        return write()
    files, path = filesystem(uri)

    def attempt() -> None:
        write()
        if (found := files.get_file_info(path).size) != num_bytes:
            raise OSError(f"{found} bytes are there, of {num_bytes} that were written")

    return patiently(uri, attempt, patience_s=60.0)


def download_file(uri: str | Path, local: str | Path) -> None:
    """Copy a file to a local path, completely or not at all."""
    files, path = filesystem(uri)
    check_file(uri)
    with explained(uri), renamed(local, os.path.abspath(local)) as target:
        pafs.copy_files(path, target, files, pafs.LocalFileSystem(), chunk_size=_COPY_BYTES)


def download_directory(uri: str | Path, local: str | Path) -> None:
    """Copy a directory with all its content to the local path, absent or empty before; completely or not at all.

    Raises:
        DataError: no such directory, the local path is not empty, or the store cannot be reached or refuses.
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
        DataError: a name that is not UTF-8.
    """
    files, path = filesystem(uri)
    flat = _scheme(str(uri)) == "gs"  # pyarrow lists Google's objects, all of them, and no directories
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
            if _scheme(str(uri)) == "gs":
                files.delete_dir_contents(path, missing_dir_ok=True)  # the whole of a directory without that object
                if files.get_file_info(path).type == pafs.FileType.NotFound:
                    return
            files.delete_dir(path)


@contextmanager
def explained(uri: str | Path) -> Iterator[None]:
    """Turn a file system's exception about ``uri`` into a StoreError of one line with the remedy.

    For a malformed URI, into a DataError.
    """
    try:
        yield
    except (OSError, ValueError, pa.ArrowException) as error:
        if _is_of_the_store(error):
            raise StoreError(f"{uri}: {_explanation(uri, error)}") from error
        if not isinstance(error, ValueError):
            raise
        # pyarrow's ArrowInvalid: a malformed URI, an empty key
        raise DataError(f"{uri}: {' '.join(str(error).split())}; correct the path") from error


def _is_of_the_store(error: Exception) -> bool:
    """Return whether a store or disk has failed.

    For Google's, pyarrow raises whatever the status resembles, and calls a file closed that it could not read.
    """
    return isinstance(error, OSError) or any(sign in str(error) for sign in _GOOGLES_FAILURES)


def _explanation(uri: str | Path, error: Exception) -> str:
    text = " ".join(str(error).split())
    if google := re.search(r"google::cloud::Status\((.*)", text):
        return _googles_explanation(google[1], error)
    endpoint = _endpoint() or "the store"
    if "NO_SUCH_BUCKET" in text or "NoSuchBucket" in text:
        return "no such bucket; create it or correct the name"
    if isinstance(error, FileNotFoundError):
        return "no such file, directory or bucket; check the path"
    if isinstance(error, PermissionError):
        return "permission denied; check the owner and mode of the path"
    if refusal := _refusal(error):
        return (
            f"refused by {endpoint} ({refusal}); check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the rights of the "
            "key, renew expired credentials, and start again: a run continues where it stopped"
        )
    if "NETWORK_CONNECTION" in text or "curlCode" in text:
        return f"{endpoint} cannot be reached; check AWS_ENDPOINT_URL and the network"
    if re.search("HTTP status 5[0-9][0-9]|SLOW_DOWN|INTERNAL_FAILURE|SERVICE_UNAVAILABLE", text):
        return f"{endpoint} answers with errors again and again ({text}); repair the store and start again"
    if "411" in text or "MissingContentLength" in text:
        return "the store does not support trailing checksums; set AWS_REQUEST_CHECKSUM_CALCULATION=when_required"
    return f"cannot be read or written ({text})"


def _googles_explanation(status: str, error: Exception) -> str:
    """Return what to do about a ``google::cloud::Status``, ``CODE: ... last message of WORDS error_info={...}``."""
    message = re.sub(r"^.*last message of | error_info=.*", "", status)
    message = message.rpartition("underlying error message was: ")[2][:300]
    if isinstance(error, FileNotFoundError):
        if "CreateResumableUpload" in status:  # nothing but the bucket has to be there
            return "no such bucket; create it or correct the name"
        return "no such file, directory or bucket; check the path"
    if _NO_TOKEN in status:
        return _no_credentials(message)
    if refusal := _refusal(error):
        return (
            f"refused by Google Cloud Storage ({refusal}); check GOOGLE_APPLICATION_CREDENTIALS and the roles of the "
            "account, renew expired credentials, and start again: a run continues where it stopped"
        )
    if re.search(r"CURL error \[(5|6|7|28|35)\]", message):
        return f"Google Cloud Storage cannot be reached ({message}); check the network"
    return f"Google Cloud Storage fails again and again ({message}); wait until it works, and start again"


def _refusal(error: Exception) -> str | None:
    """Return the words of the store's refusal, or None: a permanent failure, unlike 408, 429 and 5xx."""
    text = str(error)
    named = _REFUSALS.search(text)
    status = re.search(r"HTTP status (4\d\d)", text)
    # The answer to a HEAD has no text, and AWS answers an expired token with 400.
    if named is None and (status is None or status[1] in ("404", "408", "411", "416", "429")):
        return None
    return named[0] if named else f"HTTP status {status[1]}" if status else None


_GOOGLES_FAILURES = ("google::cloud::Status", "I/O operation on closed file")
_NO_TOKEN = "Could not create a OAuth2 access token"
_REFUSALS = re.compile(
    "ExpiredToken|EXPIRED_TOKEN|TokenRefreshRequired|InvalidToken|REQUEST_EXPIRED|REQUEST_TIME_TOO_SKEWED"
    "|RequestTimeTooSkewed|ACCESS_DENIED|SIGNATURE_DOES_NOT_MATCH|INVALID_SIGNATURE|INVALID_ACCESS_KEY_ID"
    "|INVALID_CLIENT_TOKEN_ID|UNRECOGNIZED_CLIENT|MISSING_AUTHENTICATION_TOKEN|PERMISSION_DENIED|UNAUTHENTICATED"
    f"|{_NO_TOKEN}"
)


@contextmanager
def renamed(uri: str | Path, path: str) -> Iterator[str]:
    """Yield the path to write to: an object's own, or for a local file another that is renamed at the end."""
    if not is_local(uri):
        yield path
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with whole(Path(path)) as unfinished:
        yield str(unfinished)


def _scheme(uri: str) -> str:
    scheme = uri.partition("://")[0].lower() if "://" in uri else "file"
    if scheme not in ("file", *_REMOTE):
        raise DataError(f"{uri}: scheme {scheme}://; accepted: a local path, file://, s3:// or gs://; correct the path")
    return scheme


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
