"""What came out of writing a shard set."""

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bit_ray import store
from bit_ray.config import is_unicode
from bit_ray.data.shards.manifest import SKIPPED, Manifest
from bit_ray.data.shards.writing import Writing
from bit_ray.data.sources.files import FileSource
from bit_ray.errors import DataError

_MOST_NAMED = 6


@dataclass(frozen=True, kw_only=True)
class WriteReport:
    """What was written."""

    output: str
    class_names: tuple[str, ...]
    num_examples: int
    num_shards: int
    num_bytes: int
    seconds: float
    num_resumed: int
    """Shards that an earlier, interrupted run had finished."""
    num_seekable: int | None
    """Images that have restart markers now; None if an earlier run had finished the set."""
    num_shrunk: int | None
    """Images that were encoded again with fewer pixels; None as above."""
    num_turned: int | None
    """Images that were turned upright; None as above."""
    num_small: int | None
    """Images with a side below 32 pixels, which training enlarges; None as above."""
    skipped: tuple[tuple[str, str], ...]
    """Id and reason of each image left out."""
    empty_classes: tuple[str, ...]
    """Classes without an image."""
    others: Mapping[str, int]
    """Files of a folder that are left out because their endings are not those of images, by ending."""


def report_of(
    output: str,
    manifest: Manifest,
    start: float,
    writing: Writing | None,
    *,
    skipped: tuple[tuple[str, str], ...],
    files: FileSource | None,
) -> WriteReport:
    """Return what was written; ``writing`` is None if an earlier run had finished the set."""
    return WriteReport(
        output=output,
        class_names=manifest.class_names,
        num_examples=manifest.num_examples,
        num_shards=len(manifest.shards),
        num_bytes=manifest.num_bytes,
        seconds=time.monotonic() - start,
        num_resumed=writing.num_resumed if writing else len(manifest.shards),
        num_seekable=sum(result.num_seekable for result in writing.done.values()) if writing else None,
        num_shrunk=sum(result.num_shrunk for result in writing.done.values()) if writing else None,
        num_turned=sum(result.num_turned for result in writing.done.values()) if writing else None,
        num_small=sum(result.num_small for result in writing.done.values()) if writing else None,
        skipped=skipped,
        empty_classes=files.empty_classes if files else (),
        others=files.others if files else {},
    )


def counted(reasons: Iterable[str]) -> str:
    """Return how often there is each reason, the most first, such as ``12 alpha, 3 grayscale``."""
    counts = Counter(reasons).most_common()
    shown = [f"{count:,} {reason}" for reason, count in counts[:_MOST_NAMED]]
    if len(counts) > _MOST_NAMED:
        shown.append(f"{sum(count for _, count in counts[_MOST_NAMED:]):,} others")
    return ", ".join(shown)


def read_skipped(output: str) -> tuple[tuple[str, str], ...]:
    """Return the id and reason of each image that a finished set has left out.

    Raises:
        DataError: The list is damaged.
    """
    path = store.join(output, SKIPPED)
    if not store.exists(path):
        return ()
    rows = store.read_json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) and _is_skipped(row) for row in rows):
        raise DataError(f"{path}: not a list of ids and reasons; restore it, or write the set again")
    return tuple((row["id"], row["reason"]) for row in rows)


def _is_skipped(row: dict[str, Any]) -> bool:
    texts = (row.get("id"), row.get("reason"))
    return all(isinstance(text, str) and is_unicode(text) for text in texts)
