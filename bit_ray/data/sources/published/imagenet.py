"""ILSVRC-2012 and ImageNet-21k from the publisher's tar files, read in place, or from files unpacked from them."""

from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa

from bit_ray.data.sources.archived import ArchiveSource, Items
from bit_ray.data.sources.archives import Member, as_text, members, read_members, tar_members
from bit_ray.data.sources.labels import is_number, one_each
from bit_ray.data.sources.mat import read_mat
from bit_ray.data.sources.published.files import PublishedFiles
from bit_ray.errors import DataError

_DEVKIT = "ILSVRC2012_devkit_t12"
_META, _TRUTH = f"{_DEVKIT}/data/meta.mat", f"{_DEVKIT}/data/ILSVRC2012_validation_ground_truth.txt"
# The archive, its folder when unpacked by hand or by torchvision, and the folder of the copy on Kaggle.
IMAGES = {
    "train": ("ILSVRC2012_img_train.tar", "train", "ILSVRC/Data/CLS-LOC/train"),
    "val": ("ILSVRC2012_img_val.tar", "val", "ILSVRC/Data/CLS-LOC/val"),
}
WHOLE = ("winter21_whole.tar", "winter21_whole", "winter21_whole.tar.gz", "fall11_whole.tar", "fall11_whole")
_NUM_READERS = 16
_READ_AHEAD = 64
_SUFFIXES = (".jpeg", ".jpg")


def open_imagenet(splits: Sequence[str], published: PublishedFiles) -> ArchiveSource:
    """Open ILSVRC-2012: class i is the i-th of the 1,000 WordNet ids in sorted order, as everywhere.

    Classes are named by the id and the words, "n01440764 tench, Tinca tinca", as some words occur twice. Images are in
    the tar file of tar files, in a folder of those, or in a folder of class folders. Validation images may also be in
    one folder or tar file; the development kit has their classes.

    Raises:
        DataError: A file is missing or damaged, or an image has no class.
    """
    devkit = published.find(f"{_DEVKIT}.tar.gz", _DEVKIT)
    read = read_members(devkit, (_META, _TRUTH))
    words, wnid_of = _synsets(read[_META], f"{devkit}: {_META}")
    classes = {wnid: i for i, wnid in enumerate(sorted(words))}
    truth = _numbers(as_text(read[_TRUTH], f"{devkit}: {_TRUTH}"), f"{devkit}: {_TRUTH}")
    items = Items()
    for split in splits:
        path = published.find(*IMAGES[split])
        for wnid, member in _labelled(members(path)):
            name = PurePosixPath(member.name).stem
            if wnid not in classes and split == "val":
                number = name.rpartition("_")[2]
                position = int(number) - 1 if is_number(number) else -1
                wnid = wnid_of.get(truth[position], "") if 0 <= position < len(truth) else ""
            if wnid not in classes:
                raise DataError(
                    f"{path}: {member.name}: unknown class; accepted: an image of one of the {len(classes):,} classes "
                    f"of {devkit.name}, the publisher's files unchanged; fetch them again"
                )
            items.add(f"{published.dataset}/{name}", member, [classes[wnid]])
    return items.source(published.dataset, [f"{wnid} {words[wnid]}" for wnid in classes])


def open_imagenet21k(splits: Sequence[str], published: PublishedFiles) -> ArchiveSource:
    """Open ImageNet-21k: a folder with a tar file or a folder for each WordNet id, or the whole archive.

    Class i is the i-th of the existing ids, in sorted order, or of ``published.class_names``.

    Raises:
        DataError: No file exists, a file is damaged, or a class is not in the list.
    """
    path = published.look(*WHOLE) or published.look("") or published.find(WHOLE[0])
    known = {wnid: i for i, wnid in enumerate(published.class_names or ())}
    classes: dict[str, int] = dict(known)  # without a list, numbered as found and sorted at the end
    labels = array("i")
    items = Items()
    for wnid, member in _labelled(members(path)):
        if not _is_wnid(wnid):
            continue
        if known and wnid not in known:
            raise DataError(
                f"{member.file}: class {wnid} is not in the class list; accepted: one of its {len(known):,} WordNet "
                "ids; add it to the list, or remove its images"
            )
        labels.append(classes.setdefault(wnid, len(classes)))
        items.add(f"{published.dataset}/{PurePosixPath(member.name).stem}", member)
    if not labels:
        published.find(WHOLE[0])
    names = list(known) or sorted(classes)
    place_of = {wnid: i for i, wnid in enumerate(names)}
    renumbered = np.array([place_of[wnid] for wnid in classes], np.int32)[np.array(labels)]
    return items.source(published.dataset, names, labels=one_each(pa.array(renumbered)))


def _labelled(found: Iterator[Member]) -> Iterator[tuple[str, Member]]:
    """Iterate over the images, each with the name of its folder or tar file."""
    with ThreadPoolExecutor(_NUM_READERS) as pool:  # on network disks each header takes time
        while members := list(islice(found, _READ_AHEAD)):
            for member, images in zip(members, pool.map(_images, members), strict=True):
                path = PurePosixPath(member.name)
                for image in images:
                    yield path.stem if path.suffix == ".tar" else path.parent.name, image


def _images(member: Member) -> list[Member]:
    """Return the image itself, or those in a tar file that is named after a WordNet id."""
    path = PurePosixPath(member.name)
    if path.name.startswith("."):
        return []
    if path.suffix == ".tar" and _is_wnid(path.stem):
        inside = tar_members(member.file, member.offset, member.length)
        return [image for image in inside if image.name.lower().endswith(_SUFFIXES)]
    return [member] if path.suffix.lower() in _SUFFIXES else []


def _is_wnid(name: str) -> bool:
    return name[:1] == "n" and is_number(name[1:])


def _numbers(text: str, where: str) -> list[int]:
    words = text.split()
    if not all(map(is_number, words)):
        raise DataError(f"{where}: not one number per line; accepted: the publisher's file; fetch it again")
    return [int(word) for word in words]


def _synsets(data: bytes, where: str) -> tuple[dict[str, str], dict[int, str]]:
    """Return the words of each WordNet id of the task, and the WordNet id of each of the kit's own numbers."""
    synsets = read_mat(data, where, "synsets")["synsets"]
    columns = ("ILSVRC2012_ID", "WNID", "words", "num_children")
    if synsets.dtype.names is None or not set(columns) <= set(synsets.dtype.names):
        raise DataError(f"{where}: no {', '.join(columns)} in synsets; accepted: the publisher's file; fetch it again")
    rows = list(zip(*(synsets[name].ravel().tolist() for name in columns), strict=True))
    try:
        leaves = [(int(number), str(wnid), str(words)) for number, wnid, words, children in rows if int(children) == 0]
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"{where}: synsets of other types; accepted: the publisher's file; fetch it again") from None
    return {wnid: words for _, wnid, words in leaves}, {number: wnid for number, wnid, _ in leaves}
