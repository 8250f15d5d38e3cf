"""Building shards, Parquet files of encoded images, a row group at a time.

Columns: ``id`` string, unique in the set; ``image`` binary, the encoded bytes, which only options of packing change;
``labels`` list<int32>, class indices; if the set has them, ``annotation`` and ``fingerprint``, binary. Nothing is
compressed again. The bytes of a shard are a pure function of its examples, so a shard may be built anywhere, and again
after a failure.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from bit_ray import store
from bit_ray.config import is_unicode
from bit_ray.data.images.decode import ImageError, decode_image, orientation, turn
from bit_ray.data.images.pack import encode_turned, make_seekable, shrink
from bit_ray.data.shards.footer import OPTIONAL_COLUMNS, shard_schema
from bit_ray.data.shards.manifest import Shard
from bit_ray.data.shards.options import PackOptions
from bit_ray.data.shards.read import row_group_checksums
from bit_ray.data.sources.base import MAX_IMAGE_BYTES, Example, Unreadable
from bit_ray.errors import DataError, StoreError, brief
from bit_ray.locks import scratch_directory
from bit_ray.models.inputs import MIN_IMAGE_SIZE
from bit_ray.store import file_sha256


@dataclass(frozen=True, kw_only=True)
class ShardPlan(PackOptions):
    """Settings that all shards of a set share while they are written."""

    output: str
    num_classes: int
    multi_label: bool
    optional_columns: tuple[str, ...] = ()
    """Those of `OPTIONAL_COLUMNS` that the set has, in that order."""


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """Result of building one shard; ``shard`` is None if it has no readable example or was not written."""

    index: int
    shard: Shard | None
    bad: tuple[tuple[str, str], ...] = ()
    """Id and reason of each image that was refused."""
    convertible: bool = False
    """Whether ``convert`` would accept one of them."""
    median_image_size: tuple[int, int] = (0, 0)
    num_seekable: int = 0
    num_shrunk: int = 0
    num_turned: int = 0
    num_small: int = 0
    """Images with a side below ``MIN_IMAGE_SIZE`` pixels."""
    source_digest: str = ""
    """SHA-256 of the ids and labels, in order, for sources that do not know their content in advance."""


def shard_name(index: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{index:05d}.parquet"


def build_shard(
    plan: ShardPlan,
    index: int,
    examples: Iterable[Example | Unreadable],
    progress: Callable[[int], None] | None = None,
) -> ShardResult:
    """Decode every image of a shard, pack and write it; with ``on_bad="error"`` and a bad image, write nothing.

    ``progress`` gets the number of examples after each row group.

    Raises:
        DataError: A label that is out of range, a wrong number of labels, an id that is empty or occurs twice.
        ConfigError: ``seekable`` without the JPEG extension.
        StoreError: TMPDIR or the output is full, or cannot be written to.
    """
    bad: list[tuple[str, str]] = []
    convertible = False
    sizes: list[tuple[int, int]] = []
    ids: set[str] = set()
    num_seen = num_seekable = num_shrunk = num_turned = 0
    with scratch_file(shard_name(index)) as local:
        schema = shard_schema(plan.optional_columns)
        with _row_group_writer(local, schema, plan.row_group_size) as write:
            rows: list[Example] = []
            for example in examples:
                num_seen += 1
                if isinstance(example, Unreadable):
                    bad.append((example.id, example.reason))
                    continue
                check_example(example, plan.num_classes, plan.multi_label, plan.optional_columns)
                if example.id in ids:
                    raise DataError(
                        f"{example.id}: duplicate id; accepted: unique ids; make the ids of the source unique"
                    )
                ids.add(example.id)
                try:
                    if len(example.image) > MAX_IMAGE_BYTES:
                        raise ImageError(f"{len(example.image)} bytes; accepted: at most {MAX_IMAGE_BYTES}")
                    pixels = decode_image(example.image, convert=plan.convert_images)
                except ImageError as error:
                    bad.append((example.id, error.reason))
                    convertible |= error.convertible
                    continue
                if bad and plan.on_bad == "error":
                    continue
                if plan.upright and (stored := orientation(example.image)) > 1:
                    turned = encode_turned(turn(pixels, stored))
                    example = replace(example, image=turned)
                    pixels = decode_image(turned)
                    num_turned += 1
                if plan.shorter_side is not None and (small := shrink(pixels, plan.shorter_side)) is not None:
                    example = replace(example, image=small)
                    pixels = decode_image(small)
                    num_shrunk += 1
                if plan.seekable and (packed := make_seekable(example.image, pixels)) is not None:
                    example = replace(example, image=packed)
                    num_seekable += 1
                sizes.append(pixels.shape[:2])
                rows.append(example)
                if len(rows) == plan.row_group_size:
                    write(_table(rows, schema))
                    rows.clear()
                    if progress is not None:
                        progress(num_seen)
                        num_seen = 0
            if rows:
                write(_table(rows, schema))
        if progress is not None:
            progress(num_seen)
        shard = None
        if sizes and not (bad and plan.on_bad == "error"):
            with _tmpdir_explained():
                shard = Shard(
                    path=shard_name(index),
                    num_examples=len(sizes),
                    num_bytes=local.stat().st_size,
                    sha256=file_sha256(local),
                    checksums=row_group_checksums(local),
                )
            store.upload_file(local, store.join(plan.output, shard.path))
    return ShardResult(
        index=index,
        shard=shard,
        bad=tuple(bad),
        convertible=convertible,
        median_image_size=median_size(sizes, [1] * len(sizes)),
        num_seekable=num_seekable,
        num_shrunk=num_shrunk,
        num_turned=num_turned,
        num_small=sum(min(size) < MIN_IMAGE_SIZE for size in sizes),
    )


@contextmanager
def scratch_file(name: str) -> Iterator[Path]:
    """Yield the path of a temporary file; files left there by killed processes are removed."""
    with ExitStack() as stack:
        with _tmpdir_explained():
            directory = stack.enter_context(scratch_directory())
        yield directory / name


@contextmanager
def _row_group_writer(path: Path, schema: pa.Schema, row_group_size: int) -> Iterator[Callable[[pa.Table], None]]:
    """Yield a function that adds row groups to a new Parquet file, which is closed at the end."""

    def write(table: pa.Table) -> None:
        with _tmpdir_explained():
            writer.write_table(table, row_group_size=row_group_size)

    with _tmpdir_explained():
        writer = pq.ParquetWriter(path, schema, compression="none", use_dictionary=False, write_statistics=False)
    try:
        yield write
    except BaseException:
        with suppress(OSError):
            writer.close()
        raise
    with _tmpdir_explained():
        writer.close()


@contextmanager
def _tmpdir_explained() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = " ".join(str(error).split())
        raise StoreError(
            f"TMPDIR: {tempfile.gettempdir()}: a shard cannot be written there ({reason}); accepted: a folder with "
            "room for one shard per process; make room, or set TMPDIR to another folder"
        ) from None


def check_example(example: Example, num_classes: int, multi_label: bool, optional_columns: Sequence[str] = ()) -> None:
    """Raise DataError unless the example's values fit a set of ``num_classes`` and these columns."""
    if not isinstance(example, Example):
        raise DataError.of("source", f"returned {type(example).__name__}", "Example(id, image, labels)", "convert it")
    if not isinstance(example.id, str) or not example.id or not is_unicode(example.id):
        raise DataError(f"id: {brief(example.id)}; accepted: text in UTF-8 that is not empty; give every example an id")
    if not isinstance(example.image, bytes):
        raise DataError(
            f"{example.id}: image: {type(example.image).__name__}; accepted: the bytes of its file; give them"
        )
    if not isinstance(example.labels, (tuple, list, np.ndarray)):
        raise DataError(
            f"{example.id}: labels: {brief(example.labels)}; accepted: a tuple of class indices; convert it"
        )
    for label in example.labels:
        if isinstance(label, bool) or not isinstance(label, (int, np.integer)):
            raise DataError(
                f"{example.id}: label {brief(label)}; accepted: whole numbers, the indices of class names; convert it"
            )
        if not 0 <= label < num_classes:
            raise DataError(
                f"{example.id}: label {label}; accepted: 0 to {num_classes - 1}, the index of a class name; "
                "correct the label or the class list"
            )
    for name in OPTIONAL_COLUMNS:
        value = getattr(example, name)
        if not isinstance(value, bytes) or len(value) > (MAX_IMAGE_BYTES if name in optional_columns else 0):
            given = f"{len(value)} bytes" if isinstance(value, bytes) else type(value).__name__
            accepted = f"at most {MAX_IMAGE_BYTES}" if name in optional_columns else "none in a set without this column"
            raise DataError(
                f"{example.id}: {name}: {given}; accepted: bytes, {accepted}; correct it, or the optional_columns"
            )
    if not multi_label and len(example.labels) != 1:
        raise DataError(f"{example.id}: {len(example.labels)} labels; accepted: one; correct them, or set multi_label")


def median_size(sizes: Sequence[tuple[int, int]], weights: Sequence[int]) -> tuple[int, int]:
    """Return the median height and the median width, each size counted ``weight`` times."""
    if not sizes:
        return 0, 0
    heights, widths = np.array(sizes).T
    return _median(heights, np.array(weights)), _median(widths, np.array(weights))


def _median(values: npt.NDArray[np.int64], weights: npt.NDArray[np.int64]) -> int:
    order = np.argsort(values, kind="stable")
    below = np.cumsum(weights[order])
    return int(values[order][np.searchsorted(below, below[-1] / 2)])


def _table(rows: Sequence[Example], schema: pa.Schema) -> pa.Table:
    return pa.table(
        [pa.array([getattr(row, field.name) for row in rows], field.type) for field in schema], schema=schema
    )
