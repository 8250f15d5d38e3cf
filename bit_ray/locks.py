"""File locks on this machine, and half-written files of processes that were killed.

A lock is an flock: the kernel releases it when its holder ends, even if it is killed, so no lock is ever stale.
"""

import errno
import fcntl
import getpass
import json
import logging
import os
import re
import shutil
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bit_ray.errors import ConfigError
from bit_ray.uris import shown

log = logging.getLogger(__name__)

_PARTIAL = re.compile(r"\.[0-9a-f]{32}\.partial$")
_LONGEST_PAUSE_S = 0.5
_RECORD_BYTES = 4096
_ATTEMPTS = 100
# A file system that has no locks, as some cluster file systems are mounted.
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


@contextmanager
def locked(path: Path, busy: str, *, field: str = "", remedy: str, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the lock file ``path``, made with its parent directories; at the end remove it, and them if empty.

    Args:
        path: The lock file; it names its holder.
        busy: Start of the error, such as ``RUN is being trained``.
        field: Setting that the error names before it, such as ``name``; empty: none.
        remedy: Its end, such as ``wait for it, or choose another name``.
        wait_s: How long to wait for another holder, seconds.

    Raises:
        ConfigError: Another process or thread holds it, with its name; or it cannot be made.
    """
    made = [directory for directory in path.parents if not directory.exists()]
    try:
        descriptor = _acquire(path, wait_s)
    except OSError as error:
        reason = f"cannot be written ({error.strerror or error})"
        raise ConfigError(f"{path}: {reason}; accepted: a writable folder; choose another") from None
    if descriptor is None:
        waited = f" (waited for {wait_s:.0f} s)" if wait_s else ""
        raise taken(f"{busy} by {describe(_read(path))}{waited}", field, remedy)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(this_process()).encode(), 0)
        yield
    finally:
        with suppress(OSError):  # while it is held: a process that waits for it sees that, and makes a new one
            path.unlink()
        _release(descriptor)
        for directory in made:
            with suppress(OSError):
                directory.rmdir()


def taken(busy: str, field: str, remedy: str) -> ConfigError:
    """Return the error of a lock or a claim that another process holds; see `locked`."""
    return ConfigError.of(field, busy, remedy=remedy) if field else ConfigError(f"{busy}; {remedy}")


@contextmanager
def partial(target: Path, *, directory: bool = False) -> Iterator[Path]:
    """Make an empty file or directory next to ``target`` under another name, to be filled and renamed to it.

    If it has not been renamed, it is removed at the end; if this process is killed, by the next process that fills
    ``target``, or by `remove_abandoned`.

    Raises:
        OSError: It cannot be made.
    """
    prefix = f".{target.name[:80]}."
    remove_abandoned(target.parent, prefix)
    path = target.with_name(f"{prefix}{uuid.uuid4().hex}.partial")
    while True:
        if directory:
            path.mkdir()
        try:
            descriptor = os.open(path, os.O_RDONLY | (0 if directory else os.O_CREAT), 0o666)
        except FileNotFoundError:
            if not (directory and path.parent.is_dir()):
                raise
            continue  # removed before it was opened
        with suppress(OSError):  # without locks no other process treats it as abandoned either
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if is_at(descriptor, path):
            break
        _release(descriptor)  # removed before it was locked
    try:
        yield path
    finally:
        _remove(path)
        _release(descriptor)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield another path to write a file to, which is renamed to ``path`` at the end: complete or not at all.

    Raises:
        OSError: It cannot be written.
    """
    with partial(path) as unfinished:
        yield unfinished
        os.replace(unfinished, path)


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """Make a private folder among the system's temporary files, removed at the end; each call also removes those of
    killed processes.

    Raises:
        OSError: It cannot be made.
    """
    with partial(Path(tempfile.gettempdir(), f"bit-ray-{os.getuid()}"), directory=True) as directory:
        directory.chmod(0o700)
        yield directory


def remove_abandoned(directory: Path, prefix: str = ".") -> None:
    """Remove files of `partial` in ``directory`` from processes that are dead now, not those in use."""
    left: list[Path] = []
    with suppress(OSError), os.scandir(directory) as entries:
        left += [Path(e.path) for e in entries if e.name.startswith(prefix) and _PARTIAL.search(e.name)]
    for path in left:
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if is_at(descriptor, path):
                    _remove(path)
            finally:
                _release(descriptor)


def held_by(path: Path) -> Any:
    """Return what the process that holds the lock of a file has written into it (see `describe`), None if none does."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read(path) or {}
    except OSError:  # a file system without locks
        return None
    finally:
        os.close(descriptor)
    return None


def this_process() -> dict[str, Any]:
    """Return the identity of this process, as plain data for `describe`."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "user": user_name(),
        "command": _command(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }


def describe(record: Any) -> str:
    """Return a record of `this_process` in words; always one line, even for a malformed record."""
    if not isinstance(record, dict) or not {"pid", "host", "user", "command", "since"} <= record.keys():
        return "another process"
    known = {name: "".join(c for c in str(value) if c.isprintable())[:200] for name, value in record.items()}
    return "PID {pid} of {user} on {host} since {since} ({command})".format(**known)


def user_name() -> str:
    """Return the name of the user of this process, or the number if it has no name, as in a container."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return str(os.getuid())


def is_at(descriptor: int, path: Path) -> bool:
    """Return whether the open file is the one that the path names."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _acquire(path: Path, wait_s: float) -> int | None:
    """Return a descriptor that holds the lock, None if another still holds it at the end of the wait."""
    deadline = time.monotonic() + wait_s
    pause = _LONGEST_PAUSE_S / 16
    attempts = 0
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except (FileNotFoundError, FileExistsError):  # another holder has just removed the directory, which was empty
            attempts += 1
            if attempts == _ATTEMPTS:
                raise
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except BlockingIOError:
            held = False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            log.warning("%s: its file system has no locks; a second process could start at the same time", path.parent)
            held = True
        if held and is_at(descriptor, path):
            return descriptor
        _release(descriptor)
        if held:  # its holder removed it meanwhile
            continue
        if time.monotonic() >= deadline:
            return None
        time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
        pause = min(2 * pause, _LONGEST_PAUSE_S)


def _release(descriptor: int) -> None:
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked child may hold a copy of the descriptor
    os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _read(path: Path) -> Any:
    try:
        with open(path, "rb") as file:
            return json.loads(file.read(_RECORD_BYTES))
    except (OSError, ValueError):  # it ended meanwhile, or has not written it yet
        return None


def _command() -> str:
    """Return the command line, without credentials in URIs, shortened."""
    words = [Path(sys.argv[0]).name, *map(shown, sys.argv[1:])]
    return " ".join(" ".join(words).split())[:200]
