"""What an unfinished run leaves for the next: ``_writing.json``, the plan and the shards that are done."""

import time
from dataclasses import asdict, dataclass
from typing import Any

from bit_ray.config import digest, from_dict
from bit_ray.data import store
from bit_ray.data.manifest import MANIFEST, WRITING, Manifest, read_manifest
from bit_ray.data.shards import ShardResult
from bit_ray.errors import ConfigError, DataError

_SAVE_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class _Record:
    """The content of ``_writing.json``."""

    plan: dict[str, Any]
    done: tuple[ShardResult, ...] = ()


class Writing:
    """A set that is being written: its plan, and the results by shard index, saved every two seconds.

    What is lost with the last seconds is written again, with the same bytes.
    """

    def __init__(self, output: str, plan: dict[str, Any], *, on_bad: str) -> None:
        """Take over what an interrupted run of the same plan has done, or begin.

        Raises:
            DataError: the output holds something else, or was begun by another plan.
        """
        self.output = output
        self.plan = plan
        self.done: dict[int, ShardResult] = {}
        self._existed = store.exists(output)
        names = store.list_files(output) if self._existed else []
        self.fresh = WRITING not in names
        if self.fresh and names:
            raise DataError(
                f"{output}: is not empty and is no unfinished shard set; accepted: a new or empty directory"
            )
        if not self.fresh:
            self.done = _done(output, plan, on_bad)
            stale = [name for name in names if name.startswith(".shard-") and name.endswith(".partial")]
            store.delete_files(store.join(output, name) for name in stale)
        self.num_resumed = len(self.done)
        self.save()

    def add(self, result: ShardResult) -> None:
        """Take in the result of one shard."""
        self.done[result.index] = result
        if time.monotonic() - self._saved > _SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Write ``_writing.json``."""
        results = [asdict(result) for _, result in sorted(self.done.items())]
        store.write_json(store.join(self.output, WRITING), {"plan": self.plan, "done": results})
        self._saved = time.monotonic()

    def finish(self) -> None:
        """Delete ``_writing.json``, once the manifest is there."""
        store.delete_files([store.join(self.output, WRITING)])

    def abandon(self) -> None:
        """After a failure: remove all that a fresh run has written; keep what can be continued."""
        if not self.fresh:
            self.save()
            return
        store.delete_files(store.join(self.output, name) for name in store.list_files(self.output))
        if not self._existed:
            store.delete_empty_directory(self.output)


def whole_set(output: str, plan_digest: str) -> Manifest | None:
    """Return the manifest of the set that this plan has already written to the output, if any; None if there is no set.

    Raises:
        DataError: the output holds a whole set that another plan, or an iterator (empty digest), has written.
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
    try:
        record = from_dict(_Record, store.read_json(path))
    except ConfigError as error:
        raise DataError(f"{path}: {error}; delete {output} and write the set again") from None
    if digest(record.plan) != digest(plan):
        changed = sorted(key for key in {*record.plan, *plan} if record.plan.get(key) != plan.get(key))
        was = "; ".join(f"{key} was {record.plan.get(key)}, now {plan.get(key)}" for key in changed)
        raise DataError(
            f"{output}: half-written by another command ({was}); "
            "accepted: the same source and options; repeat that command, or delete the directory"
        )
    results = [result for result in record.done if not (result.bad and on_bad == "error")]
    paths = [store.join(output, result.shard.path) for result in results if result.shard is not None]
    sizes = dict(zip(paths, store.file_sizes(paths), strict=True))
    return {
        result.index: result
        for result in results
        if result.shard is None or sizes[store.join(output, result.shard.path)] == result.shard.num_bytes
    }
