"""Oxford Flowers-102 from 102flowers.tgz, imagelabels.mat and setid.mat.

The publisher's split has 10 training and 10 validation images per class; ``train+val`` is both.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bit_ray import store
from bit_ray.data.sources.archived import ArchiveSource, Items
from bit_ray.data.sources.archives import MAX_WHOLE_BYTES, members
from bit_ray.data.sources.mat import read_mat, whole_numbers
from bit_ray.data.sources.published.files import Download, PublishedFiles
from bit_ray.errors import DataError

SETS = {"train": "trnid", "val": "valid", "test": "tstid"}


def open_flowers(splits: Sequence[str], published: PublishedFiles) -> ArchiveSource:
    """Open the images of the splits; the classes are named as torchvision does, since no file of the set names them.

    Raises:
        DataError: A file is missing or damaged, or the split names a missing image.
    """
    from torchvision.datasets import Flowers102

    files = [published.find(name, f"flowers-102/{name}") for name in ("imagelabels.mat", "setid.mat")]
    images = published.find("102flowers.tgz", "102flowers.tar", "flowers-102/jpg", "jpg")
    labels = _read(files[0], "labels")["labels"]
    numbers = _read(files[1], *SETS.values())
    found = {member.name.rpartition("/")[2]: member for member in members(images)}
    items = Items()
    for split in splits:
        for number in numbers[SETS[split]].tolist():
            name = f"image_{number:05d}"
            if f"{name}.jpg" not in found or not 1 <= number <= len(labels):
                where = images if f"{name}.jpg" not in found else files[0]
                raise DataError(
                    f"{where}: no {name} in it, but {files[1].name} lists it; accepted: the publisher's files; "
                    "fetch them again"
                )
            items.add(f"{published.dataset}/{name}", found[f"{name}.jpg"], [int(labels[number - 1]) - 1])
    return items.source(published.dataset, Flowers102.classes)


def _read(path: Path, *names: str) -> dict[str, npt.NDArray[np.int64]]:
    found = read_mat(store.read_bytes(path, MAX_WHOLE_BYTES), str(path), *names)
    return {name: whole_numbers(values, f"{path}: {name}") for name, values in found.items()}


def flowers_downloads() -> tuple[Download, ...]:
    """Return the files' URLs and checksums, as in torchvision."""
    from torchvision.datasets import Flowers102

    return tuple(Download(Flowers102._download_url_prefix + name, md5) for name, md5 in Flowers102._file_dict.values())
