"""CIFAR-10 and CIFAR-100 from the publisher's Python or binary version, as archive or folder.

32x32 RGB photographs, a row of 3,072 bytes each: the red plane, the green, the blue (https://www.cs.toronto.edu/~kriz/cifar.html).
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bit_ray.data.images.png import rgb_png
from bit_ray.data.sources.archives import as_text, read_members
from bit_ray.data.sources.base import Example
from bit_ray.data.sources.published.files import Download, PublishedFiles
from bit_ray.data.sources.published.pickled import read_pickle
from bit_ray.errors import DataError

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE
_MAX_CLASSES = 100


@dataclass(frozen=True)
class Layout:
    """Names of one version's files, relative to the archive."""

    archive: str
    folder: str
    batches: dict[str, tuple[str, ...]]
    names: str


PYTHON = {
    "cifar10": Layout(
        "cifar-10-python.tar.gz",
        "cifar-10-batches-py",
        {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
        "batches.meta",
    ),
    "cifar100": Layout("cifar-100-python.tar.gz", "cifar-100-python", {"train": ("train",), "test": ("test",)}, "meta"),
}
BINARY = {
    "cifar10": Layout(
        "cifar-10-binary.tar.gz",
        "cifar-10-batches-bin",
        {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)},
        "batches.meta.txt",
    ),
    "cifar100": Layout(
        "cifar-100-binary.tar.gz",
        "cifar-100-binary",
        {"train": ("train.bin",), "test": ("test.bin",)},
        "fine_label_names.txt",
    ),
}


@dataclass(frozen=True)
class CifarPart:
    """Some images, [N, 3072] uint8, with ids and labels."""

    ids: list[str]
    pixels: npt.NDArray[np.uint8]
    labels: list[int]

    def __iter__(self) -> Iterator[Example]:
        """Encode the images in order, as PNG, without loss."""
        for id, row, label in zip(self.ids, self.pixels, self.labels, strict=True):
            yield Example(id, rgb_png(row.reshape(3, _SIDE, _SIDE).transpose(1, 2, 0)), (label,))


@dataclass(frozen=True)
class CifarSource:
    """Images in memory, 3 KB each: a ``Source``."""

    name: str
    ids: list[str]
    pixels: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    class_names: tuple[str, ...]
    multi_label = False

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.ids)

    @property
    def identity(self) -> dict[str, Any]:
        """The kind and a digest over ids, labels and pixels."""
        sha = hashlib.sha256("\0".join(self.ids).encode())
        sha.update(self.labels.tobytes())
        sha.update(self.pixels.tobytes())
        return {"kind": self.name, "sha256": sha.hexdigest()}

    def part(self, indices: npt.NDArray[np.int64]) -> CifarPart:
        """Return the images at these indices."""
        return CifarPart([self.ids[i] for i in indices], self.pixels[indices], self.labels[indices].tolist())


def open_cifar(splits: Sequence[str], published: PublishedFiles) -> CifarSource:
    """Read the images of the splits, from the Python version if it is there, else from the binary one.

    The labels of CIFAR-100 are the 100 fine ones.

    Raises:
        DataError: Neither version exists, or a file of it is damaged.
    """
    python, binary = PYTHON[published.dataset], BINARY[published.dataset]
    path = published.look(binary.archive, binary.folder)
    if path is None or published.look(python.archive, python.folder):
        layout, path = python, published.find(python.archive, python.folder)
    else:
        layout = binary
    # Only the needed batches are read from the archive.
    batches = {name: split for split in splits for name in layout.batches[split]}
    wanted = [f"{layout.folder}/{name}" for name in (*batches, layout.names)]
    files = {name.rpartition("/")[2]: data for name, data in _read(path, layout.folder, wanted).items()}
    if layout is python:
        class_names = _python_names(files[layout.names], f"{path}: {layout.names}")
        read = {name: _python_batch(files[name], f"{path}: {name}") for name in batches}
    else:
        class_names = tuple(as_text(files[layout.names], f"{path}: {layout.names}").split())
        fine = published.dataset == "cifar100"
        read = {name: _binary_batch(files[name], fine, f"{path}: {name}") for name in batches}
    ids, counts = [], dict.fromkeys(splits, 0)
    for name, split in batches.items():
        start = counts[split]
        counts[split] += len(read[name][0])
        ids += [f"{published.dataset}/{split}/{i:05d}" for i in range(start, counts[split])]
    pixels = np.concatenate([pixels for pixels, _ in read.values()])
    return CifarSource(
        published.dataset, ids, pixels, np.concatenate([labels for _, labels in read.values()]), class_names
    )


def cifar_downloads(name: str) -> tuple[Download]:
    """Return the Python version's URL and checksum, as in torchvision."""
    from torchvision.datasets import CIFAR10, CIFAR100

    known = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    return (Download(known.url, known.tgz_md5),)


def _read(path: Path, folder: str, names: list[str]) -> dict[str, bytes]:
    return read_members(path, [name.removeprefix(f"{folder}/") for name in names] if path.is_dir() else names)


def _unpickled(data: bytes, where: str) -> dict[str, Any]:
    try:
        return read_pickle(data)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{where}: not a batch of CIFAR ({reason}); fetch the archive again") from None


def _python_names(data: bytes, where: str) -> tuple[str, ...]:
    found = _unpickled(data, where)
    names = found.get("fine_label_names", found.get("label_names"))
    if not isinstance(names, list) or not names or not all(isinstance(name, (str, bytes)) for name in names):
        raise DataError(f"{where}: no class names; accepted: the publisher's archive; fetch it again")
    return tuple(name.decode("latin1") if isinstance(name, bytes) else name for name in names)


def _python_batch(data: bytes, where: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    found = _unpickled(data, where)
    pixels, labels = found.get("data"), found.get("fine_labels", found.get("labels"))
    if not isinstance(pixels, np.ndarray) or pixels.shape[1:] != (_PIXELS,):
        raise DataError(f"{where}: has no rows of {_PIXELS:,} bytes; accepted: the publisher's archive; fetch it again")
    if not isinstance(labels, list) or len(labels) != len(pixels):
        raise DataError(f"{where}: not one label per image; accepted: the publisher's archive; fetch it again")
    if not all(type(label) is int and 0 <= label < _MAX_CLASSES for label in labels):
        raise DataError(f"{where}: labels out of range; accepted: the publisher's archive; fetch it again")
    return pixels, np.array(labels, np.int64)


def _binary_batch(data: bytes, fine: bool, where: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Read rows of a label, or of a coarse and a fine label, and the pixels."""
    row = _PIXELS + (2 if fine else 1)
    if not data or len(data) % row:
        raise DataError(f"{where}: {len(data):,} bytes; accepted: rows of {row:,} bytes; fetch the archive again")
    rows = np.frombuffer(data, np.uint8).reshape(-1, row)
    return rows[:, -_PIXELS:], rows[:, 1 if fine else 0].astype(np.int64)
