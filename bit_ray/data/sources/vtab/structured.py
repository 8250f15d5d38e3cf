"""Readers of the structured tasks: counts, distances, positions and poses, most of them of rendered scenes."""

import io
import json
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bit_ray import store
from bit_ray.data.images.png import rgb_png
from bit_ray.data.sources.archived import Items
from bit_ray.data.sources.archives import MAX_WHOLE_BYTES, Member, as_text, unpacked
from bit_ray.data.sources.vtab import derive
from bit_ray.data.sources.vtab.files import find
from bit_ray.data.sources.vtab.images import (
    ArrayImages,
    Files,
    ImageSet,
    KnownSource,
    find_entry,
    opened_zip,
    read_entry,
)
from bit_ray.data.sources.vtab.records import read_records
from bit_ray.data.sources.vtab.tasks import Task
from bit_ray.errors import DataError

CLASSES = {
    "clevr-count": tuple(f"{n} objects" for n in range(3, 11)),
    "clevr-distance": ("to 8", "8 to 8.5", "8.5 to 9", "9 to 9.5", "9.5 to 10", "beyond 10"),
    "kitti-distance": ("to 8 m", "8 to 20 m", "beyond 20 m", "no vehicle"),
    "dsprites-xpos": tuple(f"places {2 * n} and {2 * n + 1}" for n in range(16)),
    "dsprites-orientation": tuple(f"orientation bin {n}" for n in range(16)),
    "smallnorb-azimuth": tuple(f"{20 * n} degrees" for n in range(18)),
    "smallnorb-elevation": tuple(f"{30 + 5 * n} degrees" for n in range(9)),
    # Which number means which of the six is not published.
    "dmlab": tuple(f"distance and reward {n}" for n in range(6)),
}
_DSPRITES = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"
_DSPRITES_SIDE = 64
# Columns of latents_classes: colour, shape, scale, orientation, x, y.
_ORIENTATION, _X = 3, 4
_NORB = {"train": "5x46789x9x18x6x2x96x96-training", "test": "5x01235x9x18x6x2x96x96-testing"}
_NORB_TYPES = {0x1E3D4C55: "<u1", 0x1E3D4C54: "<i4"}
# Columns of the info file: instance, elevation, azimuth, lighting.
_ELEVATION, _AZIMUTH = 1, 2
# Share of the videos, and seed, with which TensorFlow Datasets selects them for validation and test.
_KITTI_PERCENT, _KITTI_SEED = 10, 123


def open_clevr(task: Task, folder: Path, part: str) -> KnownSource:
    """Open CLEVR; its validation scenes are the benchmark's test set.

    Raises:
        DataError: No such files, or scenes of another kind.
    """
    where = find(task, folder, "CLEVR_v1.0", "CLEVR_v1.0.zip")
    files = Files(where)
    root = "" if where.is_dir() else "CLEVR_v1.0/"
    name = f"{root}scenes/CLEVR_{part}_scenes.json"
    try:
        scenes = [
            (scene["image_filename"], [float(thing["pixel_coords"][2]) for thing in scene["objects"]])
            for scene in json.loads(files.read_text(name))["scenes"]
        ]
    except (KeyError, IndexError, TypeError, ValueError, RecursionError) as error:
        reason = repr(error)[:80]
        raise DataError(f"{where}: {name}: not the scenes of CLEVR ({reason}); fetch it again") from None
    if task.name == "clevr-count":
        labels = [derive.clevr_count(len(depths)) for _, depths in scenes]
    else:
        labels = [derive.clevr_distance(depths) for _, depths in scenes]
    ids = [file for file, _ in scenes]
    return files.source(task.name, ids, [f"{root}images/{part}/{file}" for file in ids], labels, CLASSES[task.name])


def open_dmlab(task: Task, folder: Path, part: str) -> KnownSource:
    """Open the frames of DMLab, from the TFRecord files that the benchmark's authors publish.

    Raises:
        DataError: No such files, or damaged ones.
    """
    kind = {"val": "validation"}.get(part, part)
    files = sorted((folder / task.folder).glob(f"dmlab-{kind}.tfrecord*"))
    items = Items()
    for path in files or [find(task, folder, f"dmlab-{kind}.tfrecord")]:
        for number, record in enumerate(read_records(path)):
            try:
                name = record.texts["filename"][0].decode()
                (offset, length), label = record.extents["image"][0], record.integers["label"][0]
            except (KeyError, IndexError):
                raise DataError(f"{path}: record {number}: no image, filename or label; fetch it again") from None
            items.add(f"{part}/{name}", Member(name, str(path), offset, length), [derive.dmlab_label(label)])
    return items.source(task.folder, CLASSES[task.name])


