"""The order in which TensorFlow Datasets stores examples; the benchmark takes its 1,000 by it. A rule, no download.

Examples are sorted by the MD5 of the split's name and the example's key (tensorflow_datasets:core/hashing.py and
shuffle.py; the order may change only with the major version of a data set). The keys are those of each data set's
builder there, most of them file names. Caltech-101 is left out: its training images depend on the machine that prepared
it.
"""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

# Names of the splits there; if a publisher has no split, all is train.
_SPLITS = {"all": "train", "train": "train", "val": "validation", "test": "test"}


def _tail(id: str) -> str:
    return id.rpartition("/")[2]


def _number(id: str) -> str:
    return str(int(_tail(id)))


def _camelyon(id: str) -> str:
    part, _, number = id.partition("/")
    return f"{'valid' if part == 'val' else part}_{int(number)}"


# By the folder of the data set: from our id to the key there.
_KEYS: dict[str, Callable[[str], str]] = {
    "cifar100": _number,
    "dtd": lambda id: id,
    "oxford_flowers102": lambda id: f"{_tail(id)}.jpg",
    "oxford_iiit_pet": lambda id: f"{_tail(id)}.jpg",
    "sun397": lambda id: f"/{id}",
    "svhn": _number,
    "patch_camelyon": _camelyon,
    "eurosat": lambda id: id.replace("/", "_"),
    "resisc45": lambda id: id.replace("/", "_"),
    "diabetic_retinopathy": _tail,
    "clevr": lambda id: id,
    "dmlab": lambda id: id.partition("/")[2],
    "kitti": lambda id: f"{id}.png",
    "dsprites": _number,
    "smallnorb": _number,
}


def storage_order(dataset: str, part: str, ids: Sequence[str]) -> npt.NDArray[np.int64] | None:
    """Return the indices of a part's examples in storage order, or None if the order is not known.

    Args:
        dataset: Folder of the data set, ``task.folder``.
        part: ``all``, ``train``, ``val`` or ``test``, as published.
        ids: All ids of the part.
    """
    if dataset not in _KEYS:
        return None
    key, salted = _KEYS[dataset], hashlib.md5(_SPLITS[part].encode(), usedforsecurity=False)

    def hashed(index: int) -> bytes:
        md5 = salted.copy()
        md5.update(key(ids[index]).encode())
        return md5.digest()

    return np.array(sorted(range(len(ids)), key=hashed), np.int64)
