"""The record that an unfinished run leaves for the next, ``_writing.json``: the plan and the finished shards.

One process at a time writes a set. In a local directory a lock ensures that: a second start ends before it changes
anything. Object stores have no locks, so there ``_writing.json`` names the process that writes. The last start takes
the set over. Every process checks the file before each save and each deletion, and stops if it finds another's name.

A store cannot check and write in one step, so this is not a guarantee. Until its next check the previous process still
writes shards, and a process that checks and saves just while another starts may win. When both have the same plan, the
shards are the same bytes either way; for an iterator, whose content may differ, avoid a second start.
"""

import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bit_ray import store
from bit_ray.config import digest
from bit_ray.data.shards.build import ShardResult, shard_name
from bit_ray.data.shards.manifest import MANIFEST, SKIPPED, WRITING, Manifest, read_manifest
from bit_ray.errors import BitRayError, ConfigError, DataError, StoreError
from bit_ray.locks import describe, locked, this_process

LOCK = "_writing.lock"
_SAVE_SECONDS = 2.0
_KEPT = "what is written is kept: run the same command again to continue"


@dataclass(frozen=True, kw_only=True)
class _Record:
    """The content of ``_writing.json``."""

    plan: dict[str, Any]
    done: tuple[ShardResult, ...] = ()
    owner: dict[str, Any] = field(default_factory=dict)
    """In an object store: the process that writes."""


@contextmanager
def alone(output: str) -> Iterator[None]:
    """Keep other processes from writing into a local directory meanwhile, unless it has a complete set.

    Raises:
        ConfigError: another process writes there.
    """
    if not store.is_local(output) or store.exists(store.join(output, MANIFEST)):
        yield
        return
    with locked(
        Path(output) / LOCK, f"{output}: is being written", remedy="wait until it has ended, or choose another output"
    ):
        yield


