"""Write a shard set: cut a source into shards, build them here or over Ray, and put the manifest last."""

import hashlib
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bit_ray import store
from bit_ray.cluster.tasks import each
from bit_ray.config import digest, is_unicode
from bit_ray.data.images.pack import MIN_SHORTER_SIDE, extension
from bit_ray.data.shards.build import ShardPlan, ShardResult, build_shard, check_example, median_size
from bit_ray.data.shards.manifest import SKIPPED, Manifest, write_manifest
from bit_ray.data.shards.verify import repeated_ids
from bit_ray.data.shards.writing import Writing, alone, whole_set
from bit_ray.data.sources.base import Example, Source, Unreadable
from bit_ray.data.sources.files import FileSource
from bit_ray.data.sources.open import DATA_DIR, IteratorSource, ReadOptions, open_source
from bit_ray.data.sources.parquet import ParquetSource
from bit_ray.errors import ConfigError, DataError

MAX_SHARD_EXAMPLES = 4096
NUM_SHARDS = 16

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True, kw_only=True)
class WriteReport:
    """What was written."""

    output: str
    num_examples: int
    num_shards: int
    num_bytes: int
    seconds: float
    num_resumed: int
    """Shards that an earlier, interrupted run had finished."""
    num_seekable: int | None
    """Images that have restart markers now; None if an earlier run had finished the set."""
    num_shrunk: int | None
    """Images that were encoded anew with fewer pixels; None as above."""
    num_small: int | None
    """Images with a side below 32 pixels, which training enlarges; None as above."""
    skipped: tuple[tuple[str, str], ...]
    """Id and reason of each image left out."""
    empty_classes: tuple[str, ...]
    """Classes without an image."""


