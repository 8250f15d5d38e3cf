"""The work of a reader task: fetch row groups to its node's disk, and return each image's file and position.

Nothing is decoded here and no image bytes are sent: a reader needs neither PyTorch nor much memory, and the training
worker on the same node reads the file itself.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from bit_ray import store
from bit_ray.data.shards.manifest import Shard
from bit_ray.data.shards.read import index_rows, row_problems
from bit_ray.data.stream.cache import Located, NodeCache
from bit_ray.data.stream.settings import CacheConfig
from bit_ray.errors import DamagedShardError

# Parallel requests to an object store; one of them fetches tens of megabytes per second.
_MOST_THREADS = 16

LOCATIONS = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("labels", pa.list_(pa.int32())),
        pa.field("file", pa.string()),
        pa.field("offset", pa.int64()),
        pa.field("length", pa.int64()),
        pa.field("problem", pa.string()),
        pa.field("transient", pa.bool_()),
        pa.field("fetched_bytes", pa.int64()),
    ]
)
"""One row per requested example, in that order. ``problem`` says why a row cannot be used; ``labels`` is null then, and
so are all other columns if the row group cannot be read. ``transient`` files are not kept in the cache; the reader
unlinks them after opening. ``fetched_bytes`` is set in the first row of a row group, and null in the others. If
annotations are requested, they are one more column, ``annotation``."""
_ANNOTATION = pa.field("annotation", pa.binary())


@dataclass(frozen=True)
class BadExample:
    """An example that cannot be trained on."""

    shard: str
    """File of the set it is in."""
    row: int
    """Row in the shard."""
    id: str
    """Empty if the shard itself cannot be read."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class ReadRequest:
    """Examples that one reader task looks up."""

    shards: str
    """URI of the shard set."""
    manifest_digest: str
    """Identifies the set in the cache."""
    num_classes: int
    multi_label: bool
    row_group_size: int
    groups: tuple[tuple[Shard, int], ...]
    """Row groups to read: shard and number of the group in it."""
    group: np.ndarray
    """``[n]``: each example's index into ``groups``."""
    row: np.ndarray
    """``[n]``: its row in the row group."""
    cache: CacheConfig
    annotations: bool = False
    """Whether to read the annotations; the set must have them."""

    @property
    def schema(self) -> pa.Schema:
        """Columns of the answer."""
        return LOCATIONS.append(_ANNOTATION) if self.annotations else LOCATIONS


def read(request: ReadRequest) -> pa.Table:
    """Find the examples of a request, and fetch those that are not on this node yet.

    Returns:
        Table of schema `LOCATIONS`; rows of a damaged or missing shard have a ``problem``.

    Raises:
        DataError: The store refuses or cannot be reached, or the cache cannot be written.
    """
    cache = NodeCache(request.cache)

    def one(index: int) -> pa.Table:
        shard, group = request.groups[index]
        rows = request.row[request.group == index]
        try:
            found, table = _index(cache, request, shard, group)
        except DamagedShardError as error:
            return _unreadable(len(rows), str(error), request.schema)
        wrong = row_problems(table, request.num_classes, request.multi_label)
        problems = [wrong.get(row) for row in rows.tolist()]
        ids, labels = table["id"], table["labels"].cast(LOCATIONS.field("labels").type)
        if wrong:
            ids, labels = _without(table, wrong)
        table, n = table.take(rows), len(rows)
        return pa.table(
            [
                ids.take(rows),
                labels.take(rows),
                pa.array([found.path] * n, pa.string()),
                table["offset"],
                table["length"],
                pa.array(problems, pa.string()),
                pa.array([found.transient] * n, pa.bool_()),
                pa.array([found.fetched_bytes] + [None] * (n - 1), pa.int64()),
                *([table["annotation"]] if request.annotations else ()),
            ],
            schema=request.schema,
        )

    with ThreadPoolExecutor(min(_MOST_THREADS, len(request.groups))) as pool:
        tables = list(pool.map(one, range(len(request.groups))))
    # The tables are in the order of the groups; back to the order of the request.
    back = np.argsort(np.argsort(request.group, kind="stable"), kind="stable")
    return pa.concat_tables(tables).take(back)


def _index(cache: NodeCache, request: ReadRequest, shard: Shard, group: int) -> tuple[Located, pa.Table]:
    """Locate a row group and index it; a copy that is damaged on this node's disk is fetched again, once."""
    key = request.shards, request.manifest_digest, shard, group, request.row_group_size
    found = cache.locate(*key)
    checksum = shard.checksum(group)
    columns = ("id", "labels", "annotation") if request.annotations else ("id", "labels")
    try:
        return found, index_rows(found.path, found.group, checksum, columns)
    except DamagedShardError:
        if store.is_local(request.shards) or not found.hit:
            raise
    cache.discard(found)
    found = cache.locate(*key)
    return found, index_rows(found.path, found.group, checksum, columns)


def _without(table: pa.Table, wrong: dict[int, str]) -> tuple[pa.Array, pa.Array]:
    """Return ids and labels of a row group with bad rows: for these, ids that can be printed, and no labels."""
    ids = [id.decode(errors="replace") for id in table["id"].cast(pa.binary()).to_pylist()]
    labels = [None if row in wrong else labels for row, labels in enumerate(table["labels"].to_pylist())]
    return pa.array(ids, pa.string()), pa.array(labels, LOCATIONS.field("labels").type)


def _unreadable(count: int, problem: str, schema: pa.Schema) -> pa.Table:
    columns = [pa.nulls(count, field.type) for field in schema]
    columns[schema.get_field_index("problem")] = pa.array([problem] * count, pa.string())
    return pa.table(columns, schema=schema)


def request_groups(
    shards: Sequence[Shard], shard: np.ndarray, row: np.ndarray, row_group_size: int
) -> tuple[tuple[tuple[Shard, int], ...], np.ndarray, np.ndarray]:
    """Return the row groups that contain some rows.

    Args:
        shards: Shards of the set.
        shard: ``[n]`` number of each example's shard.
        row: ``[n]`` its row in the shard.
        row_group_size: Rows of a row group.

    Returns:
        ``groups``, ``group`` and ``row`` of a `ReadRequest`.
    """
    number, in_group = np.divmod(row, row_group_size)
    pairs, group = np.unique(np.stack([shard, number]), axis=1, return_inverse=True)
    groups = tuple((shards[s], int(g)) for s, g in pairs.T)
    return groups, group.astype(np.int32).reshape(-1), in_group.astype(np.int32)
