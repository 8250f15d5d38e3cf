"""Images in archives, read from there one by one: a ``Source`` for all sets that are distributed as tars."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bit_ray import store
from bit_ray.config import is_unicode
from bit_ray.data.sources.archives import Member
from bit_ray.data.sources.base import MAX_IMAGE_BYTES, Example, Unreadable
from bit_ray.errors import DataError, StoreError

_NUM_READERS = 8
_READ_AHEAD = 32
_MAX_OPEN_FILES = 64
_CHUNK = 65_536


class Items:
    """The examples of a set, collected while its archives are scanned; 14 million of them take 1 GB."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}
        self._rows: list[tuple[str, int, int, int, Sequence[int]]] = []
        self._chunks: list[pa.Table] = []

    def add(self, id: str, member: Member, labels: Sequence[int] = ()) -> None:
        """Add one example.

        Raises:
            DataError: Its id cannot be written as text, such as a file name that is not UTF-8.
        """
        if not is_unicode(id):
            raise DataError(f"{member.file}: {id}: the name is not UTF-8; accepted: names in UTF-8; rename it")
        file = self._files.setdefault(member.file, len(self._files))
        self._rows.append((id, file, member.offset, member.length, labels))
        if len(self._rows) == _CHUNK:
            self._flush()

    def source(
        self, kind: str, class_names: Iterable[str], *, multi_label: bool = False, labels: pa.Array | None = None
    ) -> "ArchiveSource":
        """Return them as a source; ``labels``, lists in the order of the examples, replace those added."""
        self._flush()
        table = pa.concat_tables(self._chunks).combine_chunks()
        if labels is not None:
            table = table.set_column(_ITEMS.get_field_index("labels"), _ITEMS.field("labels"), labels)
        return ArchiveSource(kind, table, list(self._files), tuple(class_names), multi_label)

    def _flush(self) -> None:
        columns = zip(*self._rows, strict=True) if self._rows else [[]] * len(_ITEMS)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, _ITEMS, strict=True)]
        self._chunks.append(pa.table(arrays, schema=_ITEMS))
        self._rows.clear()


_ITEMS = pa.schema(
    {
        "id": pa.large_string(),
        "file": pa.int32(),
        "offset": pa.int64(),
        "length": pa.int64(),
        "labels": pa.large_list(pa.int32()),
    }
)


@dataclass(frozen=True)
class ArchivePart:
    """Some images by file and offset, read when iterated."""

    files: list[str]
    ids: list[str]
    file_of: list[int]
    offsets: list[int]
    lengths: list[int]
    labels: list[tuple[int, ...]]

    def __iter__(self) -> Iterator[Example | Unreadable]:
        """Read the images in order, a few ahead in threads."""
        opened = lru_cache(_MAX_OPEN_FILES)(_open)
        with ThreadPoolExecutor(_NUM_READERS) as pool:
            for start in range(0, len(self.ids), _READ_AHEAD):
                stop = min(start + _READ_AHEAD, len(self.ids))
                yield from pool.map(lambda i: self._read(i, opened(self.files[self.file_of[i]])), range(start, stop))

    def _read(self, i: int, file: pa.NativeFile) -> Example | Unreadable:
        if self.lengths[i] > MAX_IMAGE_BYTES:
            reason = f"{self.lengths[i]:,} bytes; accepted: at most {MAX_IMAGE_BYTES:,}"
            return Unreadable(self.ids[i], reason)
        uri = self.files[self.file_of[i]]
        with store.explained(uri):
            data = store.patiently(uri, lambda: store.read_range(file, self.offsets[i], self.lengths[i]))
        return Example(self.ids[i], bytes(data), self.labels[i])


class ArchiveSource:
    """Images in archives, with their labels: a ``Source``."""

    def __init__(
        self, kind: str, items: pa.Table, files: list[str], class_names: tuple[str, ...], multi_label: bool
    ) -> None:
        """``items`` has the columns id, file (index into ``files``), offset, length and labels."""
        self.kind = kind
        self.items = items
        self.files = files
        self.class_names = class_names
        self.multi_label = multi_label

    def __len__(self) -> int:
        """Return the number of images."""
        return int(self.items.num_rows)

    @property
    def ids(self) -> list[str]:
        """The ids, in order."""
        ids: list[str] = self.items.column("id").to_pylist()
        return ids

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """The first label of each image, in order."""
        return np.array([labels[0] for labels in self.items.column("labels").to_pylist()], np.int64)

    @property
    def identity(self) -> dict[str, Any]:
        """The kind and a digest over all ids, lengths and labels, not over the images' content."""
        sha = hashlib.sha256()
        for batch in self.items.to_batches(max_chunksize=_CHUNK):
            sha.update("\0".join(batch.column("id").to_pylist()).encode())
            sha.update(np.asarray(batch.column("length")).tobytes())
            labels = batch.column("labels")
            sha.update(np.asarray(labels.value_lengths()).tobytes() + np.asarray(labels.flatten()).tobytes())
        return {"kind": self.kind, "sha256": sha.hexdigest()}

    def part(self, indices: npt.NDArray[np.int64]) -> ArchivePart:
        """Return the images at these indices."""
        rows = self.items.take(pa.array(indices))
        # The part has only the files that it reads.
        used, file_of = np.unique(np.asarray(rows.column("file")), return_inverse=True)
        ids, offsets, lengths, labels = (rows.column(name).to_pylist() for name in ("id", "offset", "length", "labels"))
        files = [self.files[i] for i in used]
        return ArchivePart(files, ids, file_of.tolist(), offsets, lengths, [tuple(row) for row in labels])


def _open(uri: str) -> pa.NativeFile:
    try:
        return store.open_file(uri)
    except store.UnfitFileError:
        raise
    except StoreError as error:
        raise StoreError(f"{error}; it existed when the set was opened") from None
