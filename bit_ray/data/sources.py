"""Where shards come from: a folder of class folders, a CSV or Parquet table of paths and labels, or an iterator."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from bit_ray.data import store
from bit_ray.data.catalog import is_embedded, open_embedded
from bit_ray.data.shards import Example, Source, Unreadable
from bit_ray.errors import ConfigError, DataError

_TABLES = (".csv", ".parquet")
_NUM_READERS = 8
_READ_AHEAD = 32
LABEL_SEPARATOR = ";"


@dataclass(frozen=True)
class IteratorSource:
    """An iterable of examples, with what a ``Source`` would tell of itself, but neither length nor parts."""

    examples: Iterable[Example]
    class_names: tuple[str, ...]
    multi_label: bool

    @property
    def identity(self) -> dict[str, Any]:
        """The kind: the content is known only after it has run."""
        return {"kind": "iterator"}


def open_source(
    source: str | Path | Source | Iterable[Example],
    output: str,
    class_names: Sequence[str] | None,
    multi_label: bool,
    root: str | None,
    num_workers: int,
) -> Source | IteratorSource:
    """Open whatever ``write_shards`` takes as source.

    Raises:
        ConfigError: an option that this kind of source does not take.
        DataError: a source that is not there, empty, or refused.
    """
    if isinstance(source, (str, Path)) and not is_embedded(str(source)):
        if _within(output, str(source)):
            raise DataError(f"{output}: lies inside the source {source}; accepted: an output elsewhere; choose another")
        return open_files(source, root=root, class_names=class_names, multi_label=multi_label)
    if root is not None:
        raise ConfigError(f"root: {root}; accepted: only with a .csv or .parquet table; leave it out")
    if isinstance(source, (str, Path)):
        opened = open_embedded(str(source))
    elif hasattr(source, "part"):
        opened = cast(Source, source)
    else:
        if num_workers > 0:
            raise ConfigError(
                f"num_workers: {num_workers}; accepted: 0 with an iterator, which is read in this process"
            )
        if not class_names or len(set(class_names)) < len(class_names):
            raise ConfigError("class_names: empty or not unique; accepted with an iterator: unique names; give them")
        return IteratorSource(source, tuple(class_names), multi_label)
    if class_names is not None or multi_label:
        option = "class_names" if class_names is not None else "multi_label"
        raise ConfigError(f"{option}: given with a source that knows its own; accepted: nothing; leave it out")
    if not opened.class_names or not len(opened):
        raise DataError(
            f"source: {len(opened)} examples of {len(opened.class_names)} classes; accepted: at least one of each"
        )
    return opened


@dataclass(frozen=True)
class FilePart:
    """Some image files with their ids and labels, read when iterated."""

    root: str
    ids: list[str]
    paths: list[str]
    labels: list[tuple[int, ...]]

    def __iter__(self) -> Iterator[Example | Unreadable]:
        """Read the files in order, a few ahead in threads."""
        with ThreadPoolExecutor(_NUM_READERS) as pool:
            for start in range(0, len(self.ids), _READ_AHEAD):
                yield from pool.map(self._read, range(start, min(start + _READ_AHEAD, len(self.ids))))

    def _read(self, i: int) -> Example | Unreadable:
        try:
            return Example(self.ids[i], store.read_bytes(_located(self.root, self.paths[i])), self.labels[i])
        except DataError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return Unreadable(self.ids[i], "no such file")
            raise


class FileSource:
    """Image files under a root, with their labels: a ``Source``."""

    def __init__(
        self,
        root: str,
        items: pa.Table,
        class_names: tuple[str, ...],
        *,
        multi_label: bool,
        empty_classes: tuple[str, ...] = (),
    ) -> None:
        """``items`` has the columns id and path (text) and labels (list of class indices)."""
        self.root = store.absolute(root)
        self.items = items
        self.class_names = class_names
        self.multi_label = multi_label
        self.empty_classes = empty_classes

    def __len__(self) -> int:
        """Return the number of files."""
        return int(self.items.num_rows)

    @property
    def identity(self) -> dict[str, Any]:
        """The kind and a digest over all ids, paths and labels, not over the files' content."""
        sha = hashlib.sha256()
        for batch in self.items.to_batches(max_chunksize=65_536):
            for name in ("id", "path"):
                sha.update("\0".join(batch.column(name).to_pylist()).encode())
            labels = batch.column("labels")
            sha.update(np.asarray(pc.list_value_length(labels)).tobytes() + np.asarray(labels.flatten()).tobytes())
        return {"kind": "files", "sha256": sha.hexdigest()}

    def part(self, indices: npt.NDArray[np.int64]) -> FilePart:
        """Return the files at these indices."""
        rows = self.items.take(pa.array(indices))
        ids, paths, labels = (rows.column(name).to_pylist() for name in ("id", "path", "labels"))
        return FilePart(self.root, ids, paths, [tuple(row) for row in labels])


