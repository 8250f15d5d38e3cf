"""What is in a folder of images: classes, parts, kinds of files and duplicates."""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bit_ray import store
from bit_ray.data.images.alike import near_duplicates, thumbnail
from bit_ray.data.images.decode import ImageError, image_kind, orientation
from bit_ray.data.sources.base import MAX_IMAGE_BYTES
from bit_ray.data.sources.endings import IMAGE_SUFFIXES, is_image, named, others_by_ending
from bit_ray.data.sources.files import FileSource
from bit_ray.data.sources.labels import check_classes, one_each
from bit_ray.errors import DataError

Part = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = ("train", "val", "test")

_CALLED: dict[str, Part] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}  # fmt: skip
_NUM_READERS = 8
_ACCEPTED = "a folder with a folder of images for each class, or with train (and val, test) with those below"


@dataclass(frozen=True, kw_only=True)
class Found:
    """An image file."""

    path: str
    """Below the folder."""
    label: int
    """Index of its class."""
    part: Part | None
    """Part that it lies in; None where the folder has no parts."""
    sha256: str
    """Of the file."""
    kind: str = ""
    """What it is if it is not plain 8-bit RGB, such as ``grayscale``."""
    sideways: bool = False
    """Whether a camera stored it turned or mirrored."""
    group: str = ""
    """SHA-256 of the first of the images that it is a copy of, also resized, recompressed or slightly cropped; empty:
    its own."""

    @property
    def original(self) -> str:
        """What it has in common with its copies."""
        return self.group or self.sha256