def write_shards(
    source: str | Path | Source | Iterable[Example],
    output: str | Path,
    *,
    name: str,
    class_names: Sequence[str] | None = None,
    multi_label: bool = False,
    root: str | None = None,
    data_dir: str | Path = DATA_DIR,
    download: bool = False,
    check_size: bool = True,
    label: str = "",
    row_group_size: int = 64,
    shard_examples: int | None = None,
    seed: int = 0,
    convert_images: bool = False,
    on_bad: Literal["error", "skip"] = "error",
    seekable: bool = False,
    shorter_side: int | None = None,
    num_workers: int = 0,
    progress: Progress | None = None,
) -> WriteReport:
    """Write a shard set into the directory ``output``; an interrupted run is continued by the same call.

    Args:
        source: an embedded data set ("glyphs:m"), a set by name ("cifar10:train"), a folder of class folders, a .csv or
            .parquet table, WebDataset tar files ("train-{000..146}.tar"), Parquet files with the images inside
            ("train-*.parquet"), a ``Source``, or any iterable of ``Example`` (which is written in its own order and in
            this process).
        output: local path, s3:// or gs://; new, empty, or left by an interrupted run of the same call.
        name: what the set is called in its manifest.
        class_names: in the order of the class indices; needed for an iterable, else taken from the source.
        multi_label: whether an example may have any number of labels; for tables and iterables.
        root: where a table's relative paths start, if not beside it.
        data_dir: for a set by name, the folder with its publisher's files (`bit_ray.data.sources.published.names`).
        download: for a set by name, whether files that are missing may be downloaded there.
        check_size: for a set by name, whether another size than the published one is refused.
        label: for Parquet files the column of labels, for WebDataset the ending or JSON key; empty: the only one.
        row_group_size: rows that are read together; 64 ImageNet photographs are 7 MB.
        shard_examples: examples in a shard; by default a sixteenth of the set, so that 16 readers find work, but at
            most 4,096, which is 450 MB of ImageNet. In whole row groups.
        seed: of the order in which the source is cut, so that every shard mixes the classes.
        convert_images: whether readers convert grayscale, CMYK, 16-bit, alpha, palette and animated images to 8-bit RGB
            (the stored bytes stay as they came) instead of their being bad.
        on_bad: "error" ends with the first shard that has a bad image; "skip" leaves bad images out and lists them in
            ``skipped.json`` beside the manifest.
        seekable: give JPEG files restart markers, so that readers decode less of them (`bit_ray.data.images.pack`).
            Pixels stay the same, progressive files become baseline, what cannot have markers stays as it is.
        shorter_side: encode larger images anew, as JPEG with a shorter side of this many pixels. That loses detail:
            see `bit_ray.data.images.pack.shrink` for the trade.
        num_workers: Ray tasks in flight, one shard each; 0 works in this process.
        progress: told (examples done, examples in all or None).

    Raises:
        ConfigError: an option that cannot work, as ``seekable`` where the JPEG extension is missing; or another process
            writes into the output. In an object store the last start takes over and ends the process before it
            (`bit_ray.data.shards.writing` says what that does not guarantee).
        DataError: a source, label or image that is refused. What a fresh run has written is removed again.
        StoreError: a disk or store that fails or is full. After it, as after what an iterator raises, the finished
            shards are kept and the same call continues.
    """
    start = time.monotonic()
    output = store.absolute(output)
    _check_options(name, row_group_size, shard_examples, on_bad, shorter_side)
    if seekable:
        extension()
    with alone(output):  # before the source is looked through, which may take long
        options = ReadOptions(
            class_names=class_names,
            multi_label=multi_label,
            root=root,
            data_dir=data_dir,
            download=download,
            check_size=check_size,
            label=label,
        )
        examples = open_source(source, output, options, num_workers)
        known = None if isinstance(examples, IteratorSource) else examples
        total = len(known) if known is not None else None
        size = _shard_size(shard_examples, row_group_size, total)
        plan = ShardPlan(
            output=output,
            num_classes=len(examples.class_names),
            multi_label=examples.multi_label,
            row_group_size=row_group_size,
            convert_images=convert_images,
            on_bad=on_bad,
            seekable=seekable,
            shorter_side=shorter_side,
        )
        described = {
            "name": name,
            "source": examples.identity,
            "num_examples": total,
            "class_names_sha256": digest(list(examples.class_names)),
            "multi_label": plan.multi_label,
            "row_group_size": row_group_size,
            "shard_examples": size,
            "seed": seed if known is not None else None,
            "convert_images": convert_images,
        }
        # Left out when not set, as in the plans of sets that were written before there was packing.
        packing = {"seekable": seekable or None, "shorter_side": shorter_side}
        described |= {option: value for option, value in packing.items() if value is not None}
        # An iterator's content is known only after it has run: its set is never taken for already written.
        plan_digest = digest(described) if known is not None else ""
        empty = examples.empty_classes if isinstance(examples, FileSource) else ()
        whole = whole_set(output, plan_digest)
        if whole is not None:
            return _report(output, whole, start, None, skipped=_read_skipped(output), empty_classes=empty)
        with Writing(output, described, on_bad=on_bad) as writing:
            tick = _counter(progress, sum(size for _ in writing.done), total)
            if isinstance(examples, IteratorSource):
                results = _from_iterator(examples.examples, plan, size, writing, tick)
            else:
                results = _from_source(examples, plan, size, seed, writing, num_workers, tick)
            with closing(results):
                for result in results:
                    if result.bad and on_bad == "error":
                        raise DataError(_describe_bad(result))
                    writing.add(result)
            manifest = _manifest(name, examples.class_names, plan, writing.done, plan_digest)
            if known is None and (twice := repeated_ids(output, manifest)):
                raise DataError(
                    f"{twice[0]}: id comes twice; accepted: unique ids; make the ids of the iterator unique"
                )
            skipped = tuple(bad for _, result in sorted(writing.done.items()) for bad in result.bad)
            if skipped:
                store.write_json(store.join(output, SKIPPED), [{"id": id, "reason": reason} for id, reason in skipped])
            writing.check_shards()
            write_manifest(output, manifest)
        return _report(output, manifest, start, writing, skipped=skipped, empty_classes=empty)


def _from_source(
    source: Source,
    plan: ShardPlan,
    size: int,
    seed: int,
    writing: Writing,
    num_workers: int,
    tick: Callable[[int], None],
) -> Generator[ShardResult, None, None]:
    """Build the shards that are not done, each from its slice of a seeded order."""
    if isinstance(source, ParquetSource):
        order = source.order(seed, size)
    else:
        order = np.random.default_rng(seed).permutation(len(source))
    parts = {index: order[start : start + size] for index, start in enumerate(range(0, len(order), size))}

    def tasks() -> Iterator[tuple[ShardPlan, int, Iterable[Example | Unreadable]]]:
        for index in [index for index in parts if index not in writing.done]:
            writing.start(index)
            yield plan, index, source.part(parts[index])

    function = build_shard if num_workers > 0 else partial(build_shard, progress=tick)
    with closing(each(function, tasks(), num_workers)) as results:
        for result in results:
            if num_workers > 0:
                tick(len(parts[result.index]))
            yield result


