"""Parquet files as Hugging Face publishes image sets: an ``image`` column of encoded bytes, and labels with names.

The names are in the schema's metadata. Bytes are compressed per row group, so row groups are read whole: shards are
split along a random order of row groups and mixed inside.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from bit_ray import store
from bit_ray.data.sources.base import Example, Unreadable
from bit_ray.data.sources.labels import one_each, to_indices
from bit_ray.data.sources.pattern import matching_files, short_names
from bit_ray.errors import DataError

_NUM_READERS = 8
_MAX_RATIO, _ANY_RATIO_BYTES = 100, 2**24


@dataclass(frozen=True)
class ParquetPart:
    """Some rows, by file, row group and row in it; each row group is read once, and only rows of the part are kept."""

    files: list[str]
    column: str
    ids: list[str]
    labels: list[tuple[int, ...]]
    locations: list[tuple[int, int, int]]

    def __iter__(self) -> Iterator[Example | Unreadable]:
        """Yield the rows in order."""
        images: dict[tuple[int, int, int], bytes | None] = {}
        wanted: dict[tuple[int, int], list[int]] = {}
        for file, group, row in self.locations:
            wanted.setdefault((file, group), []).append(row)
        for (file, group), rows in sorted(wanted.items()):
            with _opened(self.files[file]) as parquet:
                table = parquet.read_row_group(group, columns=[f"{self.column}.bytes"], use_threads=False)
            column = table.column(self.column).combine_chunks().field("bytes")
            for row in rows:
                images[file, group, row] = column[row].as_py()
        for id, labels, location in zip(self.ids, self.labels, self.locations, strict=True):
            data = images.pop(location)
            yield (
                Example(id, data, labels)
                if data is not None
                else Unreadable(id, "no image in this row, or only its path")
            )


class ParquetSource:
    """Rows of Parquet files with images inside: a ``Source``."""

    def __init__(
        self,
        files: list[str],
        column: str,
        row_groups: list[list[int]],
        labels: pa.Array,
        class_names: tuple[str, ...],
        *,
        multi_label: bool,
    ) -> None:
        """``row_groups`` has the number of rows of each row group of each file, ``labels`` a list for each row."""
        self.files = files
        self.column = column
        self.labels = labels
        self.class_names = class_names
        self.multi_label = multi_label
        self._short = short_names(files)
        # Of each row group: its file, its number there, the rows before it in all files and in its own.
        self._groups = [(f, g) for f, sizes in enumerate(row_groups) for g in range(len(sizes))]
        sizes = [size for file in row_groups for size in file]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        in_file = [np.concatenate([[0], np.cumsum(file)[:-1]]) for file in row_groups if file]
        self._starts_in_file = np.concatenate(in_file).astype(np.int64) if in_file else np.zeros(0, np.int64)

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self._starts[-1])

    @property
    def identity(self) -> dict[str, Any]:
        """The kind and a digest over names, row groups and labels, not over the images."""
        sha = hashlib.sha256("\0".join([self.column, *self._short]).encode())
        sha.update(self._starts.tobytes())
        sha.update(np.asarray(self.labels.value_lengths()).tobytes() + np.asarray(self.labels.flatten()).tobytes())
        return {"kind": "parquet", "sha256": sha.hexdigest()}

    def order(self, seed: int, window: int) -> npt.NDArray[np.int64]:
        """Return the order to split into shards: row groups in a seeded order, ``window`` rows at a time mixed."""
        rng = np.random.default_rng(seed)
        groups = rng.permutation(len(self._groups))
        rows = np.concatenate([np.arange(self._starts[g], self._starts[g + 1]) for g in groups])
        return np.concatenate([rng.permutation(rows[i : i + window]) for i in range(0, len(rows), window)])

    def part(self, indices: npt.NDArray[np.int64]) -> ParquetPart:
        """Return the rows at these indices."""
        groups = np.searchsorted(self._starts, indices, side="right") - 1
        rows = indices - self._starts[groups]
        used = sorted({self._groups[g][0] for g in groups})
        index_of = {file: i for i, file in enumerate(used)}
        found = [self._groups[g] for g in groups]
        numbers = self._starts_in_file[groups] + rows
        return ParquetPart(
            files=[self.files[i] for i in used],
            column=self.column,
            ids=[f"{self._short[file]}/{number:07d}" for (file, _), number in zip(found, numbers, strict=True)],
            labels=[tuple(row) for row in self.labels.take(pa.array(indices)).to_pylist()],
            locations=[(index_of[file], group, int(row)) for (file, group), row in zip(found, rows, strict=True)],
        )


def image_columns(schema: pa.Schema) -> list[str]:
    """Return the columns of encoded images, as Hugging Face stores them: struct of bytes and path."""
    return [
        field.name
        for field in schema
        if pa.types.is_struct(field.type) and "bytes" in {inner.name for inner in field.type}
    ]


def read_schema(uri: str) -> pa.Schema:
    """Read the schema of a Parquet file."""
    with _opened(uri) as parquet:
        schema = parquet.schema_arrow
        image_columns(schema)  # checks the names, which need not be UTF-8
        return schema


def open_parquet(pattern: str, *, label: str = "", class_names: Sequence[str] | None = None) -> ParquetSource:
    """Open the Parquet files that a pattern names (`bit_ray.data.sources.pattern`), local or in an object store.

    Args:
        pattern: As ``data/train-*.parquet``.
        label: The column of labels: class indices with or without names in the metadata, names, or lists of either,
            which make the set multi-label; empty: the only column with names in the metadata, or ``label``.
        class_names: In the order of the class indices; without it those of the metadata, or as found.

    Raises:
        DataError: No such file, no image or label column, files of different kinds, a label that is missing or outside
            the class list.
    """
    files = matching_files(pattern)
    schema = read_schema(files[0])
    images = image_columns(schema)
    if not images:
        raise DataError(
            f"{files[0]}: no column with images; accepted: struct<bytes, path>, as Hugging Face stores them; "
            f"found: {', '.join(schema.names)}"
        )
    column = "image" if "image" in images else images[0]
    features = _features(schema)
    label = label or _label_column(files[0], schema, features)
    if label not in schema.names:
        raise DataError(f"{files[0]}: no column {label!r}; accepted: one of {', '.join(schema.names)}; correct label")
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        read = list(pool.map(lambda file: _read_labels(file, column, label), files))
    try:
        labels = pa.chunked_array([values for _, values in read]).combine_chunks()
    except (pa.ArrowException, TypeError):
        raise DataError(
            f"{pattern}: column {label}: different types; accepted: one type; write all files with one type"
        ) from None
    multi_label = bool(pa.types.is_list(labels.type) or pa.types.is_large_list(labels.type))
    names = class_names if class_names is not None else _names(features.get(label))
    rows = [
        f"{short}, row {i + 1}"
        for short, (sizes, _) in zip(short_names(files), read, strict=True)
        for i in range(sum(sizes))
    ]
    indices, classes = to_indices(pattern, labels if multi_label else one_each(labels), names, rows)
    sizes = [sizes for sizes, _ in read]
    return ParquetSource(files, column, sizes, indices, classes, multi_label=multi_label)


def _read_labels(file: str, column: str, label: str) -> tuple[list[int], pa.Array]:
    with _opened(file) as parquet:
        if label not in parquet.schema_arrow.names or column not in image_columns(parquet.schema_arrow):
            raise DataError(f"{file}: no columns {column} and {label}; accepted: files with the same columns; check it")
        sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
        labels = parquet.read(columns=[label], use_threads=False).column(label).combine_chunks()
        labels.validate(full=True)  # nothing has checked yet that text is UTF-8
        if len(labels) != sum(sizes):
            raise pa.ArrowInvalid(f"{len(labels):,} labels in {sum(sizes):,} rows")
        return sizes, labels


def _features(schema: pa.Schema) -> dict[str, Any]:
    try:
        found = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = found.get("info", {}).get("features", {})
    except (ValueError, AttributeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _names(feature: Any) -> list[str] | None:
    """Return the class names of a ClassLabel, or of a list of them."""
    while isinstance(feature, dict) and "feature" in feature:
        feature = feature["feature"]
    if isinstance(feature, list) and len(feature) == 1:
        feature = feature[0]
    names = feature.get("names") if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None
    return [str(name) for name in names] if isinstance(names, list) and names else None


def _label_column(file: str, schema: pa.Schema, features: dict[str, Any]) -> str:
    named = [name for name in schema.names if _names(features.get(name))]
    if len(named) == 1:
        return named[0]
    for name in ("label", "labels"):
        if name in (named or schema.names):
            return name
    raise DataError(
        f"{file}: the column of labels is not clear; accepted: one of {', '.join(named or schema.names)}; "
        "name it by --label (label)"
    )


def _check_size(metadata: pq.FileMetaData, num_bytes: int) -> None:
    """Refuse a file that claims to unpack to far more bytes than images do: they are compressed already."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    largest = max((group.total_byte_size for group in groups), default=0)
    if largest > max(_ANY_RATIO_BYTES, _MAX_RATIO * num_bytes):
        raise pa.ArrowInvalid(f"a row group of {largest:,} bytes in a file of {num_bytes:,}")
    if metadata.num_rows > num_bytes or min((group.num_rows for group in groups), default=0) < 0:
        raise pa.ArrowInvalid(f"{metadata.num_rows:,} rows in a file of {num_bytes:,} bytes")


def check_plain(uri: str, schema: pa.Schema) -> None:
    """Refuse columns of extension types: where Ray Data is loaded, one of its types unpickles what is read.

    Raises:
        DataError: There is one.
    """
    left = list(zip(schema.names, schema.types, strict=True))
    while left:
        name, kind = left.pop()
        if isinstance(kind, pa.BaseExtensionType):
            raise DataError(
                f"{uri}: column {name!r} has the extension type {kind.extension_name!r}; accepted: Arrow's own types; "
                "write it again with those"
            )
        inner = [kind.field(i).type for i in range(kind.num_fields)]
        inner += [kind.value_type] if pa.types.is_dictionary(kind) else []
        left += [(name, part) for part in inner]


@contextmanager
def _opened(uri: str) -> Iterator[pq.ParquetFile]:
    try:
        with store.open_file(uri) as stream, pq.ParquetFile(stream, pre_buffer=True) as parquet:
            _check_size(parquet.metadata, stream.size())
            check_plain(uri, parquet.schema_arrow)
            yield parquet
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{uri}: not readable as Parquet ({' '.join(str(error).split())}); fetch it again") from None