class _Readable(NamedTuple):
    image: Found
    thumbnail: npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What is in a folder."""

    folder: str
    class_names: tuple[str, ...]
    images: tuple[Found, ...]
    """All that may be readable, by path."""
    unreadable: tuple[tuple[str, str], ...]
    """Path and reason of files that have the ending of an image but are not one."""
    others: Mapping[str, int]
    """Files with other endings, by ending."""
    alike: tuple[tuple[Found, Found], ...] = ()
    """Near-duplicates that are not the same byte for byte: each is in a pair with one of the others."""

    @property
    def kinds(self) -> Counter[str]:
        """Images by what they are, other than upright 8-bit RGB."""
        turned = sum(image.sideways for image in self.images)
        return Counter(image.kind for image in self.images if image.kind) + Counter({"stored sideways": turned})

    @property
    def num_duplicates(self) -> int:
        """Images that repeat another one in the folder, byte for byte."""
        return len(self.images) - len({image.sha256 for image in self.images})

    @property
    def num_near_duplicates(self) -> int:
        """Images that repeat another one except for size, compression or a slight crop."""
        return len({image.sha256 for image in self.images}) - len({image.original for image in self.images})


def scan_folder(folder: str, progress: Callable[[int, int | None], None] | None = None) -> Scan:
    """Look through a folder, local or in a store.

    Args:
        folder: Path or URI.
        progress: Told (files looked at, files in all).

    Raises:
        DataError: no such folder, no image, fewer than two classes, or images where none belong.
    """
    folder = store.absolute(folder)
    if not store.exists(folder):
        raise DataError(f"{folder}: no such folder; accepted: {_ACCEPTED}; check the path")
    if store.is_local(folder) and Path(store.filesystem(folder)[1]).is_file():
        raise DataError(f"{folder}: a file; accepted: {_ACCEPTED}; give the folder")
    listed = [name for name, _ in store.list_tree(folder)[0]]
    names = [name for name in listed if not any(part.startswith(".") for part in name.split("/"))]
    paths = [name for name in names if is_image(name)]
    others = others_by_ending(names)
    depth, class_names = _layout(folder, paths, others)
    index = {name: i for i, name in enumerate(class_names)}

    def look(path: str) -> _Readable | tuple[str, str]:
        try:
            data = store.read_bytes(store.join(folder, path), MAX_IMAGE_BYTES)
            kind = image_kind(data)
            small = thumbnail(data)
        except ImageError as error:
            return path, error.reason
        except store.UnfitFileError as error:
            return path, error.reason
        except DataError as error:
            if isinstance(error.__cause__, (FileNotFoundError, PermissionError)):
                return path, str(error.__cause__.strerror or error.__cause__)
            raise
        directories = path.split("/")
        found = Found(
            path=path,
            label=index[directories[depth]],
            part=_CALLED[directories[0].lower()] if depth else None,
            sha256=hashlib.sha256(data).hexdigest(),
            kind=kind,
            sideways=orientation(data) > 1,
        )
        return _Readable(found, small)

    images: list[Found] = []
    thumbnails: list[npt.NDArray[np.uint8]] = []
    unreadable: list[tuple[str, str]] = []
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        for done, found in enumerate(pool.map(look, paths), 1):
            if isinstance(found, _Readable):
                images.append(found.image)
                thumbnails.append(found.thumbnail)
            else:
                unreadable.append(found)
            if progress is not None:
                progress(done, len(paths))
    if not images:
        path, reason = unreadable[0]
        raise DataError(
            f"{folder}: none of {len(paths):,} images can be read; the first, {path}: {reason}; accepted: image files"
        )
    images, alike = _grouped(images, np.stack(thumbnails))
    return Scan(
        folder=folder,
        class_names=class_names,
        images=tuple(images),
        unreadable=tuple(unreadable),
        others=others,
        alike=alike,
    )


def _grouped(
    images: Sequence[Found], thumbnails: npt.NDArray[np.uint8]
) -> tuple[list[Found], tuple[tuple[Found, Found], ...]]:
    """Return the images with their groups, and the pairs that make these."""
    first = {image.sha256: i for i, image in reversed(list(enumerate(images)))}
    distinct = sorted(first.values())
    pairs = [(distinct[a], distinct[b]) for a, b in near_duplicates(thumbnails[distinct])]
    leader = {i: i for i in distinct}

    def lead(i: int) -> int:
        while leader[i] != i:
            i = leader[i]
        return i

    for a, b in pairs:
        low, high = sorted((lead(a), lead(b)))
        leader[high] = low
    grouped = [replace(image, group=images[lead(first[image.sha256])].sha256) for image in images]
    return grouped, tuple((grouped[a], grouped[b]) for a, b in pairs)


def _layout(folder: str, paths: Sequence[str], others: Mapping[str, int]) -> tuple[int, tuple[str, ...]]:
    """Return how many directories are above those of the classes, 0 or 1, and the class names.

    Raises:
        DataError: it is not a folder of classes.
    """
    if not paths:
        raise DataError(
            f"{folder}: no image in it{f' ({named(others)})' if others else ''}; accepted: files ending in "
            f"{' '.join(IMAGE_SUFFIXES)}; convert them, or check the path"
        )
    loose = [path for path in paths if "/" not in path]
    above = {path.split("/")[0] for path in paths if "/" in path}
    if loose:
        remedy = f"move {loose[0]!r} into a class's folder" if above else "give the folder above, or make class folders"
        raise DataError(f"{folder}: {_lying(loose)} directly in it; accepted: {_ACCEPTED}; {remedy}")
    parts = {name for name in above if name.lower() in _CALLED}
    depth = 0
    if parts:
        called = [_CALLED[name.lower()] for name in parts]
        if parts != above or "train" not in called or len(set(called)) < len(called):
            given = ", ".join(sorted(above)[:6])
            raise DataError(
                f"{folder}: has the folders {given}; accepted: {_ACCEPTED}; move or rename what does not belong"
            )
        depth = 1
        loose = [path for path in paths if path.count("/") == 1]
        if loose:
            part = loose[0].split("/")[0]
            here = [path for path in loose if path.startswith(f"{part}/")]
            raise DataError(
                f"{folder}/{part}: {_lying(here)} directly in it; accepted: a folder of images for each class; "
                f"make class folders, or if {part} is a class, rename it"
            )
    found = {part: {p.split("/")[1] for p in paths if p.split("/")[0] == part} for part in parts}
    train = next((found[part] for part in parts if _CALLED[part.lower()] == "train"), above)
    for part, names in found.items():
        if names - train:
            extra = sorted(names - train)
            raise DataError(
                f"{folder}/{part}: class {extra[0]!r} is not in train; accepted: the classes of train; rename or "
                "remove it"
            )
    class_names = tuple(sorted(train))
    if len(class_names) < 2:
        (only,) = class_names
        below = {path.split("/")[depth + 1] for path in paths if path.count("/") > depth + 1}
        hint = f"did you mean {folder}/{only}?" if len(below) > 1 else "add another class"
        raise DataError(f"{folder}: one class, {only!r}; accepted: at least two; {hint}")
    check_classes(folder, class_names, _ACCEPTED)
    return depth, class_names


def _lying(paths: Sequence[str]) -> str:
    return "1 image lies" if len(paths) == 1 else f"{len(paths):,} images lie"


def source(scan: Scan, images: Sequence[Found]) -> FileSource:
    """Return some images of a folder as a source of shards."""
    ids = pa.array([image.path for image in images], pa.large_string())
    labels = one_each(pa.array([image.label for image in images], pa.int32()))
    items = pa.table({"id": ids, "path": ids, "labels": labels})
    return FileSource(scan.folder, items, scan.class_names, multi_label=False)