def _from_iterator(
    examples: Iterable[Example],
    plan: ShardPlan,
    size: int,
    writing: Writing,
    tick: Callable[[int], None],
) -> Generator[ShardResult, None, None]:
    """Build shard after shard, passing over those that are done after a look at their ids and labels."""
    resumed = dict(writing.done)
    iterator = iter(examples)
    for index, first in enumerate(iterator):
        sha = hashlib.sha256()
        chunk = _digested(chain([first], islice(iterator, size - 1)), sha)
        before = resumed.pop(index, None)
        if before is None:
            writing.start(index)
            result = build_shard(plan, index, chunk, tick)
            yield replace(result, source_digest=sha.hexdigest())
        else:
            for example in chunk:
                check_example(example, plan.num_classes, plan.multi_label)
            if sha.hexdigest() != before.source_digest:
                resumed[index] = before
                break
    if resumed:
        raise DataError(
            f"{plan.output}: half-written from other examples (shard {min(resumed)} differs); "
            "accepted: the same iterator; repeat it, or delete the directory"
        )


def _digested(examples: Iterable[Example], sha: "hashlib._Hash") -> Iterator[Example]:
    for example in examples:
        yield example
        sha.update(repr((example.id, [int(label) for label in example.labels])).encode())


def _manifest(
    name: str, class_names: tuple[str, ...], plan: ShardPlan, done: dict[int, ShardResult], plan_digest: str
) -> Manifest:
    results = [result for _, result in sorted(done.items()) if result.shard is not None]
    shards = tuple(result.shard for result in results if result.shard is not None)
    if not shards:
        refused = sum(len(result.bad) for result in done.values())
        raise DataError(
            f"{plan.output}: no readable image ({refused} refused); accepted: at least one; check the source"
        )
    counts = [shard.num_examples for shard in shards]
    return Manifest(
        name=name,
        class_names=class_names,
        multi_label=plan.multi_label,
        row_group_size=plan.row_group_size,
        median_image_size=median_size([result.median_image_size for result in results], counts),
        num_examples=sum(counts),
        shards=shards,
        optional_columns=plan.optional_columns,
        convert_images=plan.convert_images,
        plan_digest=plan_digest,
    )


def _describe_bad(result: ShardResult) -> str:
    id, reason = result.bad[0]
    convert = ", or --convert-images (convert_images) to convert what can be" if result.convertible else ""
    return (
        f"{id}: {reason}; {len(result.bad) - 1} more bad images in the same shard; accepted: whole 8-bit RGB images; "
        f'correct them, or give --on-bad skip (on_bad="skip") to leave bad images out{convert}'
    )


def _shard_size(shard_examples: int | None, row_group_size: int, total: int | None) -> int:
    """Return the examples of a shard, whole row groups."""
    if shard_examples is None:
        shard_examples = min(MAX_SHARD_EXAMPLES, -(-total // NUM_SHARDS)) if total is not None else MAX_SHARD_EXAMPLES
    return -(-shard_examples // row_group_size) * row_group_size


def _check_options(
    name: str, row_group_size: int, shard_examples: int | None, on_bad: str, shorter_side: int | None
) -> None:
    if not name or not is_unicode(name):
        given = "no UTF-8" if name else "empty"
        raise ConfigError(f"name: {given}; accepted: text; name the set")
    for option, value in (("row_group_size", row_group_size), ("shard_examples", shard_examples)):
        if value is not None and value < 1:
            raise ConfigError(f"{option}: {value}; accepted: 1 or more; correct it")
    if on_bad not in ("error", "skip"):
        raise ConfigError(f"on_bad: {on_bad}; accepted: error, skip; choose one")
    if shorter_side is not None and shorter_side < MIN_SHORTER_SIDE:
        raise ConfigError(
            f"shorter_side: {shorter_side}; accepted: {MIN_SHORTER_SIDE} pixels or more, usually 256 to 512; raise it"
        )


def _counter(progress: Progress | None, start: int, total: int | None) -> Callable[[int], None]:
    """Return a function that adds to the examples done and reports them."""
    done = start

    def tick(num_examples: int) -> None:
        nonlocal done
        done = done + num_examples if total is None else min(done + num_examples, total)
        if progress is not None:
            progress(done, total)

    return tick


def _read_skipped(output: str) -> tuple[tuple[str, str], ...]:
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


def _report(
    output: str,
    manifest: Manifest,
    start: float,
    writing: Writing | None,
    *,
    skipped: tuple[tuple[str, str], ...],
    empty_classes: tuple[str, ...],
) -> WriteReport:
    return WriteReport(
        output=output,
        num_examples=manifest.num_examples,
        num_shards=len(manifest.shards),
        num_bytes=manifest.num_bytes,
        seconds=time.monotonic() - start,
        num_resumed=writing.num_resumed if writing else len(manifest.shards),
        num_seekable=sum(result.num_seekable for result in writing.done.values()) if writing else None,
        num_shrunk=sum(result.num_shrunk for result in writing.done.values()) if writing else None,
        num_small=sum(result.num_small for result in writing.done.values()) if writing else None,
        skipped=skipped,
        empty_classes=empty_classes,
    )
