"""Data sets by name: ``cifar10:train``. Each is read from the files that its publisher distributes."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bit_ray import store
from bit_ray.data.sources.base import Source
from bit_ray.data.sources.published.cifar import cifar_downloads, open_cifar
from bit_ray.data.sources.published.files import Download, PublishedFiles
from bit_ray.data.sources.published.flowers import flowers_downloads, open_flowers
from bit_ray.data.sources.published.imagenet import open_imagenet, open_imagenet21k
from bit_ray.data.sources.published.pets import open_pets, pets_downloads
from bit_ray.errors import DataError, did_you_mean

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Named:
    """A published data set."""

    open: Callable[[Sequence[str], PublishedFiles], Source]
    sizes: Mapping[str, int | None]
    """Images of each split, as published; None: there are several editions."""
    num_classes: int | None
    downloads: Callable[[], Sequence[Download]] | None = None
    how_to_get: str = ""
    """What to fetch, if no file is offered without an account."""


NAMED: dict[str, Named] = {
    "cifar10": Named(
        open=open_cifar,
        sizes={"train": 50_000, "test": 10_000},
        num_classes=10,
        downloads=partial(cifar_downloads, "cifar10"),
    ),
    "cifar100": Named(
        open=open_cifar,
        sizes={"train": 50_000, "test": 10_000},
        num_classes=100,
        downloads=partial(cifar_downloads, "cifar100"),
    ),
    "oxford_iiit_pet": Named(
        open=open_pets, sizes={"train": 3_680, "test": 3_669}, num_classes=37, downloads=pets_downloads
    ),
    "oxford_flowers102": Named(
        open=open_flowers,
        sizes={"train": 1_020, "val": 1_020, "test": 6_149},
        num_classes=102,
        downloads=flowers_downloads,
    ),
    "imagenet2012": Named(
        open=open_imagenet,
        sizes={"train": 1_281_167, "val": 50_000},
        num_classes=1_000,
        how_to_get="fetch ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz from "
        "https://image-net.org/challenges/LSVRC/2012/2012-downloads.php, with an account there",
    ),
    "imagenet21k": Named(
        open=open_imagenet21k,
        sizes={"train": None},
        num_classes=None,
        how_to_get="fetch winter21_whole.tar.gz, or a tar file per WordNet id, from "
        "https://image-net.org/download-images.php, with an account there",
    ),
}


def is_named(source: str) -> bool:
    """Return whether the text looks like NAME:SPLIT of such a set, even with a mistyped split."""
    return source.split(":", 1)[0] in NAMED and "/" not in source


def open_dataset(
    name: str,
    split: str,
    data_dir: str | Path,
    *,
    download: bool = False,
    check_size: bool = True,
    class_names: Sequence[str] | None = None,
) -> Source:
    """Open one split of a data set, or several together.

    Args:
        name: As in ``NAMED``: cifar10, oxford_iiit_pet.
        split: As published: train, val, test; ``train+val`` is both, one after the other.
        data_dir: Folder that has the publisher's files, unchanged, or a folder ``name`` with them.
        download: Whether missing files may be downloaded into ``data_dir/name``.
        check_size: Whether a split of another size than the published one is refused.
        class_names: The class list to follow, for imagenet21k, which has no official one.

    Raises:
        DataError: No such set or split, a file of it is missing (with what to fetch and where to put it) or damaged, or
            it has another size.
    """
    if name not in NAMED:
        raise DataError(f"{name}: no such data set; accepted: {', '.join(NAMED)}{did_you_mean(name, NAMED)}")
    named = NAMED[name]
    splits = split.split("+")
    if not set(splits) <= set(named.sizes) or len(set(splits)) < len(splits):
        accepted = ", ".join(f"{name}:{known}" for known in named.sizes)
        raise DataError(f"{name}:{split}: no such split; accepted: {accepted}, or several joined by +; choose one")
    if not store.is_local(data_dir):
        raise DataError.of("data_dir", data_dir, "a local folder with the publisher's files", "copy them to one")
    published = PublishedFiles(
        dataset=name,
        folder=Path(data_dir).expanduser().absolute(),
        how_to_get=named.how_to_get,
        downloads=named.downloads,
        download=download,
        class_names=tuple(class_names) if class_names is not None else None,
    )
    log.info("%s:%s: looking through %s for its images", name, split, published.folder)
    source = named.open(splits, published)
    sizes = [named.sizes[split] for split in splits]
    if check_size and None not in sizes:
        found, expected = len(source), sum(size for size in sizes if size is not None)
        if (found, len(source.class_names)) != (expected, named.num_classes):
            raise DataError(
                f"{name}:{split}: {found:,} images of {len(source.class_names):,} classes; accepted: {expected:,} of "
                f"{named.num_classes:,}, as published; fetch the set again, or give --no-check-size (check_size=False)"
            )
    return source
