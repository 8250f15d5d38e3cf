"""Image files as a source: a folder of class folders, or a CSV or Parquet table of paths and labels."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from bit_ray import store
from bit_ray.data.sources.base import MAX_IMAGE_BYTES, Example, Unreadable
from bit_ray.data.sources.endings import IMAGE_SUFFIXES, is_image, named, others_by_ending
from bit_ray.data.sources.labels import check_classes, is_text, one_each, outside, to_indices
from bit_ray.data.sources.parquet import check_plain
from bit_ray.errors import DataError, brief

_TABLES = (".csv", ".parquet")
_NUM_READERS = 8
_READ_AHEAD = 32
LABEL_SEPARATOR = ";"


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
        uri = _located(self.root, self.paths[i])
        try:
            return Example(self.ids[i], store.read_bytes(uri, MAX_IMAGE_BYTES), self.labels[i])
        except store.UnfitFileError as error:
            return Unreadable(self.ids[i], error.reason)
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
        others: Mapping[str, int] | None = None,
    ) -> None:
        """``items`` has the columns id and path (text) and labels (lists of indices); ``others``: files by ending."""
        self.root = store.absolute(root)
        self.items = items
        self.class_names = class_names
        self.multi_label = multi_label
        self.empty_classes = empty_classes
        self.others = others or {}

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

    In a folder the first level names the class, and every file below it with the ending of an image that is not hidden
    is an image; the id is the path below ``uri``. In a table relative paths start at ``root`` or else at the table's
    folder. Labels are class names or, if they are not in ``class_names``, class indices. With ``multi_label`` they are
    separated by ``;`` in a CSV and a list in Parquet (which implies it). The id is the column ``id`` or else the path.

    Raises:
        DataError: No such path, no class, no image, an id that occurs twice, a label outside the class list.
    """
    uri = str(uri)
    if not store.exists(uri):
        raise DataError(f"{uri}: no such path; accepted: a folder of class folders, or a .csv or .parquet table")
    if uri.endswith(_TABLES):
        # Any column may have any type, and pyarrow may raise an error wherever it is used; for damaged Parquet files it
        # raises OSError.
        try:
            return _open_table(uri, root, class_names, multi_label)
        except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
            reason = " ".join(str(error).split())[:300]
            raise DataError(f"{uri}: not readable as a table ({reason}); correct the file") from None
    if root is not None or multi_label:
        option = "root" if root is not None else "multi_label"
        given, accepted = f"given with the folder {uri}", "only with a .csv or .parquet table"
        raise DataError.of(option, given, accepted, "leave it out")
    return _open_folder(uri, class_names)


def _open_folder(uri: str, class_names: Sequence[str] | None) -> FileSource:
    files, directories = store.list_tree(uri)
    names = [name for name, _ in files if "/" in name and not _hidden(name)]
    paths, others = [name for name in names if is_image(name)], others_by_ending(names)
    accepted = "a folder for each class, with its images below"
    loose = [name for name, _ in files if "/" not in name and is_image(name) and not _hidden(name)]
    if loose:
        remedy = "move them into a class's folder" if paths else "give the folder above, or make class folders"
        raise DataError(f"{uri}: images lie directly in it, such as {brief(loose[0])}; accepted: {accepted}; {remedy}")
    found = {name.split("/", 1)[0] for name in names} | {name for name in directories if "/" not in name}
    classes = tuple(class_names) if class_names is not None else tuple(sorted(n for n in found if not _hidden(n)))
    check_classes(uri, classes, accepted)
    index = {name: i for i, name in enumerate(classes)}
    for path in paths:
        if path.split("/", 1)[0] not in index:
            raise DataError(outside(f"{uri}/{path}", path.split("/", 1)[0], classes))
    labels = [index[path.split("/", 1)[0]] for path in paths]
    if not paths:
        given = f" ({named(others)})" if others else ""
        accepted = f"images at CLASS/.../NAME, ending in {' '.join(IMAGE_SUFFIXES)}"
        raise DataError(f"{uri}: no image in any class folder{given}; accepted: {accepted}; check the path")
    empty = _without_image(classes, np.array(labels))
    ids = pa.array(paths, pa.large_string())
    items = pa.table({"id": ids, "path": ids, "labels": one_each(pa.array(labels, pa.int32()))})
    return FileSource(uri, items, classes, multi_label=False, empty_classes=empty, others=others)


def _open_table(uri: str, root: str | None, class_names: Sequence[str] | None, multi_label: bool) -> FileSource:
    table = _read_table(uri)
    for name in ("path", "label", "id"):
        if table.column_names.count(name) > 1:
            raise DataError(f"{uri}: column {name!r} is there twice; accepted: once; rename one")
    for name in ("path", "label"):
        if name not in table.column_names:
            raise DataError(
                f"{uri}: no column {name!r}; accepted: the columns path and label, and optionally id; "
                f"found: {', '.join(table.column_names)}"
            )
    for name in ({"path", "label", "id"} & set(table.column_names)) - ({"label"} if multi_label else set()):
        column = table.column(name)
        missing = pc.fill_null(pc.equal(column, ""), True) if is_text(column.type) else pc.is_null(column)
        if pc.any(missing).as_py():
            row = pc.index(missing, True).as_py() + 1
            raise DataError(f"{uri}: row {row} has no {name}; accepted: a {name} in every row; add it")
    if table.num_rows == 0:
        raise DataError(f"{uri}: no rows; accepted: a row for each image; check the file")
    label = table.column("label").combine_chunks()
    is_list = pa.types.is_list(label.type) or pa.types.is_large_list(label.type)
    if is_list:
        multi_label = True
    elif multi_label:
        label = pc.split_pattern(pc.fill_null(label.cast(pa.large_string()), ""), LABEL_SEPARATOR)
    lists = label if multi_label else one_each(label)
    labels, classes = to_indices(uri, lists, class_names)
    paths = table.column("path").cast(pa.large_string())
    ids = table.column("id").cast(pa.large_string()) if "id" in table.column_names else paths
    repeated = pc.value_counts(ids).filter(pc.greater(pc.value_counts(ids).field("counts"), 1))
    if len(repeated):
        what = "id" if "id" in table.column_names else "path"
        raise DataError(
            f"{uri}: {what} {repeated[0]['values'].as_py()} is there {repeated[0]['counts'].as_py()} times; "
            "accepted: once; remove the duplicates, or add a column id"
        )
    start = root if root is not None else (uri.rpartition("/")[0] or "/" if "/" in uri else ".")
    items = pa.table({"id": ids, "path": paths, "labels": labels})
    empty = _without_image(classes, np.asarray(labels.flatten()))
    return FileSource(start, items, classes, multi_label=multi_label, empty_classes=empty)


def _read_table(uri: str) -> pa.Table:
    with store.open_file(uri) as stream:
        if uri.endswith(".parquet"):
            with pq.ParquetFile(stream) as parquet:
                check_plain(uri, parquet.schema_arrow)
                table = parquet.read()
        else:
            text = pa.csv.ConvertOptions(column_types={name: pa.large_string() for name in ("path", "label", "id")})
            table = pa.csv.read_csv(stream, convert_options=text)
        # Nothing has checked yet that text and names are UTF-8.
        table.validate(full=True)
        _ = table.column_names
        return table


def _without_image(classes: tuple[str, ...], labels: npt.NDArray[np.integer[Any]]) -> tuple[str, ...]:
    return tuple(classes[i] for i in np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0))


def _hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _located(root: str, path: str) -> str:
    return path if "://" in path or path.startswith("/") else store.join(root, path)
