"""Readers of the natural tasks: photographs of things, textures, scenes and house numbers."""

from pathlib import Path

import numpy as np

from bit_ray import store
from bit_ray.data.sources.archives import MAX_WHOLE_BYTES, as_text
from bit_ray.data.sources.mat import read_mat, whole_numbers
from bit_ray.data.sources.published.names import open_dataset
from bit_ray.data.sources.vtab.derive import svhn_digit
from bit_ray.data.sources.vtab.files import check_classes, class_folders, find, seeded_order
from bit_ray.data.sources.vtab.images import ArrayImages, Files, ImageSet, KnownSource
from bit_ray.data.sources.vtab.tasks import Task
from bit_ray.errors import DataError

CALTECH_PER_CLASS = 30
"""Training images of each class; the others are for the test (tensorflow_datasets:caltech.py)."""
SUN_LISTS = {"train": "sun397_tfds_tr.txt", "val": "sun397_tfds_va.txt", "test": "sun397_tfds_te.txt"}


def open_published(task: Task, folder: Path, part: str) -> KnownSource:
    """Open CIFAR-100, Flowers-102 or Pets, which `bit-ray shards write` also knows by name.

    Raises:
        DataError: No such files, or damaged ones.
    """
    find(task, folder, "")  # its folder, as the message about a missing file is for shards write
    source: KnownSource = open_dataset(task.name, part, folder, check_size=False)  # type: ignore[assignment]
    return source


def open_caltech(task: Task, folder: Path, part: str) -> KnownSource:
    """Open Caltech-101: 30 images of each class, drawn by a fixed seed, are for training and all others for the test.

    Raises:
        DataError: No such files, not 102 classes, or a class of at most 30 images.
    """
    where = find(task, folder, "101_ObjectCategories", "101_ObjectCategories.tar.gz", "101_ObjectCategories.tar")
    files = Files(where)
    names, labels, classes = class_folders(task, files)
    chosen = []
    for label, name in enumerate(classes):
        positions = np.flatnonzero(labels == label)
        if len(positions) <= CALTECH_PER_CLASS:
            raise DataError(
                f"{where}: {len(positions)} images of {name}; accepted: more than {CALTECH_PER_CLASS}; fetch it again"
            )
        order = seeded_order(len(positions), 0, label)
        chosen.append(positions[order[:CALTECH_PER_CLASS] if part == "train" else order[CALTECH_PER_CLASS:]])
    positions = np.sort(np.concatenate(chosen))
    used = [names[i] for i in positions]
    ids = ["/".join(name.split("/")[-2:]) for name in used]
    return files.source(task.folder, ids, used, labels[positions].tolist(), classes)


def open_dtd(task: Task, folder: Path, part: str) -> KnownSource:
    """Open fold 1 of the Describable Textures.

    Raises:
        DataError: No such files, or a list that names a missing image.
    """
    where = find(task, folder, "dtd", "dtd-r1.0.1.tar.gz", "dtd-r1.0.1.tar")
    files = Files(where)
    root = "" if where.is_dir() else "dtd/"
    lists = {one: files.read_text(f"{root}labels/{one}1.txt").split() for one in ("train", "val", "test")}
    classes = sorted({name.split("/")[0] for names in lists.values() for name in names})
    check_classes(task, where, classes)
    labels = [classes.index(name.split("/")[0]) for name in lists[part]]
    return files.source(task.folder, lists[part], [f"{root}images/{name}" for name in lists[part]], labels, classes)


def open_sun(task: Task, folder: Path, part: str) -> KnownSource:
    """Open SUN397, split by the lists of TensorFlow Datasets.

    Raises:
        DataError: No such files, or a list that names a missing image.
    """
    files = Files(find(task, folder, "SUN397"))
    lists = {one: _words(find(task, folder, name)) for one, name in SUN_LISTS.items()}
    named = {one: [name.lstrip("/") for name in names] for one, names in lists.items()}
    classes = sorted({name.rpartition("/")[0] for names in named.values() for name in names})
    check_classes(task, files.path, classes)
    index = {name: i for i, name in enumerate(classes)}
    labels = [index[name.rpartition("/")[0]] for name in named[part]]
    return files.source(task.folder, named[part], named[part], labels, classes)


def _words(path: Path) -> list[str]:
    return as_text(store.read_bytes(path, MAX_WHOLE_BYTES), path).split()


def open_svhn(task: Task, folder: Path, part: str) -> KnownSource:
    """Open the cropped digits of SVHN.

    Raises:
        DataError: No such file, or not a file of SVHN.
    """
    where = find(task, folder, f"{part}_32x32.mat")
    values = read_mat(store.read_bytes(where, MAX_WHOLE_BYTES), str(where), "X", "y")
    pixels, labels = values["X"], whole_numbers(values["y"], f"{where}: y")
    if pixels.ndim != 4 or pixels.shape[:3] != (32, 32, 3) or len(labels) != pixels.shape[3] or pixels.dtype != "u1":
        raise DataError(
            f"{where}: X of shape {list(pixels.shape)} and type {pixels.dtype}, {len(labels)} labels; accepted: "
            "[32, 32, 3, N] uint8 and [N]; fetch it again"
        )
    ids = [f"{part}/{i:05d}" for i in range(len(labels))]
    digits = np.array([svhn_digit(int(label)) for label in labels], np.int64)
    return ImageSet(task.folder, ids, digits, ArrayImages(pixels.transpose(3, 0, 1, 2)), tuple("0123456789"))