def open_kitti(task: Task, folder: Path, part: str) -> KnownSource:
    """Open the object images of KITTI, split by video as TensorFlow Datasets does.

    Raises:
        DataError: No such files, or damaged ones.
    """
    images = Files(find(task, folder, "data_object_image_2", "data_object_image_2.zip"))
    labels = Files(find(task, folder, "data_object_label_2", "data_object_label_2.zip"))
    devkit = Files(find(task, folder, "devkit_object", "devkit_object.zip"))
    where = devkit.path
    try:
        lines = [
            int(number) - 1
            for number in devkit.read_text("mapping/train_rand.txt").replace("\n", ",").split(",")
            if number.strip()
        ]
        videos = [line.split()[1] for line in devkit.read_text("mapping/train_mapping.txt").splitlines()]
        of_image = [videos[line] for line in lines]
    except (ValueError, IndexError) as error:
        raise DataError(f"{where}: mapping of images to videos: {error}; fetch it again") from None
    numbers = kitti_split(of_image)[part]
    names = [f"{number:06d}" for number in numbers]
    texts = _texts(labels, [f"training/label_2/{name}.txt" for name in names])
    classes = [derive.kitti_distance(_kitti_objects(text, labels.path)) for text in texts]
    return images.source(
        task.folder, names, [f"training/image_2/{name}.png" for name in names], classes, CLASSES[task.name]
    )


