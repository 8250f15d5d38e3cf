"""Readers of the specialized tasks: tissue, satellites and eyes."""

import csv
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from bit_ray import store
from bit_ray.data.images.decode import decode_image
from bit_ray.data.images.png import rgb_png
from bit_ray.data.sources.archives import MAX_WHOLE_BYTES, as_text
from bit_ray.data.sources.base import MAX_IMAGE_BYTES
from bit_ray.data.sources.vtab.derive import retinopathy_level
from bit_ray.data.sources.vtab.files import class_folders, find
from bit_ray.data.sources.vtab.images import Files, ImageSet, KnownSource
from bit_ray.data.sources.vtab.tasks import Task
from bit_ray.errors import ConfigError, DataError

# The second list has the leaderboard's public images, which validate, and the private ones, which test.
_RETINOPATHY = {
    "train": ("train", "trainLabels.csv", None),
    "val": ("test", "retinopathy_solution.csv", "Public"),
    "test": ("test", "retinopathy_solution.csv", "Private"),
}
GRAHAM_RADIUS = 300
"""Radius to which an eye is scaled, pixels (tensorflow_datasets: diabetic_retinopathy_detection/btgraham-300)."""
_KEPT_RADIUS = 0.9
_JPEG_QUALITY = 72
_MAX_CHUNK_BYTES = 2**28


def open_camelyon(task: Task, folder: Path, part: str) -> KnownSource:
    """Open PatchCamelyon.

    Raises:
        DataError: No such files, or not files of PatchCamelyon.
        ConfigError: h5py is not installed.
    """
    part_name = {"val": "valid"}.get(part, part)
    pixels, labels = (find(task, folder, f"camelyonpatch_level_2_split_{part_name}_{one}.h5") for one in "xy")
    with opened_h5(pixels) as file:
        num_images = len(_array(file, "x", pixels, (96, 96, 3)))
    with opened_h5(labels) as file:
        found = _array(file, "y", labels, (1, 1, 1))
        values = found[:].ravel().astype(np.int64) if len(found) == num_images else np.zeros(0, np.int64)
    if len(values) != num_images or not set(values.tolist()) <= {0, 1}:
        raise DataError(
            f"{labels}: not a 0 or 1 for each of {num_images:,} images; accepted: the publisher's files; fetch "
            "them again"
        )
    ids = [f"{part}/{i:06d}" for i in range(len(values))]
    return ImageSet(task.folder, ids, values, H5Images(pixels, np.arange(len(values))), ("no tumour", "tumour"))


@dataclass(frozen=True)
class H5Images:
    """Rows of the data set x of an HDF5 file."""

    path: Path
    rows: npt.NDArray[np.int64]

    def take(self, chosen: npt.NDArray[np.int64]) -> "H5Images":
        """Some of them."""
        return H5Images(self.path, self.rows[chosen])

    def __iter__(self) -> Iterator[bytes]:
        """Encode them in order; the file is read from front to back."""
        pixels: dict[int, bytes] = {}
        with opened_h5(self.path) as file:
            array = _array(file, "x", self.path, (96, 96, 3))
            for row in np.unique(self.rows).tolist():
                pixels[row] = rgb_png(array[row])
        yield from (pixels[row] for row in self.rows.tolist())


def opened_h5(path: Path) -> Any:
    """Open an HDF5 file.

    Raises:
        DataError: Not an HDF5 file.
        ConfigError: h5py is not installed.
    """
    try:
        import h5py  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        remedy = "run pip install h5py"
        raise ConfigError.of("patch_camelyon", "h5py is not installed", remedy=remedy) from None
    store.check_file(path)
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"{path}: not readable as HDF5 ({' '.join(str(error).split())}); fetch it again") from None


def _array(file: Any, name: str, path: Path, row: tuple[int, ...]) -> Any:
    """Return an array of bytes of an HDF5 file that is stored in that file itself.

    Raises:
        DataError: There is no such array, or it has other rows, or in chunks that take gigabytes.
    """
    import h5py  # type: ignore[import-not-found, import-untyped, unused-ignore]

    link = file.get(name, getlink=True) if name in file else None
    found = file[name] if isinstance(link, h5py.HardLink) else None
    if not isinstance(found, h5py.Dataset) or found.is_virtual or found.external:
        raise DataError(f"{path}: no array {name} in it; accepted: the publisher's file; fetch it again")
    if found.dtype != np.uint8 or found.shape[1:] != row or math.prod(found.chunks or ()) > _MAX_CHUNK_BYTES:
        raise DataError(
            f"{path}: {name} of shape {list(found.shape)} and type {found.dtype}; accepted: uint8 of shape "
            f"{['N', *row]}; fetch it again"
        )
    return found


