"""Write a shard set: cut a source into shards, build them here or over Ray, and put the manifest last."""

import hashlib
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import fields, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from bit_ray import store
from bit_ray.cluster.tasks import each
from bit_ray.config import digest, is_unicode
from bit_ray.data.images.pack import extension
from bit_ray.data.shards.build import ShardPlan, ShardResult, build_shard, check_example, median_size
from bit_ray.data.shards.footer import OPTIONAL_COLUMNS
from bit_ray.data.shards.manifest import SKIPPED, Manifest, write_manifest
from bit_ray.data.shards.options import PackOptions, WriteOptions
from bit_ray.data.shards.report import WriteReport, counted, read_skipped, report_of
from bit_ray.data.shards.verify import repeated_ids
from bit_ray.data.shards.writing import Writing, alone, whole_set
from bit_ray.data.sources.base import Example, Source, Unreadable
from bit_ray.data.sources.files import FileSource
from bit_ray.data.sources.open import IteratorSource, open_source
from bit_ray.data.sources.parquet import ParquetSource
from bit_ray.errors import ConfigError, DataError

MAX_SHARD_EXAMPLES = 4096
NUM_SHARDS = 16

Progress = Callable[[int, int | None], None]


def write_shards(
    source: str | Path | Source | Iterable[Example],
    output: str | Path,
    options: WriteOptions | None = None,
    *,
    name: str,
    class_names: Sequence[str] | None = None,
    optional_columns: Sequence[str] = (),
    progress: Progress | None = None,
    **changes: Any,
) -> WriteReport:
    """Write a shard set into the directory ``output``; an interrupted run is continued by the same call.

    Args:
        source: An embedded data set ("glyphs:m"), a set by name ("cifar10:train"), a folder of class folders, a .csv or
            .parquet table, WebDataset tar files ("train-{000..146}.tar"), Parquet files with the images inside
            ("train-*.parquet"), a ``Source``, or any iterable of ``Example`` (which is written in its own order and in
            this process).
        output: Local path, s3:// or gs://; new, empty, or left by an interrupted run of the same call.
        options: How; by default `WriteOptions` as it comes.
        name: What the set is called in its manifest.
        class_names: In the order of the class indices; needed for an iterable, else taken from the source.
        optional_columns: For an iterable, those of `OPTIONAL_COLUMNS` that it fills; a ``Source`` knows its own.
        progress: Told (examples done, examples in all or None).
        changes: Fields of `WriteOptions` that replace those of ``options``, as ``row_group_size=64``.

    Raises:
        ConfigError: An option that cannot work, as ``seekable`` where the JPEG extension is missing; or another process
            writes into the output.
        DataError: A source, label or image that is refused. What a fresh run has written is removed again.
        StoreError: A disk or store that fails or is full. After it, as after what an iterator raises, the finished
            shards are kept and the same call continues.
    """
    start = time.monotonic()
    output = store.absolute(output)
    options = replace(options or WriteOptions(), **changes)
    if not name or not is_unicode(name):
        raise ConfigError.of("name", "not UTF-8" if name else "empty", "text", "name the set")
    if options.seekable:
        extension()
    with alone(output):  # before the source is looked through, which may take long
        examples = open_source(
            source,
            output,
            options,
            class_names=class_names,
            optional_columns=optional_columns,
            num_workers=options.num_workers,
        )
        known = None if isinstance(examples, IteratorSource) else examples
        total = len(known) if known is not None else None
        size = _shard_size(options, total)
        columns = tuple(getattr(examples, "optional_columns", ()))
        if columns != tuple(name for name in OPTIONAL_COLUMNS if name in columns):
            accepted = f"any of {', '.join(OPTIONAL_COLUMNS)}, in order"
            raise ConfigError.of("optional_columns", ", ".join(columns), accepted)
        plan = ShardPlan(
            output=output,
            num_classes=len(examples.class_names),
            multi_label=examples.multi_label,
            optional_columns=columns,
            **{field.name: getattr(options, field.name) for field in fields(PackOptions)},
        )
        for option in ("shorter_side", "upright"):
            if "annotation" in columns and getattr(options, option):
                given = f"{getattr(options, option)} with annotations"
                accepted = "not set, because annotations refer to the original pixels"
                raise ConfigError.of(option, given, accepted, "leave it out")
        described = {
            "name": name,
            "source": examples.identity,
            "num_examples": total,
            "class_names_sha256": digest(list(examples.class_names)),
            "multi_label": plan.multi_label,
            "row_group_size": plan.row_group_size,
            "shard_examples": size,
            "seed": options.seed if known is not None else None,
            "convert_images": plan.convert_images,
        }
        # Left out when not set, as in the plans of sets that were written before there were these options.
        later: dict[str, Any] = {
            "seekable": plan.seekable or None,
            "upright": plan.upright or None,
            "shorter_side": plan.shorter_side,
            "optional_columns": list(columns) or None,
        }
        described |= {option: value for option, value in later.items() if value is not None}
        # An iterator's content is known only after it has run: its set is never taken for already written.
        plan_digest = digest(described) if known is not None else ""
        files = examples if isinstance(examples, FileSource) else None
        whole = whole_set(output, plan_digest)
        if whole is not None:
            return report_of(output, whole, start, None, skipped=read_skipped(output), files=files)
        with Writing(output, described, on_bad=plan.on_bad) as writing:
            tick = _counter(progress, sum(size for _ in writing.done), total)
            if isinstance(examples, IteratorSource):
                results = _from_iterator(examples.examples, plan, size, writing, tick)
            else:
                results = _from_source(examples, plan, size, options.seed, writing, options.num_workers, tick)
            with closing(results):
                for result in results:
                    if result.bad and plan.on_bad == "error":
                        raise DataError(_describe_bad(result))
                    writing.add(result)
            manifest = _manifest(name, examples.class_names, plan, writing.done, plan_digest)
            if known is None and (twice := repeated_ids(output, manifest)):
                raise DataError(f"{twice[0]}: duplicate id; accepted: unique ids; make the ids of the iterator unique")
            skipped = tuple(bad for _, result in sorted(writing.done.items()) for bad in result.bad)
            if skipped:
                store.write_json(store.join(output, SKIPPED), [{"id": id, "reason": reason} for id, reason in skipped])
            writing.check_shards()
            write_manifest(output, manifest)
        return report_of(output, manifest, start, writing, skipped=skipped, files=files)


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
        chunk = _digested(chain([first], islice(iterator, size - 1)), plan.optional_columns, sha)
        before = resumed.pop(index, None)
        if before is None:
            writing.start(index)
            result = build_shard(plan, index, chunk, tick)
            yield replace(result, source_digest=sha.hexdigest())
        else:
            for example in chunk:
                check_example(example, plan.num_classes, plan.multi_label, plan.optional_columns)
            if sha.hexdigest() != before.source_digest:
                resumed[index] = before
                break
    if resumed:
        raise DataError(
            f"{plan.output}: incomplete, with other examples (shard {min(resumed)} differs); "
            "accepted: the same iterator; use it again, or delete the directory"
        )