def kitti_split(videos: list[str]) -> dict[str, list[int]]:
    """Return numbers of the images of each split: a tenth of the videos are for test, a tenth for validation.

    The draw is that of TensorFlow Datasets (tensorflow_datasets:object_detection/kitti.py), so the splits are, too.

    Args:
        videos: Name of the video of each image.
    """
    names = sorted(set(videos))
    count = max(1, _KITTI_PERCENT * len(names) // 100)
    state = np.random.RandomState(_KITTI_SEED)
    test = set(state.choice(names, count, replace=False).tolist())
    val = set(state.choice([name for name in names if name not in test], count, replace=False).tolist())
    split = {name: "test" if name in test else "val" if name in val else "train" for name in names}
    return {part: [i for i, name in enumerate(videos) if split[name] == part] for part in ("train", "val", "test")}


def _texts(files: Files, names: list[str]) -> Iterator[str]:
    """Read many small files."""
    if files.path.is_dir():
        yield from map(files.read_text, names)
        return
    with opened_zip(files.path) as archive:
        for name in names:
            if name not in files.members:
                raise DataError(f"{files.path}: no {name} in it; fetch it again")
            yield as_text(read_entry(archive, name), f"{files.path}: {name}")


def _kitti_objects(text: str, where: Path) -> list[tuple[str, float]]:
    """Type and distance of each object of a label file: 15 columns, the second to last is z."""
    try:
        return [(line.split()[0], float(line.split()[13])) for line in text.splitlines() if line.strip()]
    except (IndexError, ValueError):
        raise DataError(f"{where}: not labels of KITTI, 15 columns each; fetch it again") from None


def open_dsprites(task: Task, folder: Path, part: str) -> KnownSource:
    """Open dSprites.

    Raises:
        DataError: No such file, or not the file of dSprites.
    """
    where = find(task, folder, _DSPRITES)
    with opened_zip(where) as archive:
        factors = _read_npy(archive, "latents_classes.npy", where)
    if factors.ndim != 2 or factors.shape[1] != 6:
        raise DataError(f"{where}: latents_classes of shape {list(factors.shape)}; accepted: [N, 6]; fetch it again")
    if task.name == "dsprites-xpos":
        labels = [derive.dsprites_xpos(value) for value in factors[:, _X].tolist()]
    else:
        labels = [derive.dsprites_orientation(value) for value in factors[:, _ORIENTATION].tolist()]
    ids = [f"{i:06d}" for i in range(len(factors))]
    images = SpriteImages(where, np.arange(len(factors)))
    return ImageSet(task.name, ids, np.array(labels, np.int64), images, CLASSES[task.name])


@dataclass(frozen=True)
class SpriteImages:
    """Rows of the array of images, 3 GB, which is compressed and is read through once for each part."""

    path: Path
    rows: npt.NDArray[np.int64]

    def take(self, chosen: npt.NDArray[np.int64]) -> "SpriteImages":
        """Some of them."""
        return SpriteImages(self.path, self.rows[chosen])

    def __iter__(self) -> Iterator[bytes]:
        """Encode them in order, 0 and 1 as 0 and 255."""
        size = _DSPRITES_SIDE**2
        found: dict[int, bytes] = {}
        with opened_zip(self.path) as archive, archive.open(find_entry(archive, "imgs.npy")) as file:
            shape, is_fortran, dtype = _npy_header(file, self.path)
            if shape[1:] != (_DSPRITES_SIDE, _DSPRITES_SIDE) or is_fortran or dtype != np.uint8:
                raise DataError(
                    f"{self.path}: imgs of shape {list(shape)} and type {dtype}; accepted: [N, 64, 64] uint8"
                )
            at = 0
            for row in np.unique(self.rows).tolist():
                while at < row:
                    skipped = len(file.read(min(row - at, 1024) * size)) // size
                    if not skipped:
                        break
                    at += skipped
                data = file.read(size)
                if len(data) < size:
                    raise DataError(f"{self.path}: imgs ends before image {row}; fetch it again")
                at += 1
                found[row] = rgb_png(
                    np.frombuffer(data, np.uint8).reshape(_DSPRITES_SIDE, _DSPRITES_SIDE) * np.uint8(255)
                )
        yield from (found[row] for row in self.rows.tolist())


def _npy_header(file: Any, where: Path) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except (ValueError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError) as error:  # parsed as Python
        raise DataError(f"{where}: not an array of NumPy ({error}); fetch it again") from None
    return shape, fortran, dtype


def _read_npy(archive: zipfile.ZipFile, name: str, where: Path) -> npt.NDArray[np.int64]:
    """Read a table of integers."""
    file = io.BytesIO(read_entry(archive, name))
    shape, is_fortran, dtype = _npy_header(file, where)
    data = file.read()
    if dtype.kind not in "iu" or math.prod(shape) * dtype.itemsize != len(data):
        raise DataError(
            f"{where}: {name}: {len(data):,} bytes for shape {list(shape)} of {dtype}; accepted: as many whole numbers "
            "as in the header; fetch it again"
        )
    return np.frombuffer(data, dtype).reshape(shape, order="F" if is_fortran else "C").astype(np.int64)


def open_smallnorb(task: Task, folder: Path, part: str) -> KnownSource:
    """Open smallNORB, the image of the first camera.

    Raises:
        DataError: No such files, or not files of smallNORB.
    """
    names = [f"smallnorb-{_NORB[part]}-{kind}.mat" for kind in ("dat", "info")]
    paths = [find(task, folder, name, f"{name}.gz") for name in names]
    pixels, info = (read_norb(path) for path in paths)
    if pixels.ndim != 4 or pixels.shape[1] != 2 or info.shape != (len(pixels), 4):
        raise DataError(f"{paths[0]}: shape {list(pixels.shape)}; accepted: [N, 2, 96, 96] and [N, 4]; fetch it again")
    if task.name == "smallnorb-azimuth":
        labels = [derive.smallnorb_azimuth(value) for value in info[:, _AZIMUTH].tolist()]
    else:
        labels = [derive.smallnorb_elevation(value) for value in info[:, _ELEVATION].tolist()]
    ids = [f"{part}/{i:05d}" for i in range(len(pixels))]
    first = np.ascontiguousarray(pixels[:, 0])
    return ImageSet(task.name, ids, np.array(labels, np.int64), ArrayImages(first), CLASSES[task.name])


def read_norb(path: Path) -> npt.NDArray[Any]:
    """Read a file in the format of NORB, plain or compressed: kind, dimensions, sizes (at least three), values.

    Raises:
        DataError: Not such a file, or cut short.
    """
    store.check_file(path)
    try:
        with open(path, "rb") as file:
            stream = unpacked(path, file)[0] if path.suffix == ".gz" else file
            kind, num_dimensions = struct.unpack("<2i", stream.read(8))
            if kind not in _NORB_TYPES or not 1 <= num_dimensions <= 8:
                raise ValueError(f"kind {kind:#x}")
            sizes = struct.unpack(f"<{max(3, num_dimensions)}i", stream.read(4 * max(3, num_dimensions)))
            shape, dtype = sizes[:num_dimensions], np.dtype(_NORB_TYPES[kind])
            num_bytes = math.prod(shape) * dtype.itemsize
            if min(shape) < 0 or num_bytes > MAX_WHOLE_BYTES:
                raise ValueError(f"shape {list(shape)}")
            return np.frombuffer(stream.read(num_bytes), dtype).reshape(shape)
    except (ValueError, EOFError, OSError, struct.error, zlib.error) as error:
        raise DataError(f"{path}: not a complete file of NORB ({error}); fetch it again") from None