def open_files(
    uri: str | Path, *, root: str | None = None, class_names: Sequence[str] | None = None, multi_label: bool = False
) -> FileSource:
    """Open a folder of class folders, or a ``.csv`` or ``.parquet`` table with the columns path and label.

    In a folder the first level names the class and every file below it that is not hidden is an image; the id is the
    path below ``uri``. In a table relative paths start at ``root`` or else where the table lies; labels are class names
    or, where ``class_names`` does not know them, class indices; with ``multi_label`` they are separated by ``;`` in a
    CSV and a list in Parquet (which implies it); the id is the column ``id`` or else the path.

    Raises:
        DataError: no such path, no class, no image, an id that comes twice, a label outside the class list.
    """
    uri = str(uri)
    if not store.exists(uri):
        raise DataError(f"{uri}: no such path; accepted: a folder of class folders, or a .csv or .parquet table")
    if uri.endswith(_TABLES):
        return _open_table(uri, root, class_names, multi_label)
    if root is not None or multi_label:
        option = "root" if root is not None else "multi_label"
        raise DataError(
            f"{option}: given with the folder {uri}; accepted: only with a .csv or .parquet table; leave it out"
        )
    return _open_folder(uri, class_names)


def _open_folder(uri: str, class_names: Sequence[str] | None) -> FileSource:
    files, directories = store.list_tree(uri)
    paths = [name for name, _ in files if "/" in name and not _hidden(name)]
    found = {name.split("/", 1)[0] for name in paths} | {name for name in directories if "/" not in name}
    classes = tuple(class_names) if class_names is not None else tuple(sorted(n for n in found if not _hidden(n)))
    _check_classes(uri, classes, "a folder for each class, with its images below")
    index = {name: i for i, name in enumerate(classes)}
    for path in paths:
        if path.split("/", 1)[0] not in index:
            raise DataError(_outside(f"{uri}/{path}", path.split("/", 1)[0], classes))
    labels = [index[path.split("/", 1)[0]] for path in paths]
    if not paths:
        raise DataError(f"{uri}: no image in any class folder; accepted: images at CLASS/.../NAME; check the path")
    empty = tuple(classes[i] for i in np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0))
    ids = pa.array(paths, pa.large_string())
    items = pa.table({"id": ids, "path": ids, "labels": _one_each(pa.array(labels, pa.int32()))})
    return FileSource(uri, items, classes, multi_label=False, empty_classes=empty)


def _open_table(uri: str, root: str | None, class_names: Sequence[str] | None, multi_label: bool) -> FileSource:
    table = _read_table(uri)
    for name in ("path", "label"):
        if name not in table.column_names:
            raise DataError(
                f"{uri}: no column {name!r}; accepted: the columns path and label, and if wanted id; "
                f"found: {', '.join(table.column_names)}"
            )
    for name in ({"path", "label", "id"} & set(table.column_names)) - ({"label"} if multi_label else set()):
        column = table.column(name)
        missing = pc.fill_null(pc.equal(column, ""), True) if _is_text(column.type) else pc.is_null(column)
        if pc.any(missing).as_py():
            row = pc.index(missing, True).as_py() + 1
            raise DataError(f"{uri}: row {row} has no {name}; accepted: a {name} in every row; fill it in")
    if table.num_rows == 0:
        raise DataError(f"{uri}: no rows; accepted: a row for each image; check the file")
    label = table.column("label").combine_chunks()
    is_list = pa.types.is_list(label.type) or pa.types.is_large_list(label.type)
    if is_list:
        multi_label = True
    elif multi_label:
        label = pc.split_pattern(pc.fill_null(label.cast(pa.large_string()), ""), LABEL_SEPARATOR)
    lists = label if multi_label else _one_each(label)
    labels, classes = _to_indices(uri, lists, class_names)
    paths = table.column("path").cast(pa.large_string())
    ids = table.column("id").cast(pa.large_string()) if "id" in table.column_names else paths
    repeated = pc.value_counts(ids).filter(pc.greater(pc.value_counts(ids).field("counts"), 1))
    if len(repeated):
        what = "id" if "id" in table.column_names else "path"
        raise DataError(
            f"{uri}: {what} {repeated[0]['values'].as_py()} comes {repeated[0]['counts'].as_py()} times; "
            "accepted: unique; remove the repetitions, or give a column id"
        )
    start = root if root is not None else (uri.rpartition("/")[0] or "/" if "/" in uri else ".")
    return FileSource(start, pa.table({"id": ids, "path": paths, "labels": labels}), classes, multi_label=multi_label)