def _digested(examples: Iterable[Example], optional_columns: Sequence[str], sha: "hashlib._Hash") -> Iterator[Example]:
    for example in examples:
        yield example
        more = [getattr(example, name) for name in optional_columns]
        sha.update(repr((example.id, [int(label) for label in example.labels], *more)).encode())


def _manifest(
    name: str, class_names: tuple[str, ...], plan: ShardPlan, done: dict[int, ShardResult], plan_digest: str
) -> Manifest:
    results = [result for _, result in sorted(done.items()) if result.shard is not None]
    shards = tuple(result.shard for result in results if result.shard is not None)
    if not shards:
        refused = sum(len(result.bad) for result in done.values())
        kinds = f": {counted(reason for result in done.values() for _, reason in result.bad)}" if refused else ""
        convert = ", or add --convert-images (convert_images)" if any(r.convertible for r in done.values()) else ""
        raise DataError(
            f"{plan.output}: no readable image ({refused} refused{kinds}); accepted: at least one; "
            f"check the source{convert}"
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
        upright=plan.upright,
        plan_digest=plan_digest,
    )


def _describe_bad(result: ShardResult) -> str:
    (id, reason), *more = result.bad
    kinds = f" ({counted(reason for _, reason in more)})" if more else ""
    convert = ", or --convert-images (convert_images) to convert images" if result.convertible else ""
    return (
        f"{id}: {reason}; {len(more)} more bad images in the same shard{kinds}; accepted: 8-bit RGB images; "
        f'correct them, or give --on-bad skip (on_bad="skip") to leave bad images out{convert}'
    )


def _shard_size(options: WriteOptions, total: int | None) -> int:
    """Return the examples of a shard, whole row groups."""
    shard_examples, row_group_size = options.shard_examples, options.row_group_size
    if shard_examples is None:
        shard_examples = min(MAX_SHARD_EXAMPLES, -(-total // NUM_SHARDS)) if total is not None else MAX_SHARD_EXAMPLES
    return -(-shard_examples // row_group_size) * row_group_size


def _counter(progress: Progress | None, start: int, total: int | None) -> Callable[[int], None]:
    """Return a function that adds to the examples done and reports them."""
    done = start

    def tick(num_examples: int) -> None:
        nonlocal done
        done = done + num_examples if total is None else min(done + num_examples, total)
        if progress is not None:
            progress(done, total)

    return tick
