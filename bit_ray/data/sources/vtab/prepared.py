"""Data sets as TensorFlow Datasets prepares them, read without TensorFlow, in the order that the benchmark uses.

Put or link the version folder of a data set (with its ``NAME-SPLIT.tfrecord-00000-of-00016``) into the task's folder as
``tfds``. Features are those that the benchmark reads (task_adaptation:data/*.py).
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bit_ray import store
from bit_ray.data.images.decode import ImageError, decode_image
from bit_ray.data.images.png import rgb_png
from bit_ray.data.sources.archived import Items
from bit_ray.data.sources.archives import MAX_WHOLE_BYTES, Member, as_text
from bit_ray.data.sources.base import Example, Unreadable
from bit_ray.data.sources.vtab import derive
from bit_ray.data.sources.vtab.images import ImageSet, KnownSource
from bit_ray.data.sources.vtab.records import Record, read_records
from bit_ray.data.sources.vtab.structured import CLASSES
from bit_ray.data.sources.vtab.tasks import Task
from bit_ray.errors import DataError

FOLDER = "tfds"
_SPLITS = {"all": "train", "train": "train", "val": "validation", "test": "test"}
# Names of object types in the order of their numbers (tensorflow_datasets:object_detection/kitti.py).
_KITTI_TYPES = ("Car", "Van", "Truck", "Pedestrian", "Person_sitting", "Cyclist", "Tram", "Misc")


def is_prepared(task: Task, folder: Path) -> bool:
    """Return whether the task's data exists in this form."""
    return (folder / task.folder / FOLDER).is_dir()


def open_prepared(task: Task, folder: Path, part: str) -> KnownSource:
    """Open one part of a task's data set, in storage order.

    Raises:
        DataError: Shards are missing or damaged, or have other features.
    """
    where = folder / task.folder / FOLDER
    split = _SPLITS[part]
    paths = sorted(where.glob(f"*-{split}.tfrecord-*-of-*"))
    numbers = [re.search(r"-(\d+)-of-(\d+)$", path.name) for path in paths]
    total = int(numbers[0][2]) if numbers and numbers[0] else 0
    if [int(match[1]) for match in numbers if match] != list(range(total)) or not total:
        given = f"{where}: {len(paths)} of {total or 'the'} shards of {split}"
        accepted = f"all of them, named NAME-{split}.tfrecord-00000-of-00001"
        raise DataError.of(task.name, given, accepted, "copy the whole version folder")
    label = _LABELS.get(task.name, _label)
    rows: list[tuple[str, Member, int]] = []
    for path in paths:
        for record in read_records(path):
            try:
                [(offset, length)] = record.extents["image"]
                rows.append((f"{part}/{len(rows):06d}", Member("", str(path), offset, length), label(record)))
            except (KeyError, IndexError, ValueError) as error:
                given = f"{path}: a record lacks what the task needs ({error})"
                accepted = f"the data set prepared for {task.name}"
                raise DataError.of(task.name, given, accepted, "check the link") from None
    classes = CLASSES.get(task.name) or _class_names(where, task)
    wrong = next((label for _, _, label in rows if not 0 <= label < len(classes)), None)
    if wrong is not None:
        raise DataError.of(task.name, f"{where}: label {wrong}", f"0 to {len(classes) - 1}", "check the link")
    items = Items()
    for id, member, label_of in rows:
        items.add(id, member, [label_of])
    source = items.source(task.name, classes)
    if task.folder != "dsprites":
        return source
    return ImageSet(task.name, source.ids, source.labels, _Sprites(source), tuple(classes))


@dataclass(frozen=True)
class _Sprites:
    """Images of 0 and 1, which become 0 and 255."""

    source: KnownSource

    def take(self, chosen: npt.NDArray[np.int64]) -> "_SpritePart":
        return _SpritePart(self.source.part(chosen))


@dataclass(frozen=True)
class _SpritePart:
    part: Iterable[Example | Unreadable]

    def __iter__(self) -> Iterator[bytes]:
        for example in self.part:
            if isinstance(example, Unreadable):
                raise DataError(f"{example.id}: {example.reason}; fetch the data set again")
            try:
                pixels = decode_image(example.image, convert=True)[..., 0]
            except ImageError as error:
                raise DataError(f"{example.id}: {error.reason}; fetch the data set again") from None
            yield rgb_png(pixels * np.uint8(255))


def _class_names(where: Path, task: Task) -> tuple[str, ...]:
    """Return names next to the shards if they are published, or else numbers."""
    path = where / "label.labels.txt"
    names = as_text(store.read_bytes(path, MAX_WHOLE_BYTES), path).splitlines() if path.exists() else []
    return tuple(names) if len(names) == task.num_classes else tuple(f"class {i}" for i in range(task.num_classes))


def _integer(name: str) -> Callable[[Record], int]:
    def value(record: Record) -> int:
        [found] = record.integers[name]
        return found

    return value


def _clevr_depths(record: Record) -> list[float]:
    return record.floats["objects/pixel_coords"][2::3]


def _kitti(record: Record) -> int:
    depths = record.floats.get("objects/location", [])[2::3]
    kinds = record.integers.get("objects/type", [])
    return derive.kitti_distance([(_KITTI_TYPES[kind], z) for kind, z in zip(kinds, depths, strict=True)])


_label = _integer("label")
_LABELS: dict[str, Callable[[Record], int]] = {
    "clevr-count": lambda record: derive.clevr_count(len(_clevr_depths(record))),
    "clevr-distance": lambda record: derive.clevr_distance(_clevr_depths(record)),
    "kitti-distance": _kitti,
    "dsprites-xpos": lambda record: derive.dsprites_xpos(_integer("label_x_position")(record)),
    "dsprites-orientation": lambda record: derive.dsprites_orientation(_integer("label_orientation")(record)),
    "smallnorb-azimuth": _integer("label_azimuth"),
    "smallnorb-elevation": _integer("label_elevation"),
}