class Writing:
    """A set that is being written: its plan, and the results by shard index, saved every two seconds.

    Results lost in the last seconds are written again, with the same bytes.
    """

    def __init__(self, output: str, plan: dict[str, Any], *, on_bad: str) -> None:
        """Continue the work of an interrupted run of the same plan, or begin.

        Raises:
            DataError: the output has other files, or was begun by another plan.
        """
        self.output = output
        self.plan = plan
        self.done: dict[int, ShardResult] = {}
        self._started: set[int] = set()
        self._place = store.join(output, WRITING)
        self._owner = {} if store.is_local(output) else {"id": uuid.uuid4().hex, **this_process()}
        names = [name for name in store.list_files(output) if name != LOCK]
        self._fresh = WRITING not in names
        if self._fresh and names:
            raise DataError(
                f"{output}: is not empty and is no unfinished shard set; accepted: a new or empty directory"
            )
        if not self._fresh:
            self.done = _done(output, plan, on_bad)
            self._delete_partial(names)
        self.num_resumed = len(self.done)
        self._write()
        self._check_owner()

    def __enter__(self) -> "Writing":
        """Return itself."""
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        """End; after an error in the data remove a first run's files, after any other error keep them.

        Raises:
            StoreError: the error that occurred, with the advice to run the command again.
        """
        if error is None:
            self._finish()
        elif isinstance(error, Exception) and (_is_of_the_data(error) or not self.done):
            with suppress(BitRayError):
                self._abandon()
        else:
            with suppress(BitRayError):  # the record of two seconds ago is enough
                self.save()
            if isinstance(error, StoreError):
                raise StoreError(f"{error}; {_KEPT}") from error

    def start(self, index: int) -> None:
        """Note that a shard is about to be written."""
        self._started.add(index)

    def add(self, result: ShardResult) -> None:
        """Add the result of one shard."""
        self.done[result.index] = result
        if time.monotonic() - self._saved > _SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Write ``_writing.json``.

        Raises:
            ConfigError: another process has taken the set over.
        """
        self._check_owner()
        self._write()

    def check_shards(self) -> None:
        """Make sure that all shards exist before the manifest says so.

        Raises:
            StoreError: One is missing or truncated; the next run writes it again.
        """
        self._check_owner()
        for index in _lost(self.output, self.done.values()):
            lost = self.done.pop(index)
            assert lost.shard is not None
            raise StoreError(f"{store.join(self.output, lost.shard.path)}: was written, and is missing or cut now")

    def _write(self) -> None:
        results = [asdict(result) for _, result in sorted(self.done.items())]
        record = {"plan": self.plan, "done": results, **({"owner": self._owner} if self._owner else {})}
        store.write_json(self._place, record)
        self._saved = time.monotonic()

    def _check_owner(self) -> None:
        if self._owner and (found := self._found_owner()) != self._owner:
            who = f"taken over by {describe(found)}" if found is not None else "finished or removed by another process"
            raise ConfigError(
                f"{self.output}: has been {who}; accepted: one process at a time; wait until it has ended, or choose "
                "another output"
            )

    def _found_owner(self) -> Any:
        """Return the writer that the record in the store names, or None."""
        if not store.exists(self._place):
            return None
        try:
            found = store.read_json(self._place)
        except StoreError:
            raise
        except DataError:  # no JSON
            return {}
        return found.get("owner", {}) if isinstance(found, dict) else {}

    def _finish(self) -> None:
        """Delete ``_writing.json``, once the manifest exists."""
        if not self._owner or self._found_owner() == self._owner:
            store.delete_files([self._place])

    def _abandon(self) -> None:
        """Remove this run's files, if it is a set's first run; never files of others or of a complete set."""
        if self._owner and self._found_owner() != self._owner:
            return
        if not self._fresh:
            self._write()
            return
        if store.exists(store.join(self.output, MANIFEST)):
            return
        names = [*map(shard_name, sorted(self._started)), SKIPPED]
        store.delete_files(store.join(self.output, name) for name in names)
        self._delete_partial(store.list_files(self.output))
        store.delete_files([self._place])

    def _delete_partial(self, names: list[str]) -> None:
        """Delete half-written files in a local directory; a store never has any."""
        if store.is_local(self.output):
            partial = [name for name in names if name.startswith(".") and name.endswith(".partial") and "/" not in name]
            store.delete_files(store.join(self.output, name) for name in partial)


def whole_set(output: str, plan_digest: str) -> Manifest | None:
    """Return the manifest of the set that this plan has already written to the output, if any; None if there is no set.

    Raises:
        DataError: the output has a complete set that another plan, or an iterator (empty digest), has written.
    """
    if not store.exists(store.join(output, MANIFEST)):
        return None
    manifest = read_manifest(output)
    if not plan_digest or manifest.plan_digest != plan_digest:
        raise DataError(
            f"{output}: already holds the shard set {manifest.name!r}, written from another source or "
            "with other options; accepted: a new or empty directory; choose another output, or delete the set"
        )
    store.delete_files([store.join(output, WRITING)])
    return manifest


def _done(output: str, plan: dict[str, Any], on_bad: str) -> dict[int, ShardResult]:
    path = store.join(output, WRITING)
    # A record of 300 million images has more bytes than other documents may have.
    record = store.read_record(_Record, path, f"delete {output} and write the set again", max_bytes=None)
    if digest(record.plan) != digest(plan):
        changed = sorted(key for key in {*record.plan, *plan} if record.plan.get(key) != plan.get(key))
        was = "; ".join(f"{key} was {record.plan.get(key)}, now {plan.get(key)}" for key in changed)
        raise DataError(
            f"{output}: half-written by another command ({was}); "
            "accepted: the same source and options; repeat that command, or delete the directory"
        )
    for result in record.done:
        if result.shard is not None and result.shard.path != shard_name(result.index):
            raise DataError(
                f"{path}: shard {result.index} is {result.shard.path}; delete {output} and write the set again"
            )
    results = [
        result
        for result in record.done
        if not (result.bad and on_bad == "error")
        and (result.shard is None or result.shard.checksums)  # else written when sets had no checksums
    ]
    lost = _lost(output, results)
    return {result.index: result for result in results if result.index not in lost}


def _lost(output: str, results: Iterable[ShardResult]) -> set[int]:
    """Return the shards that are missing or do not have the size they were written with."""
    shards = [(result.index, result.shard) for result in results if result.shard is not None]
    sizes = store.file_sizes([store.join(output, shard.path) for _, shard in shards])
    return {index for (index, shard), size in zip(shards, sizes, strict=True) if size != shard.num_bytes}


def _is_of_the_data(error: Exception) -> bool:
    """Whether the same command would fail in the same way, such as for an image or label that is refused."""
    return isinstance(error, BitRayError) and not isinstance(error, StoreError)
