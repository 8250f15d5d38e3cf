"""What an unfinished run leaves for the next: ``_writing.json``, the plan and the shards that are done.

One process at a time writes a set; `bit_ray.claim` says what an object store cannot guarantee. Two processes with the
same plan that write at once write the same bytes, unless they read an iterator.
"""

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from bit_ray import store
from bit_ray.claim import claimed
from bit_ray.config import digest
from bit_ray.data.shards.build import ShardResult, shard_name
from bit_ray.data.shards.manifest import MANIFEST, SKIPPED, WRITING, Manifest, read_manifest
from bit_ray.errors import BitRayError, DataError, StoreError

LOCK = "_writing.lock"
_SAVE_SECONDS = 2.0
# Of the time, that saving may take: the record of 120,000 shards has 90 MB.
_SAVE_SHARE = 0.05
_KEPT = "finished shards are kept: run the same command again to continue"


@dataclass(frozen=True, kw_only=True)
class _Record:
    """The content of ``_writing.json``."""

    plan: dict[str, Any]
    done: tuple[ShardResult, ...] = ()
    owner: dict[str, Any] = field(default_factory=dict)
    """Written by earlier versions, and ignored."""


@contextmanager
def alone(output: str) -> Iterator[None]:
    """Keep other processes from writing into the output meanwhile, unless it holds a whole set.

    Raises:
        ConfigError: Another process writes there, or has taken this one for dead and taken over.
    """
    if store.exists(store.join(output, MANIFEST)):
        yield
        return
    remedy = "wait until it has ended, or choose another output"
    with claimed(store.join(output, LOCK), f"{output} is being written", field="output", remedy=remedy):
        yield


class Writing:
    """A set that is being written: its plan, and the results by shard index, saved every two seconds or more.

    What is lost with the last seconds is written again, with the same bytes.
    """

    def __init__(self, output: str, plan: dict[str, Any], *, on_bad: str) -> None:
        """Take over what an interrupted run of the same plan has done, or begin.

        Raises:
            DataError: The output holds something else, or was begun by another plan.
        """
        self.output = output
        self.plan = plan
        self.done: dict[int, ShardResult] = {}
        self._started: set[int] = set()
        self._texts: dict[int, str] = {}  # of results, so that a save of many does not make all of them again
        self._uri = store.join(output, WRITING)
        names = [name for name in store.list_files(output) if name != LOCK]
        self._fresh = WRITING not in names
        if self._fresh and names:
            raise DataError(f"{output}: not empty, and not an unfinished shard set; accepted: a new or empty directory")
        if not self._fresh:
            self.done = _done(output, plan, on_bad)
            self._delete_partial(names)
        self.num_resumed = len(self.done)
        self.save()

    def __enter__(self) -> "Writing":
        """Return it."""
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        """Finish; after an error in the data remove what a first run has written, after another keep finished shards.

        Raises:
            StoreError: As what came, with the advice to run the command again.
        """
        if error is None:
            store.delete_files([self._uri])  # now that the manifest is there
        elif isinstance(error, Exception) and (_is_of_the_data(error) or not self.done):
            with suppress(BitRayError):
                self._abandon()
        else:
            with suppress(BitRayError):  # the record of two seconds ago will do
                self.save()
            if isinstance(error, StoreError):
                raise StoreError(f"{error}; {_KEPT}") from error

    def start(self, index: int) -> None:
        """Say that a shard is about to be written."""
        self._started.add(index)

    def add(self, result: ShardResult) -> None:
        """Take in the result of one shard."""
        self.done[result.index] = result
        if time.monotonic() - self._saved > max(_SAVE_SECONDS, self._save_took / _SAVE_SHARE):
            self.save()

    def save(self) -> None:
        """Write ``_writing.json``."""
        began = time.monotonic()
        for index in self.done.keys() - self._texts.keys():
            self._texts[index] = json.dumps(asdict(self.done[index]), ensure_ascii=False)
        done = ",\n".join(self._texts[index] for index in sorted(self.done))
        plan = json.dumps(self.plan, ensure_ascii=False)
        store.write_bytes(self._uri, f'{{"plan": {plan},\n"done": [{done}]}}\n'.encode())
        self._saved = time.monotonic()
        self._save_took = self._saved - began

    def check_shards(self) -> None:
        """Make sure that all shards are there before the manifest says so.

        Raises:
            StoreError: One is missing or cut; it is written again by the next run.
        """
        for index in _lost(self.output, self.done.values()):
            lost = self.done.pop(index)
            assert lost.shard is not None
            path = store.join(self.output, lost.shard.path)
            raise StoreError(f"{path}: written, but missing or truncated now")

    def _abandon(self) -> None:
        """Remove what this run has written, if it is a set's first; never what others have, nor from a whole set."""
        if not self._fresh:
            self.save()
            return
        if store.exists(store.join(self.output, MANIFEST)):
            return
        names = [*map(shard_name, sorted(self._started)), SKIPPED]
        store.delete_files(store.join(self.output, name) for name in names)
        self._delete_partial(store.list_files(self.output))
        store.delete_files([self._uri])

    def _delete_partial(self, names: list[str]) -> None:
        """Delete what is half-written in a local directory; in a store nothing is."""
        if store.is_local(self.output):
            partial = [name for name in names if name.startswith(".") and name.endswith(".partial") and "/" not in name]
            store.delete_files(store.join(self.output, name) for name in partial)


def whole_set(output: str, plan_digest: str) -> Manifest | None:
    """Return the manifest of the set that this plan has already written to the output, if any; None if there is no set.

    Raises:
        DataError: The output holds a whole set that another plan, or an iterator (empty digest), has written.
    """
    if not store.exists(store.join(output, MANIFEST)):
        return None
    manifest = read_manifest(output)
    if not plan_digest or manifest.plan_digest != plan_digest:
        raise DataError(
            f"{output}: has the shard set {manifest.name!r} already, written from another source or "
            "with other options; accepted: a new or empty directory; choose another output, or delete the set"
        )
    store.delete_files([store.join(output, WRITING)])
    return manifest


def _done(output: str, plan: dict[str, Any], on_bad: str) -> dict[int, ShardResult]:
    path = store.join(output, WRITING)
    # A record of 300 million images has more bytes than other documents may.
    record = store.read_record(_Record, path, f"delete {output} and write the set again", max_bytes=None)
    if digest(record.plan) != digest(plan):
        changed = sorted(key for key in {*record.plan, *plan} if record.plan.get(key) != plan.get(key))
        was = "; ".join(f"{key} was {record.plan.get(key)}, now {plan.get(key)}" for key in changed)
        raise DataError(
            f"{output}: incomplete, written by another command ({was}); "
            "accepted: the same source and options; run that command again, or delete the directory"
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
        and (result.shard is None or result.shard.checksums)  # else written when sets had none
    ]
    lost = _lost(output, results)
    return {result.index: result for result in results if result.index not in lost}


def _lost(output: str, results: Iterable[ShardResult]) -> set[int]:
    """Return the shards that are not there with the size they were written with."""
    shards = [(result.index, result.shard) for result in results if result.shard is not None]
    sizes = store.file_sizes([store.join(output, shard.path) for _, shard in shards])
    return {index for (index, shard), size in zip(shards, sizes, strict=True) if size != shard.num_bytes}


def _is_of_the_data(error: Exception) -> bool:
    """Return whether the same command would fail in the same way, as with an image or label that is refused."""
    return isinstance(error, BitRayError) and not isinstance(error, StoreError)
