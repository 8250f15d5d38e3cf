"""One process at a time works in a folder or on a file, local or in an object store; a second gets an error naming it.

On this machine, and on file systems that machines share, the claim is an flock: it ends with its holder, even if the
holder is killed. An object store has no locks. There the claim is a small object that its holder rewrites every few
seconds. If it has not changed for two minutes, its holder counts as dead, and a process that has watched it that long
takes it over. If two processes start at the same moment, each sees the other after both have written: the last writer
stays. Object stores cannot guarantee that no request is late. If a holder had no connection to the store for two
minutes, another process may have taken over: the holder is interrupted at its next write; until then both work.
"""

import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bit_ray import store
from bit_ray.errors import DataError
from bit_ray.locks import describe, held_by, locked, remove_abandoned, taken, this_process

log = logging.getLogger(__name__)

CLAIM_FILE = "_running.json"
# How often a holder shows that it is alive; after how long without that it counts as dead; how long two simultaneous
# starts wait to see each other's claims.
BEAT_S, STALE_S, SETTLE_S = 15.0, 120.0, 2.0
_POLL_S = 1.0

Record = dict[str, Any]


@contextmanager
def claimed_run(storage: str, name: str) -> Iterator[None]:
    """Claim the folder of a run, so that no other process works on the run of this name.

    Raises:
        ConfigError: Another process works on it.
    """
    run = store.join(store.absolute(storage), name)
    remedy = "wait for it, stop it, or choose another name"
    with claimed(store.join(run, CLAIM_FILE), f"{run} is being run", field="name", remedy=remedy):
        yield


@contextmanager
def claimed(uri: str, busy: str, *, field: str = "", remedy: str, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the claim at ``uri``; on this machine also remove half-written files of killed processes from its folder.

    Args:
        uri: URI of the claim; it does not exist before and after.
        busy: Start of the error, such as ``x.csv is being written``.
        field: Setting that the error names before it, such as ``output``; empty: none.
        remedy: Its end, such as ``wait for it, or choose another``.
        wait_s: How long to wait for a holder that is alive, seconds.

    Raises:
        ConfigError: Another process holds it, with its name; or another has taken it over from this one.
        DataError: The store cannot be reached or refuses.
    """
    if store.is_local(uri):
        path = Path(store.filesystem(uri)[1])
        with locked(path, busy, field=field, remedy=remedy, wait_s=wait_s):
            remove_abandoned(path.parent)
            yield
        return
    _wait_for(uri, busy, field, remedy, wait_s)
    claim = _Claim(uri)
    claim.make(busy, field, remedy)
    try:
        with _interruptible():
            yield
    except KeyboardInterrupt:
        if claim.successor:
            by = f"{claim.successor} too, which counted this process as dead"
            raise taken(f"{busy} by {by}", field, remedy) from None
        raise
    finally:
        claim.end()


def holder(uri: str) -> str:
    """Return the process that holds the claim at ``uri``, in words; empty if none does.

    In an object store a process of another machine that was killed counts as alive until its claim is taken over.

    Raises:
        DataError: The store cannot be reached or refuses.
    """
    if store.is_local(uri):
        record = held_by(Path(store.filesystem(uri)[1]))
    else:
        record = _read(uri)
        if record is not None and _is_dead(record):
            record = None
    return "" if record is None else describe(record)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Make SIGINT, by which the loss of a claim ends this process, raise KeyboardInterrupt.

    Processes that a shell script starts in the background ignore it by default.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Claim(threading.Thread):
    """A claim in an object store, and the thread that renews it."""

    def __init__(self, uri: str) -> None:
        super().__init__(name="claim", daemon=True)
        self.successor = ""
        """The process that has taken it over, in words."""
        self._uri = uri
        self._record: Record = {
            **this_process(),
            "id": uuid.uuid4().hex,
            "machine": _machine(),
            "started": _started(os.getpid()),
            "beat": 0,
        }
        self._ended = threading.Event()
        self._for_main = threading.current_thread() is threading.main_thread()

    def make(self, busy: str, field: str, remedy: str) -> None:
        """Write it, and check that no other process does so at the same time."""
        store.write_json(self._uri, self._record)
        time.sleep(SETTLE_S)
        if not self._is_mine(found := _read(self._uri)):
            raise taken(f"{busy} by {describe(found)}", field, remedy)
        self.start()

    def run(self) -> None:
        """Show at intervals that this process is alive."""
        while not self._ended.wait(BEAT_S):
            with suppress(DataError):  # an outage, which may pass
                found = _read(self._uri)
                if found is not None and not self._is_mine(found):
                    self.successor = describe(found)
                    log.error("%s: taken over by %s", self._uri, self.successor)
                    if self._for_main:
                        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                    return
                self._record["beat"] += 1
                store.write_json(self._uri, self._record)

    def end(self) -> None:
        """Release it."""
        self._ended.set()
        if self.is_alive():
            self.join()
        with suppress(DataError):  # in two minutes it counts as dead
            if self._is_mine(_read(self._uri)):
                store.delete_files([self._uri])

    def _is_mine(self, record: Record | None) -> bool:
        return record is not None and record.get("id") == self._record["id"]


def _wait_for(uri: str, busy: str, field: str, remedy: str, wait_s: float) -> None:
    """Return when no living process holds the claim."""
    deadline = time.monotonic() + wait_s
    seen, since = _read(uri), time.monotonic()
    told = False
    while seen is not None and not _is_dead(seen):
        if not told:
            log.warning("%s by %s; waiting at most %.0f s to see whether it is alive", busy, describe(seen), STALE_S)
            told = True
        time.sleep(_POLL_S)
        found = _read(uri)
        if found != seen:
            if found is not None and time.monotonic() >= deadline:
                raise taken(f"{busy} by {describe(found)}", field, remedy)
            seen, since = found, time.monotonic()
        elif time.monotonic() - since > STALE_S:
            return


def _read(uri: str) -> Record | None:
    """Return the existing claim; another object there is a claim without a known holder."""
    for last in (False, False, True):
        try:
            found = json.loads(store.read_bytes(uri))
        except DataError:
            if not store.exists(uri):
                return None
            if last:
                raise
            continue  # one holder ended and another began meanwhile
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}
    raise AssertionError("unreachable")


def _is_dead(record: Record) -> bool:
    """Return whether a holder is known to be dead; this can be known only of a process on the same machine."""
    pid = record.get("pid")
    if record.get("machine") != _machine() or not isinstance(pid, int) or not 0 < pid < 2**31:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's
        pass
    started = _started(pid)
    return started != record.get("started") and started != ""


def _machine() -> str:
    """Return an id of this process table: another machine, container or boot of the system has another id."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return uuid.uuid4().hex  # no process table here: a new id every time


def _started(pid: int) -> str:
    """Return when a process started, in ticks of the system's clock; ``dead`` if it has ended, empty if not known."""
    try:
        state, *values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "dead" if state in "ZX" else values[18]