def _read_table(uri: str) -> pa.Table:
    files, path = store.filesystem(uri)
    with store.explained(uri):
        stream = files.open_input_file(path)
    try:
        with stream:
            if uri.endswith(".parquet"):
                return pq.read_table(stream)
            text = pa.csv.ConvertOptions(column_types={name: pa.large_string() for name in ("path", "label", "id")})
            return pa.csv.read_csv(stream, convert_options=text)
    except pa.ArrowException as error:
        raise DataError(f"{uri}: not readable as a table ({' '.join(str(error).split())}); correct the file") from None


def _to_indices(uri: str, lists: pa.Array, class_names: Sequence[str] | None) -> tuple[pa.Array, tuple[str, ...]]:
    """Return lists of class indices, and the class names: given, or the sorted labels, or 0 to the largest index."""
    values = lists.flatten()
    lengths = np.asarray(pc.fill_null(pc.list_value_length(lists), 0)).astype(np.int64)
    rows = np.repeat(np.arange(len(lists)), lengths)
    if _is_text(values.type):
        values = pc.utf8_trim_whitespace(values)
        kept = np.asarray(pc.not_equal(values, ""))
        values, rows = values.filter(pa.array(kept)), rows[kept]
        lengths = np.bincount(rows, minlength=len(lists))
    if values.null_count:
        raise DataError(f"{uri}: row {rows[int(np.argmax(values.is_null()))] + 1} has an empty label; fill it in")
    distinct = pc.unique(values)
    numbers = _numbers(distinct)
    if class_names is not None:
        classes = tuple(class_names)
    elif numbers is not None:
        classes = tuple(str(i) for i in range(max(numbers, default=-1) + 1))
    else:
        classes = tuple(sorted(distinct.to_pylist()))
    _check_classes(uri, classes, "labels in the table, or a class list")
    by_name = _is_text(values.type) and (numbers is None or set(distinct.to_pylist()) <= set(classes))
    if by_name:
        indices = pc.index_in(values, value_set=pa.array(classes, values.type))
        wrong = np.asarray(indices.is_null())
    else:
        indices = values.cast(pa.int64()) if numbers is not None else pa.nulls(len(values), pa.int64())
        array = np.asarray(indices.fill_null(-1))
        wrong = (array < 0) | (array >= len(classes))
    if wrong.any():
        first = int(np.argmax(wrong))
        raise DataError(_outside(f"{uri}: row {rows[first] + 1}", str(values[first].as_py()), classes))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), indices.cast(pa.int32())), classes


def _numbers(distinct: pa.Array) -> list[int] | None:
    """Return the labels as whole numbers if all of them are."""
    try:
        return [int(value) for value in distinct.cast(pa.int64()).to_pylist()]
    except pa.ArrowException:
        return None


def _one_each(values: pa.Array) -> pa.Array:
    return pa.LargeListArray.from_arrays(pa.array(np.arange(len(values) + 1), pa.int64()), values)


def _check_classes(uri: str, classes: tuple[str, ...], accepted: str) -> None:
    if not classes:
        raise DataError(f"{uri}: the class list is empty; accepted: {accepted}; check the path")
    if len(set(classes)) < len(classes):
        twice = next(name for name in classes if classes.count(name) > 1)
        raise DataError(f"{uri}: class {twice!r} comes twice in the class list; accepted: unique names; remove one")


def _outside(place: str, label: str, classes: tuple[str, ...]) -> str:
    names = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
    return (
        f"{place}: label {label!r} is outside the class list; accepted: one of {len(classes)} classes ({names}) "
        "or its index; correct the label or the class list"
    )


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _within(path: str, directory: str) -> bool:
    inner, outer = store.filesystem(path)[1], store.filesystem(directory)[1]
    return store.is_local(path) == store.is_local(directory) and f"{inner}/".startswith(f"{outer}/")


def _located(root: str, path: str) -> str:
    return path if "://" in path or path.startswith("/") else store.join(root, path)
