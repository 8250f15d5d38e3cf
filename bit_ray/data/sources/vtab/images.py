"""Images of the tasks, in a folder, a tar, a zip or an array: sources whose ids are known before any image is read."""

import hashlib
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from bit_ray import store
from bit_ray.data.images.png import rgb_png
from bit_ray.data.sources.archived import Items
from bit_ray.data.sources.archives import MAX_WHOLE_BYTES, Member, as_text, members, read_members
from bit_ray.data.sources.base import MAX_IMAGE_BYTES, Example, Source, Unreadable
from bit_ray.errors import BitRayError, DataError

_IMAGE = re.compile(r"\.(jpe?g|png|bmp|gif|tiff?)$", re.IGNORECASE)


class KnownSource(Source, Protocol):
    """A source that knows its ids without reading images."""

    @property
    def ids(self) -> Sequence[str]:
        """Ids in order."""


class Images(Protocol):
    """Encoded images by index."""

    def take(self, chosen: npt.NDArray[np.int64]) -> Iterable[bytes]:
        """Return the images at these indices, in this order, as a small object that pickles."""


@dataclass(frozen=True)
class ImageSet:
    """Images of one label each, in an array or a zip: a ``Source``."""

    kind: str
    """Its kind, for its identity."""
    ids: Sequence[str]
    """Unique names."""
    labels: npt.NDArray[np.int64] = field(repr=False)
    """``[N]`` class indices."""
    images: Images = field(repr=False)
    """The images, in the same order."""
    class_names: tuple[str, ...] = field(repr=False)
    """Names in the order of the class indices."""
    multi_label: bool = False
    """Always false."""

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.ids)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The kind, and a digest over ids and labels, not over the images' content."""
        sha = hashlib.sha256("\0".join(self.ids).encode())
        sha.update(self.labels.astype("<i8").tobytes())
        return {"kind": self.kind, "sha256": sha.hexdigest()}

    def part(self, indices: npt.NDArray[np.int64]) -> "Part":
        """Return the images at these indices."""
        return Part([self.ids[i] for i in indices], self.labels[indices].tolist(), self.images.take(indices))


@dataclass(frozen=True)
class Part:
    """Some images with their ids and labels, read when iterated."""

    ids: list[str]
    labels: list[int]
    images: Iterable[bytes]

    def __iter__(self) -> Iterator[Example | Unreadable]:
        """Read the images in order."""
        for id, label, image in zip(self.ids, self.labels, self.images, strict=True):
            yield Example(id, image, (label,))


@dataclass(frozen=True)
class Selected:
    """Some images of a source, in another order: a ``Source``."""

    source: Source
    """The full source."""
    indices: npt.NDArray[np.int64] = field(repr=False)
    """``[N]`` indices into it."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Those of the full source."""
        return tuple(self.source.class_names)

    @property
    def multi_label(self) -> bool:
        """As in the full source."""
        return self.source.multi_label

    @property
    def identity(self) -> dict[str, Any]:
        """The full source, and the indices."""
        sha = hashlib.sha256(np.asarray(self.indices, "<i8").tobytes())
        return {"kind": "selected", "of": self.source.identity, "sha256": sha.hexdigest()}

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.indices)

    def part(self, indices: npt.NDArray[np.int64]) -> Iterable[Example | Unreadable]:
        """Return the images at these indices of the selection."""
        return self.source.part(self.indices[indices])


@dataclass(frozen=True)
class ArrayImages:
    """Pixels in memory."""

    pixels: npt.NDArray[np.uint8]
    """``[N, H, W] uint8``, or ``[N, H, W, 3]``."""

    def take(self, chosen: npt.NDArray[np.int64]) -> "ArrayImages":
        """Return a copy of some of them."""
        return ArrayImages(self.pixels[chosen])

    def __iter__(self) -> Iterator[bytes]:
        """Encode them in order."""
        return map(rgb_png, self.pixels)


