"""The shard format: Parquet files of encoded images, written and read a row group at a time.

Columns: ``id`` string, unique in the set; ``image`` binary, the encoded bytes as they came; ``labels`` list<int32>,
class indices; where the set has them, ``annotation`` and ``fingerprint``, binary. Nothing is compressed again. The
bytes of a shard are a pure function of its examples, so a shard may be built anywhere, and again after a failure.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bit_ray.config import is_unicode
from bit_ray.data import store
from bit_ray.data.decode import ImageError, decode_image
from bit_ray.data.fetch import ShardFile, damaged, fetch_columns, local_shard
from bit_ray.data.jpeg import make_seekable, shrink
from bit_ray.data.layout import (
    OPTIONAL_COLUMNS,
    SCHEMA,
    LayoutError,
    group_checksum,
    read_columns,
    shard_schema,
    value_extents,
)
from bit_ray.data.manifest import Manifest, Shard
from bit_ray.errors import DamagedShardError as DamagedShardError
from bit_ray.errors import DataError, StoreError, brief
from bit_ray.locks import scratch_directory

# Parquet addresses the values of a page by 32-bit offsets.
MAX_IMAGE_BYTES = 2**28
# The network's stride, and so its smallest input; smaller images are trained on enlarged.
SMALL_SIDE = 32


@dataclass(frozen=True)
class Example:
    """One image: a stable id, the encoded bytes and the class indices."""

    id: str
    image: bytes
    labels: tuple[int, ...]
    annotation: bytes = b""
    """What else is known of the image, such as boxes; for sets with this optional column."""
    fingerprint: bytes = b""
    """By which near-duplicates are found; for sets with this optional column."""


@dataclass(frozen=True)
class Unreadable:
    """In place of an example whose bytes could not be had, as a file that is not there."""

    id: str
    reason: str


class Source(Protocol):
    """Examples that can be cut into parts, each of them readable in another process."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names in the order of the class indices."""

    @property
    def multi_label(self) -> bool:
        """Whether an example may have any number of labels."""

    @property
    def identity(self) -> dict[str, Any]:
        """Plain data that differs when the examples differ."""

    def __len__(self) -> int:
        """Number of examples."""

    def part(self, indices: npt.NDArray[np.int64]) -> Iterable[Example | Unreadable]:
        """Return the examples at these indices, in this order, as a small object that pickles."""


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """What every shard of a set has in common while it is written."""

    output: str
    num_classes: int
    multi_label: bool
    row_group_size: int
    convert_images: bool
    on_bad: Literal["error", "skip"]
    optional_columns: tuple[str, ...] = ()
    """Those of `OPTIONAL_COLUMNS` that the set has, in that order."""
    seekable: bool = False
    """Whether JPEG files get restart markers, without loss."""
    shorter_side: int | None = None
    """Larger images are encoded anew with a shorter side of this many pixels, which loses detail."""


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """What became of one shard; ``shard`` is None if it has no readable example or was not written."""

    index: int
    shard: Shard | None
    bad: tuple[tuple[str, str], ...] = ()
    """Id and reason of each image that was refused."""
    convertible: bool = False
    """Whether converting would take one of them."""
    median_image_size: tuple[int, int] = (0, 0)
    num_seekable: int = 0
    num_shrunk: int = 0
    num_small: int = 0
    """Images with a side below ``SMALL_SIDE`` pixels."""
    source_digest: str = ""
    """SHA-256 of the ids and labels, in order, for the sources that cannot tell their content beforehand."""


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

    ``progress`` is told the number of examples after each row group.

    Raises:
        DataError: a label that is out of range or of the wrong count, an id that is empty or comes twice.
        ConfigError: ``seekable`` where the JPEG extension is missing.
        StoreError: TMPDIR or the output is full, or cannot be written to.
    """
    bad: list[tuple[str, str]] = []
    convertible = False
    sizes: list[tuple[int, int]] = []
    ids: set[str] = set()
    num_seen = num_seekable = num_shrunk = 0
    with scratch_file(shard_name(index)) as local:
        schema = shard_schema(plan.optional_columns)
        with _row_group_writer(local, schema, plan.row_group_size) as write:
            rows: list[Example] = []
            for example in examples:
                num_seen += 1
                if isinstance(example, Unreadable):
                    bad.append((example.id, example.reason))
                    continue
                check_example(example, plan.num_classes, plan.multi_label)
                if example.id in ids:
                    raise DataError(
                        f"{example.id}: id comes twice; accepted: unique ids; make the ids of the source unique"
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
        num_small=sum(min(size) < SMALL_SIDE for size in sizes),
    )


@contextmanager
def scratch_file(name: str) -> Iterator[Path]:
    """Yield where a file may be written meanwhile; what processes that were killed have left there is removed."""
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


def check_example(example: Example, num_classes: int, multi_label: bool) -> None:
    """Raise DataError unless id and labels of the example fit a set of ``num_classes``."""
    if not isinstance(example, Example):
        raise DataError(f"source: gave {type(example).__name__}; accepted: Example(id, image, labels); convert it")
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
    if not multi_label and len(example.labels) != 1:
        raise DataError(f"{example.id}: {len(example.labels)} labels; accepted: one; correct them, or set multi_label")


def read_rows(
    uri: str,
    manifest: Manifest,
    shard_index: int,
    row_group_indices: Sequence[int],
    columns: Sequence[str] = ("id", "image", "labels"),
) -> pa.Table:
    """Read row groups of one shard of the set at ``uri``, all of it or some of the columns.

    Rows are checked against the manifest; with the images among the columns, against its checksums as well.

    Raises:
        DamagedShardError: the shard is missing, empty, truncated, or not what the manifest says.
        DataError: the store refuses or cannot be reached.
    """
    shard = manifest.shards[shard_index]
    path = store.join(uri, shard.path)
    size = manifest.row_group_size
    tables = []
    for group in row_group_indices:
        assert 0 <= group < manifest.row_groups(shard_index), group
        num_rows = min(size, shard.num_examples - group * size)
        table = fetch_columns(uri, shard, group, num_rows, columns)
        if table.num_rows != num_rows:
            raise damaged(uri, path, "other rows than the manifest says")
        for row, problem in row_problems(table, manifest.num_classes, manifest.multi_label).items():
            raise damaged(uri, path, f"row {group * size + row}: {problem}")
        tables.append(table.select(list(columns)))
    schema = shard_schema(manifest.optional_columns)
    return pa.concat_tables(tables) if tables else pa.schema([schema.field(name) for name in columns]).empty_table()


def index_rows(path: str | Path, group: int, expected_checksum: str = "") -> pa.Table:
    """Find the images of one row group of a local shard, so that each can be read without the others.

    Args:
        path: A shard, or what `bit_ray.data.cache` located in its place.
        group: Number of the row group in that file.
        expected_checksum: Of the row group, from the manifest; empty for none.

    Returns:
        Columns id string, labels list<int32>, offset int64, length int64: the encoded image of a row is ``length``
        bytes of the file from byte ``offset`` on. What the columns say is not checked: see `row_problems`.

    Raises:
        DamagedShardError: the file is missing, damaged, or not laid out as `bit-ray shards write` does.
    """
    with _opened(path) as (file, shard):
        found = shard.footer.group(group)
        if hasattr(os, "posix_fadvise"):  # whoever asks will read the images soon
            os.posix_fadvise(file.fileno(), found.start, found.stop - found.start, os.POSIX_FADV_WILLNEED)
        if expected_checksum and group_checksum(shard.read_at, found) != expected_checksum:
            raise LayoutError(f"row group {group} has other bytes than the manifest's checksum")
        offsets, lengths = value_extents(shard.read_at, found.chunks[SCHEMA.get_field_index("image")])
        table = read_columns(shard.read_at, shard.footer, found, ["id", "labels"])
        if len(table) != len(offsets):
            raise LayoutError("columns of different lengths")
    table = table.append_column("offset", pa.array(offsets, pa.int64()))
    return table.append_column("length", pa.array(lengths, pa.int64()))


def count_rows(path: str | Path, group: int) -> int:
    """Return the number of rows of a row group of a local shard, from its footer.

    Raises:
        DamagedShardError: the file is missing or damaged, or has no such row group.
    """
    with _opened(path) as (_, shard):
        return shard.footer.group(group).num_rows


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[FileIO, ShardFile]]:
    try:
        with local_shard(path) as opened:
            yield opened
    except (OSError, LayoutError) as error:
        what = "no such file" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())
        raise DamagedShardError(
            f"{path}: {what}; restore the shard or write it again; a file of the node's cache may be deleted"
        ) from None


def row_problems(table: pa.Table, num_classes: int, multi_label: bool) -> dict[int, str]:
    """Say what is wrong with the ids and labels of a row group, by row: what is trained on must be what was written.

    Args:
        table: Rows with any of the columns of SCHEMA.
        num_classes: Of the set.
        multi_label: Whether a row may have any number of labels.
    """
    problems: dict[int, str] = {}
    if "labels" in table.column_names:
        labels = table.column("labels").combine_chunks()
        counts = np.asarray(labels.value_lengths())
        values = np.asarray(labels.flatten())
        rows = np.repeat(np.arange(len(counts)), counts)
        for i in np.flatnonzero((values < 0) | (values >= num_classes)).tolist():
            problems[int(rows[i])] = f"label {values[i]}; accepted: 0 to {num_classes - 1}"
        if not multi_label:
            for row in np.flatnonzero(counts != 1).tolist():
                problems[row] = f"{counts[row]} labels; accepted: one"
    if "id" in table.column_names:
        ids = table.column("id").cast(pa.binary()).combine_chunks()
        for row in np.flatnonzero(np.asarray(pc.binary_length(ids)) == 0).tolist():
            problems[row] = "id is empty"
        try:
            table.column("id").validate(full=True)
        except pa.ArrowInvalid:
            for row, data in enumerate(ids.to_pylist()):
                if not _is_utf8(data):
                    problems[row] = f"id is not UTF-8 text ({data[:80]!r})"
    return problems


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def read_tables(uri: str, manifest: Manifest, columns: Sequence[str] = ("id", "image", "labels")) -> Iterator[pa.Table]:
    """Read the whole set at ``uri``, or some of its columns, one row group at a time, in its order.

    Raises:
        DataError: a shard is missing, empty, truncated, or not what the manifest says.
    """
    for index in range(len(manifest.shards)):
        for group in range(manifest.row_groups(index)):
            yield read_rows(uri, manifest, index, [group], columns)


def to_examples(table: pa.Table) -> list[Example]:
    """Return the rows of a table as examples."""
    names = [name for name in (*SCHEMA.names, *OPTIONAL_COLUMNS) if name in table.column_names]
    rows = zip(*(table.column(name).to_pylist() for name in names), strict=True)
    return [Example(id, image, tuple(labels), *more) for id, image, labels, *more in rows]


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


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a local file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def row_group_checksums(path: str | Path) -> str:
    """Return what `Shard.checksums` says of a local shard."""
    with local_shard(path) as (_, shard):
        return "".join(group_checksum(shard.read_at, group) for group in shard.footer.groups)


def _table(rows: Sequence[Example], schema: pa.Schema) -> pa.Table:
    return pa.table(
        [pa.array([getattr(row, field.name) for row in rows], field.type) for field in schema], schema=schema
    )