def open_eurosat(task: Task, folder: Path, part: str) -> KnownSource:
    """Open EuroSAT's colour images.

    Raises:
        DataError: No such files, or not 10 classes.
    """
    return _open_folders(task, Files(find(task, folder, "2750", "EuroSAT.zip", "EuroSAT_RGB.zip", "EuroSAT_RGB")))


def open_resisc(task: Task, folder: Path, part: str) -> KnownSource:
    """Open NWPU-RESISC45, unpacked.

    Raises:
        DataError: No such folder, or not 45 classes.
    """
    return _open_folders(task, Files(find(task, folder, "NWPU-RESISC45")))


def _open_folders(task: Task, files: Files) -> KnownSource:
    names, labels, classes = class_folders(task, files)
    ids = ["/".join(name.split("/")[-2:]) for name in names]
    return files.source(task.folder, ids, names, labels.tolist(), classes)


def open_retinopathy(task: Task, folder: Path, part: str) -> KnownSource:
    """Open the Kaggle set of 2015, its images prepared as the winner of that competition did.

    Raises:
        DataError: No such files, or a list that names a missing image.
    """
    images, labels, usage = _RETINOPATHY[part]
    files = Files(find(task, folder, images))
    where = find(task, folder, labels)
    text = io.StringIO(as_text(store.read_bytes(where, MAX_WHOLE_BYTES), where), newline="")
    try:
        rows = [row for row in csv.DictReader(text) if usage is None or row.get("Usage") == usage]
        names, levels = [row["image"] for row in rows], [retinopathy_level(int(row["level"])) for row in rows]
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise DataError(
            f"{where}: {error}; accepted: columns image, level and for the test Usage; fetch it again"
        ) from None
    missing = next((name for name in names if f"{name}.jpeg" not in files.members), None)
    if missing is not None:
        raise DataError(f"{files.path}: no {missing}.jpeg in it, but {where.name} lists it; fetch the set again")
    ids = [f"{images}/{name}" for name in names]
    paths = tuple(files.path / f"{name}.jpeg" for name in names)
    classes = ("none", "mild", "moderate", "severe", "proliferative")
    return ImageSet(task.folder, ids, np.array(levels, np.int64), EyeImages(paths), classes)


@dataclass(frozen=True)
class EyeImages:
    """Photographs of eyes, prepared when read."""

    paths: tuple[Path, ...]

    def take(self, chosen: npt.NDArray[np.int64]) -> "EyeImages":
        """Some of them."""
        return EyeImages(tuple(self.paths[i] for i in chosen))

    def __iter__(self) -> Iterator[bytes]:
        """Prepare them in order; bytes that are not an image are not changed, and the writer refuses them."""
        for path in self.paths:
            data = store.read_bytes(path, MAX_IMAGE_BYTES)
            try:
                pixels = decode_image(data, convert=True)
            except DataError:
                yield data
                continue
            buffer = io.BytesIO()
            Image.fromarray(prepare_eye(pixels)).save(buffer, "JPEG", quality=_JPEG_QUALITY)
            yield buffer.getvalue()


def prepare_eye(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Scale an eye to a radius of 300 pixels, subtract its local average, and keep 90 % of the radius.

    As in the data that the benchmark uses, except that larger images are reduced with antialiasing, which the OpenCV
    call there does not do.

    Args:
        pixels: ``[H, W, 3] uint8``.

    Returns:
        ``[up to 540, up to 540, 3] uint8``, gray (128) outside the circle.
    """
    from scipy.ndimage import gaussian_filter  # type: ignore[import-untyped, unused-ignore]

    middle = pixels[len(pixels) // 2].sum(axis=1, dtype=np.int64)
    radius = float(np.count_nonzero(middle > middle.mean() / 10)) / 2
    if radius < 1:  # nothing visible on the middle line
        radius = len(pixels) / 2
    scale = GRAHAM_RADIUS / radius
    height, width = (max(1, round(side * scale)) for side in pixels.shape[:2])
    image = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR), np.float64)
    sigma = GRAHAM_RADIUS / 30
    average = gaussian_filter(image, (sigma, sigma, 0), mode="mirror", truncate=3)
    image = np.clip(np.rint(4 * image - 4 * average + 128), 0, 255)
    kept, (y, x) = int(GRAHAM_RADIUS * _KEPT_RADIUS), (height // 2, width // 2)
    rows, columns = np.ogrid[:height, :width]
    image[(rows - y) ** 2 + (columns - x) ** 2 > kept**2] = 128
    cut = image[max(y - kept, 0) : y + kept, max(x - kept, 0) : x + kept]
    return cut.astype(np.uint8)
