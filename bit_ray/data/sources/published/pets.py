"""Oxford-IIIT Pets: 37 breeds of cats and dogs, from images.tar.gz and annotations.tar.gz.

The publisher's ``trainval.txt`` is the split train here, as the paper of BiT uses it, and ``test.txt`` is test.
"""

from collections.abc import Sequence

from bit_ray.data.sources.archived import ArchiveSource, Items
from bit_ray.data.sources.archives import as_text, members, read_members
from bit_ray.data.sources.labels import is_number
from bit_ray.data.sources.published.files import Download, PublishedFiles
from bit_ray.errors import DataError

LISTS = {"train": "annotations/trainval.txt", "test": "annotations/test.txt"}


def open_pets(splits: Sequence[str], published: PublishedFiles) -> ArchiveSource:
    """Open the images that the publisher lists for the splits.

    The classes are named as torchvision does: "American Bulldog".

    Raises:
        DataError: An archive is missing or damaged, or a list names a missing image.
    """
    annotations = published.find("annotations.tar.gz", "annotations.tar", "oxford-iiit-pet/annotations", "annotations")
    images = published.find("images.tar.gz", "images.tar", "oxford-iiit-pet/images", "images")
    lists = {split: file if not annotations.is_dir() else file.rpartition("/")[2] for split, file in LISTS.items()}
    read = read_members(annotations, lists.values())
    rows = {split: _rows(read[file], f"{annotations}: {file}") for split, file in lists.items()}
    # Each of the two lists has all classes; in a small set made from them perhaps only both together have.
    names = {label: name.rpartition("_")[0] for listed in rows.values() for name, label in listed}
    if sorted(names) != list(range(1, len(names) + 1)):
        raise DataError(f"{annotations}: classes {sorted(names)}; accepted: 1 to 37; fetch the archive again")
    found = {member.name.rpartition("/")[2]: member for member in members(images)}
    items = Items()
    for split in splits:
        for name, label in rows[split]:
            if f"{name}.jpg" not in found:
                raise DataError(
                    f"{images}: no {name}.jpg in it, but {lists[split]} lists it; accepted: the publisher's archive; "
                    "fetch it again"
                )
            items.add(f"{published.dataset}/{name}", found[f"{name}.jpg"], [label - 1])
    class_names = [" ".join(word.title() for word in name.split("_")) for _, name in sorted(names.items())]
    return items.source(published.dataset, class_names)


def pets_downloads() -> tuple[Download, ...]:
    """Return the archives' URLs and checksums, as in torchvision."""
    from torchvision.datasets import OxfordIIITPet

    return tuple(Download(*known) for known in OxfordIIITPet._RESOURCES)


def _rows(data: bytes, where: str) -> list[tuple[str, int]]:
    """Read lines of image, class from 1, species and breed within it."""
    rows = []
    for number, line in enumerate(as_text(data, where).splitlines(), 1):
        words = line.split()
        if line.startswith("#") or not words:
            continue
        if len(words) != 4 or not is_number(words[1]):
            raise DataError(
                f"{where}: line {number}: {line[:60]!r}; accepted: IMAGE CLASS SPECIES BREED; fetch it again"
            )
        rows.append((words[0], int(words[1])))
    return rows