@dataclass(frozen=True)
class ZipImages:
    """Files of a zip."""

    path: Path
    names: tuple[str, ...]

    def take(self, chosen: npt.NDArray[np.int64]) -> "ZipImages":
        """Some of them."""
        return ZipImages(self.path, tuple(self.names[i] for i in chosen))

    def __iter__(self) -> Iterator[bytes]:
        """Read them in order."""
        with opened_zip(self.path) as archive:
            for name in self.names:
                yield read_entry(archive, name, MAX_IMAGE_BYTES)


class Files:
    """A folder, tar file or zip of a publisher: its images by their path in it."""

    def __init__(self, path: Path) -> None:
        """Scan it once.

        Raises:
            DataError: Not an archive, or a damaged one.
        """
        self.path = path
        self.members: dict[str, Member | None] = {}
        if path.suffix == ".zip":
            with opened_zip(path) as archive:
                self.members = {
                    entry.filename: None for entry in archive.infolist() if entry.filename[-1:] not in ("", "/")
                }
        else:
            self.members = {member.name: member for member in members(path)}

    @cached_property
    def image_names(self) -> list[str]:
        """Paths of the files that are images by their suffix, sorted, without hidden ones."""
        return sorted(name for name in self.members if _IMAGE.search(name) and not _hidden(name))

    def read_text(self, name: str) -> str:
        """Read one text file.

        Raises:
            DataError: It is missing, too large, or not UTF-8.
        """
        if self.path.suffix != ".zip":
            return as_text(read_members(self.path, [name])[name], f"{self.path}: {name}")
        with opened_zip(self.path) as archive:
            return as_text(read_entry(archive, name), f"{self.path}: {name}")

    def source(
        self, kind: str, ids: Sequence[str], names: Sequence[str], labels: Sequence[int], class_names: Sequence[str]
    ) -> KnownSource:
        """Return images by their paths, with ids and labels, as a source.

        Raises:
            DataError: One of them is missing.
        """
        missing = next((name for name in names if name not in self.members), None)
        if missing is not None:
            raise DataError(f"{self.path}: no {missing} in it; accepted: all of the publisher's files; fetch it again")
        if self.path.suffix == ".zip":
            images = ZipImages(self.path, tuple(names))
            return ImageSet(kind, list(ids), np.array(labels, np.int64), images, tuple(class_names))
        items = Items()
        for id, name, label in zip(ids, names, labels, strict=True):
            member = self.members[name]
            assert member is not None
            items.add(id, member, [label])
        return items.source(kind, class_names)


@contextmanager
def opened_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a zip for reading, and explain what is wrong with it.

    Raises:
        DataError: Not a zip, or a damaged one.
    """
    store.check_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except BitRayError:
        raise
    # An invalid number in it, or an encoding or encryption that zipfile does not support.
    except (OSError, EOFError, ValueError, RuntimeError, struct.error, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: damaged or not a zip ({' '.join(str(error).split())}); fetch it again") from None


def find_entry(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """Find one file of a zip.

    Raises:
        DataError: It is missing, or compressed by a method that can unpack a few bytes to gigabytes at once.
    """
    try:
        entry = archive.getinfo(name)
    except KeyError:
        raise DataError(
            f"{archive.filename}: no {name} in it; accepted: the publisher's archive; fetch it again"
        ) from None
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(
            f"{archive.filename}: {name}: compressed by method {entry.compress_type}; accepted: stored or deflated, as "
            "published; fetch it again"
        )
    return entry


def read_entry(archive: zipfile.ZipFile, name: str, max_bytes: int = MAX_WHOLE_BYTES) -> bytes:
    """Read one file of a zip.

    Raises:
        DataError: As `find_entry`, or it is larger.
    """
    entry = find_entry(archive, name)
    if entry.file_size > max_bytes:
        raise DataError(
            f"{archive.filename}: {name}: {entry.file_size:,} bytes; accepted: at most {max_bytes:,}; fetch it again"
        )
    return archive.read(entry)


def _hidden(path: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in path.split("/"))
