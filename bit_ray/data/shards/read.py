"""Reading shards: rows of a set, and the position of each image of a row group in a local file."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bit_ray import store
from bit_ray.data.shards.fetch import ShardFile, damaged, fetch_columns, local_shard
from bit_ray.data.shards.footer import OPTIONAL_COLUMNS, SCHEMA, LayoutError, shard_schema
from bit_ray.data.shards.manifest import Manifest
from bit_ray.data.shards.row_group import group_checksum, read_columns, value_extents
from bit_ray.data.sources.base import Example
from bit_ray.errors import DamagedShardError


def read_rows(
    uri: str,
    manifest: Manifest,
    shard_index: int,
    row_group_indices: Sequence[int],
    columns: Sequence[str] = ("id", "image", "labels"),
) -> pa.Table:
    """Read row groups of one shard of the set at ``uri``, all or some of the columns.

    Rows are checked against the manifest; with the images among the columns, against its checksums as well.

    Raises:
        DamagedShardError: The shard is missing, empty, truncated, or not what the manifest says.
        DataError: The store refuses or cannot be reached.
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
            raise damaged(uri, path, "not the rows of the manifest")
        for row, problem in row_problems(table, manifest.num_classes, manifest.multi_label).items():
            raise damaged(uri, path, f"row {group * size + row}: {problem}")
        tables.append(table.select(list(columns)))
    schema = shard_schema(manifest.optional_columns)
    return pa.concat_tables(tables) if tables else pa.schema([schema.field(name) for name in columns]).empty_table()


def index_rows(
    path: str | Path, group: int, expected_checksum: str = "", columns: Sequence[str] = ("id", "labels")
) -> pa.Table:
    """Find the images of one row group of a local shard, so that each can be read without the others.

    Args:
        path: A shard, or the file that `bit_ray.data.stream.cache` located instead of it.
        group: Number of the row group in that file.
        expected_checksum: Of the row group, from the manifest; empty for none.
        columns: Columns of the shard to read.

    Returns:
        These columns, offset int64 and length int64: the encoded image of a row is ``length`` bytes of the file from
        byte ``offset`` on. Values of the columns are not checked: see `row_problems`.

    Raises:
        DamagedShardError: The file is missing, damaged, or not laid out as `bit-ray shards write` does.
    """
    with _opened(path) as (file, shard):
        found = shard.footer.group(group)
        if hasattr(os, "posix_fadvise"):  # the caller will read the images soon
            os.posix_fadvise(file.fileno(), found.start, found.stop - found.start, os.POSIX_FADV_WILLNEED)
        if expected_checksum and group_checksum(shard.read_at, found) != expected_checksum:
            raise LayoutError(f"row group {group} does not have the manifest's checksum")
        offsets, lengths = value_extents(shard.read_at, found.chunks[SCHEMA.get_field_index("image")])
        table = read_columns(shard.read_at, shard.footer, found, columns)
        if len(table) != len(offsets):
            raise LayoutError("columns of different lengths")
    table = table.append_column("offset", pa.array(offsets, pa.int64()))
    return table.append_column("length", pa.array(lengths, pa.int64()))


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
    """Say what is wrong with the ids and labels of a row group, by row: training data must be what was written.

    Args:
        table: Rows with any of the columns of SCHEMA.
        num_classes: Classes of the set.
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
    """Read the set at ``uri``, all or some of its columns, one row group at a time, in its order.

    Raises:
        DataError: A shard is missing, empty, truncated, or not what the manifest says.
    """
    for index in range(len(manifest.shards)):
        for group in range(manifest.row_groups(index)):
            yield read_rows(uri, manifest, index, [group], columns)


def to_examples(table: pa.Table) -> list[Example]:
    """Return the rows of a table as examples."""
    names = [name for name in (*SCHEMA.names, *OPTIONAL_COLUMNS) if name in table.column_names]
    rows = zip(*(table.column(name).to_pylist() for name in names), strict=True)
    return [Example(id, image, tuple(labels), *more) for id, image, labels, *more in rows]


def row_group_checksums(path: str | Path) -> str:
    """Return the value of `Shard.checksums` for a local shard."""
    with local_shard(path) as (_, shard):
        return "".join(group_checksum(shard.read_at, group) for group in shard.footer.groups)
