"""The shard format: Parquet files of encoded images, written and read a row group at a time.

Columns: ``id`` string, unique in the set; ``image`` binary, the encoded bytes as they came; ``labels`` list<int32>,
class indices. Nothing is compressed again. The bytes of a shard are a pure function of its examples, so a shard may be
built anywhere, and again after a failure.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from bit_ray.data import store
from bit_ray.data.decode import ImageError, decode_image
from bit_ray.data.fetch import damaged, fetch_group
from bit_ray.data.jpeg import make_seekable, shrink
from bit_ray.data.layout import SCHEMA, LayoutError, group_chunks, value_extents
from bit_ray.data.manifest import Manifest, Shard
from bit_ray.errors import DamagedShardError as DamagedShardError
from bit_ray.errors import DataError

# Parquet addresses the values of a page by 32-bit offsets.
_MAX_IMAGE_BYTES = 2**28
# The network's stride, and so its smallest input; smaller images are trained on enlarged.
SMALL_SIDE = 32


@dataclass(frozen=True)
class Example:
    """One image: a stable id, the encoded bytes and the class indices."""

    id: str
    image: bytes
    labels: tuple[int, ...]


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
    """
    bad: list[tuple[str, str]] = []
    convertible = False
    sizes: list[tuple[int, int]] = []
    ids: set[str] = set()
    num_seen = num_seekable = num_shrunk = 0
    with tempfile.TemporaryDirectory(prefix="bit-ray-shard-") as directory:
        local = Path(directory) / shard_name(index)
        with pq.ParquetWriter(
            local, SCHEMA, compression="none", use_dictionary=False, write_statistics=False
        ) as writer:
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
                    if len(example.image) > _MAX_IMAGE_BYTES:
                        raise ImageError(f"{len(example.image)} bytes; accepted: at most {_MAX_IMAGE_BYTES}")
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
                    writer.write_table(_table(rows), row_group_size=plan.row_group_size)
                    rows.clear()
                    if progress is not None:
                        progress(num_seen)
                        num_seen = 0
            if rows:
                writer.write_table(_table(rows), row_group_size=plan.row_group_size)
        if progress is not None:
            progress(num_seen)
        shard = None
        if sizes and not (bad and plan.on_bad == "error"):
            shard = Shard(
                path=shard_name(index),
                num_examples=len(sizes),
                num_bytes=local.stat().st_size,
                sha256=file_sha256(local),
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


def check_example(example: Example, num_classes: int, multi_label: bool) -> None:
    """Raise DataError unless id and labels of the example fit a set of ``num_classes``."""
    if not isinstance(example, Example):
        raise DataError(f"source: gave {type(example).__name__}; accepted: Example(id, image, labels); convert it")
    if not isinstance(example.id, str) or not example.id:
        raise DataError(f"id: {example.id!r}; accepted: text that is not empty; give every example an id")
    for label in example.labels:
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

    Raises:
        DamagedShardError: the shard is missing, empty, truncated, or not what the manifest says.
        DataError: the store refuses or cannot be reached.
    """
    shard = manifest.shards[shard_index]
    path = store.join(uri, shard.path)
    groups = list(row_group_indices)
    assert all(0 <= group < manifest.row_groups(shard_index) for group in groups), groups
    size = manifest.row_group_size
    num_rows = [min(size, shard.num_examples - group * size) for group in groups]
    schema = pa.schema([SCHEMA.field(name) for name in columns])
    try:
        if store.is_local(uri):
            with pq.ParquetFile(store.filesystem(path)[1], pre_buffer=True) as parquet:
                table = parquet.read_row_groups(groups, columns=list(columns), use_threads=False)
        else:
            files = [fetch_group(uri, shard, g, n, columns) for g, n in zip(groups, num_rows, strict=True)]
            table = pa.concat_tables(
                pq.read_table(pa.BufferReader(b"".join(file)), columns=list(columns), use_threads=False)
                for file in files
            )
    except (OSError, pa.ArrowException, IndexError, EOFError) as error:
        if isinstance(error, PermissionError):
            raise DataError(f"{path}: permission denied; check the owner and mode of the path") from None
        raise damaged(uri, path, damage(path, shard) or " ".join(str(error).split())) from None
    if table.num_rows != sum(num_rows) or not table.schema.equals(schema):
        raise damaged(uri, path, damage(path, shard) or "other rows than the manifest says")
    return table


def index_rows(path: str | Path, group: int) -> pa.Table:
    """Find the images of one row group of a local shard, so that each can be read without the others.

    Args:
        path: A shard, or what `bit_ray.data.cache` located in its place.
        group: Number of the row group in that file.

    Returns:
        Columns id string, labels list<int32>, offset int64, length int64: the encoded image of a row is ``length``
        bytes of the file from byte ``offset`` on.

    Raises:
        DamagedShardError: the file is missing, damaged, or not laid out as `bit-ray shards write` does.
    """
    with _opened(path) as (file, metadata):
        chunks = group_chunks(metadata, group)
        images = chunks[SCHEMA.get_field_index("image")]
        if hasattr(os, "posix_fadvise"):  # whoever asks will read the images soon
            os.posix_fadvise(file.fileno(), images.offset, images.length, os.POSIX_FADV_WILLNEED)
        offsets, lengths = value_extents(lambda offset, n: os.pread(file.fileno(), n, offset), images)
        parquet = pq.ParquetFile(pa.PythonFile(file, "r"), metadata=metadata)
        table = parquet.read_row_group(group, columns=["id", "labels"], use_threads=False)
        if len(table) != len(offsets):
            raise LayoutError("columns of different lengths")
    table = table.append_column("offset", pa.array(offsets, pa.int64()))
    return table.append_column("length", pa.array(lengths, pa.int64()))


def count_rows(path: str | Path, group: int) -> int:
    """Return the number of rows of a row group of a local shard, from its footer.

    Raises:
        DamagedShardError: the file is missing or damaged, or has no such row group.
    """
    with _opened(path) as (_, metadata):
        group_chunks(metadata, group)
        return int(metadata.row_group(group).num_rows)


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[FileIO, pq.FileMetaData]]:
    try:
        with FileIO(path) as file:
            status = os.fstat(file.fileno())
            yield file, _footer(str(path), status.st_ino, status.st_mtime_ns, status.st_size)
    except PermissionError:
        raise DataError(f"{path}: permission denied; check the owner and mode of the path") from None
    except (OSError, ValueError, pa.ArrowException) as error:
        what = "no such file" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())
        raise DamagedShardError(
            f"{path}: {what}; restore the shard or write it again; a file of the node's cache may be deleted"
        ) from None


@lru_cache(maxsize=64)
def _footer(path: str, inode: int, mtime_ns: int, size: int) -> pq.FileMetaData:
    return pq.read_metadata(path)


def read_tables(uri: str, manifest: Manifest, columns: Sequence[str] = ("id", "image", "labels")) -> Iterator[pa.Table]:
    """Read the whole set at ``uri``, or some of its columns, one row group at a time, in its order.

    Raises:
        DataError: a shard is missing, empty, truncated, or not what the manifest says.
    """
    for index in range(len(manifest.shards)):
        for group in range(manifest.row_groups(index)):
            yield read_rows(uri, manifest, index, [group], columns)


def damage(path: str, shard: Shard) -> str | None:
    """Say what is wrong with a shard by its size alone, or None."""
    size = store.file_sizes([path])[0]
    if size is None:
        return "is in the manifest but missing"
    if size != shard.num_bytes:
        return f"has {size} bytes, the manifest says {shard.num_bytes}"
    return None


@contextmanager
def open_shard(path: str) -> Iterator[pq.ParquetFile]:
    """Open a shard for reading by row group, wherever it lies."""
    files, inner = store.filesystem(path)
    with store.explained(path):
        stream = files.open_input_file(inner)
    with stream, pq.ParquetFile(stream, pre_buffer=True) as parquet:
        yield parquet


def to_examples(table: pa.Table) -> list[Example]:
    """Return the rows of a table as examples."""
    columns = (table.column(name).to_pylist() for name in SCHEMA.names)
    return [Example(id, image, tuple(labels)) for id, image, labels in zip(*columns, strict=True)]


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


def _table(rows: Sequence[Example]) -> pa.Table:
    columns = [[row.id for row in rows], [row.image for row in rows], [list(row.labels) for row in rows]]
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)], schema=SCHEMA
    )
