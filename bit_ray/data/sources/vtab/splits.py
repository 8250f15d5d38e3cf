"""The splits of a task, and its examples by name.

The benchmark takes the first 800 training and the first 200 validation examples in the storage order of TensorFlow
Datasets, and splits validation and test sets off larger ones in that order. The order is known for all data sets except
Caltech-101 (`bit_ray.data.sources.vtab.storage_order`), which uses a seeded draw instead, or a user's list.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bit_ray.data.sources.base import Example, Source, Unreadable
from bit_ray.data.sources.vtab.files import seeded_order
from bit_ray.data.sources.vtab.images import KnownSource, Selected
from bit_ray.data.sources.vtab.index import FIRST, RELEASED, Index, drawn
from bit_ray.data.sources.vtab.prepared import is_prepared, open_prepared
from bit_ray.data.sources.vtab.readers import READERS
from bit_ray.data.sources.vtab.released import is_released, open_released
from bit_ray.data.sources.vtab.storage_order import storage_order
from bit_ray.data.sources.vtab.tasks import NUM_TRAIN, NUM_VAL, Split, Task, find_task
from bit_ray.errors import ConfigError, DataError

SUBSETS = ("train800", "val200", "train800val200", "test", "train", "val")
"""Subsets of a task: the 800, the 200, both, and the three whole splits."""
_SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class Joined:
    """Several sources, one after the other: a ``Source``."""

    sources: tuple[KnownSource, ...]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Those of all of them."""
        return tuple(self.sources[0].class_names)

    multi_label = False

    @cached_property
    def ids(self) -> list[str]:
        """Ids in order."""
        return [id for source in self.sources for id in source.ids]

    @property
    def identity(self) -> dict[str, Any]:
        """Those of all of them."""
        return {"kind": "joined", "of": [source.identity for source in self.sources]}

    def __len__(self) -> int:
        """Return the number of images."""
        return sum(map(len, self.sources))

    def part(self, indices: npt.NDArray[np.int64]) -> "JoinedPart":
        """Return the images at these indices."""
        ends = np.cumsum([len(source) for source in self.sources])
        owner = np.searchsorted(ends, indices, side="right")
        starts = ends - [len(source) for source in self.sources]
        parts = [source.part(indices[owner == i] - starts[i]) for i, source in enumerate(self.sources)]
        return JoinedPart(parts, owner.tolist())


@dataclass(frozen=True)
class JoinedPart:
    """Images of several sources, in one order."""

    parts: Sequence[Iterable[Example | Unreadable]]
    owner: list[int]

    def __iter__(self) -> Iterator[Example | Unreadable]:
        """Take each from its own source."""
        readers = [iter(part) for part in self.parts]
        for owner in self.owner:
            yield next(readers[owner])


@dataclass(frozen=True)
class TaskData:
    """All images of a task, and which split each belongs to."""

    task: Task
    source: Joined
    members: dict[Split, npt.NDArray[np.int64]]
    """Indices of each split's images."""
    in_storage_order: bool = False
    """Whether they are in the order by which the benchmark takes its subsets."""
    released: bool = False
    """Whether there are only the 800, the 200 and the test set, as others chose them."""

    @property
    def missing(self) -> str:
        """What differs from the published sizes, as a line, or empty."""
        found = {split: len(self.members[split]) for split in _SPLITS}
        published = (NUM_TRAIN, NUM_VAL, self.task.sizes[2]) if self.released else self.task.sizes
        wrong = [
            f"{split} {found[split]:,} of {size:,}"
            for split, size in zip(_SPLITS, published, strict=True)
            if found[split] != size
        ]
        return f"not the published number of images: {', '.join(wrong)}" if wrong else ""

    def subset(self, name: str, index: Index) -> Source:
        """Return one of `SUBSETS` as a source; the index says what the 800 and the 200 are.

        Raises:
            DataError: The index names a missing example, or a test image for training.
            ConfigError: No such subset.
        """
        if name not in SUBSETS:
            raise ConfigError.of(f"{self.task.name}:{name}", "no such split", ", ".join(SUBSETS), "choose one")
        if name in ("train", "val"):
            return Selected(self.source, self.members["train" if name == "train" else "val"])
        row_of = {id: i for i, id in enumerate(self.source.ids)}
        test = (
            np.array([row_of[id] for id in index.test if id in row_of], np.int64)
            if index.test
            else self.members["test"]
        )
        of_test = set(test.tolist())
        wanted = {"train800": index.train, "val200": index.val, "train800val200": index.train + index.val}.get(name)
        for id in (*index.train, *index.val, *index.test):
            if id not in row_of:
                known = ", ".join(self.source.ids[:2])
                given, accepted = f"{id} is in the index but not in the data", f"ids such as {known}"
                remedy = "correct the index, or fetch the data that it was made for"
                raise DataError.of(self.task.name, given, accepted, remedy)
        if name == "test":
            return Selected(self.source, test)
        assert wanted is not None
        leaked = next((id for id in wanted if row_of[id] in of_test), None)
        if leaked is not None:
            given = f"{leaked} is in the index for training, but is in the test set"
            remedy = "correct the index, or add its own test set to it"
            raise DataError.of(self.task.name, given, "training and validation images", remedy)
        return Selected(self.source, np.array([row_of[id] for id in wanted], np.int64))


def open_task(task: Task, data: str | Path) -> TaskData:
    """Open the data of a task, in the files of its publisher.

    Args:
        task: The task.
        data: Folder in which each data set has its own folder, named by ``task.folder``.

    Raises:
        DataError: Files are damaged, or missing; then the message says what to fetch and where to put it.
    """
    folder = Path(data).expanduser().absolute()
    if is_released(task, folder):
        return _open_released(task, folder)
    names = list(dict.fromkeys(cut.part for cut in task.cuts))
    prepared = is_prepared(task, folder)
    read = open_prepared if prepared else READERS[task.name]
    parts = {name: read(task, folder, name) for name in names}
    starts = dict(zip(names, np.cumsum([0, *(len(part) for part in parts.values())]).tolist(), strict=False))
    orders = {name: None if prepared else storage_order(task.folder, name, part.ids) for name, part in parts.items()}
    members: dict[Split, npt.NDArray[np.int64]] = {}
    for split in _SPLITS:
        cut = task.cut(split)
        order = orders[cut.part]
        if order is None:  # prepared data is in this order; data without one is mixed, always in the same way
            order = np.arange(len(parts[cut.part])) if prepared else seeded_order(len(parts[cut.part]), 0)
        first, end = cut.bounds(len(order))
        members[split] = starts[cut.part] + order[first:end]
    known = prepared or all(order is not None for order in orders.values())
    return TaskData(task, Joined(tuple(parts.values())), members, in_storage_order=known)


def is_vtab(source: str) -> bool:
    """Return whether the text looks like vtab:TASK:SUBSET."""
    return source.startswith("vtab:")


def open_subset(source: str, data: str | Path) -> Source:
    """Open a subset by name, such as ``vtab:svhn:train800``; the 800 and the 200 are drawn with seed 0.

    Raises:
        ConfigError: No such task or subset.
        DataError: Files are missing or damaged.
    """
    _, task, subset = (*source.split(":", 2), "", "")[:3]
    found = find_task(task)
    if subset not in SUBSETS:
        raise ConfigError.of(source, "no such subset", ", ".join(SUBSETS), f"for example vtab:{task}:test")
    opened = open_task(found, data)
    needs_index = subset not in ("train", "val", "test")
    return opened.subset(subset, draw_index(opened) if needs_index else Index(task=task, origin="", train=(), val=()))


def draw_index(data: TaskData, seed: int = 0, num_train: int = NUM_TRAIN, num_val: int = NUM_VAL) -> Index:
    """Take the examples of a task: with seed 0 the first in storage order if that is known, else drawn by the seed.

    Raises:
        DataError: A split has fewer.
    """
    chosen: dict[str, tuple[str, ...]] = {}
    for number, (split, count) in enumerate((("train", num_train), ("val", num_val))):
        members = data.members["train" if split == "train" else "val"]
        if len(members) < count:
            given = f"{len(members)} {split} images"
            raise DataError.of(data.task.name, given, f"at least {count}", "fetch the whole set")
        in_order = data.released or (data.in_storage_order and not seed)
        order = np.arange(count) if in_order else seeded_order(len(members), seed, number)[:count]
        chosen[split] = tuple(data.source.ids[i] for i in members[order])
    if data.released:
        return Index(task=data.task.name, origin=RELEASED, train=chosen["train"], val=chosen["val"])
    if data.in_storage_order and not seed:
        whole = not data.missing and (num_train, num_val) == (NUM_TRAIN, NUM_VAL)
        kind = "the canonical subset of VTAB-1k" if whole else "but not of the whole published set"
        origin = f"{FIRST}, {kind}"
        return Index(task=data.task.name, origin=origin, train=chosen["train"], val=chosen["val"], canonical=whole)
    return Index(task=data.task.name, origin=drawn(seed), train=chosen["train"], val=chosen["val"])


def _open_released(task: Task, folder: Path) -> TaskData:
    """Open a task that comes with its lists: its splits are the 800, the 200 and the test set."""
    parts = [open_released(task, folder, split) for split in _SPLITS]
    ends = np.cumsum([len(part) for part in parts])
    members = dict(zip(_SPLITS, np.split(np.arange(ends[-1]), ends[:2]), strict=True))
    return TaskData(task, Joined(tuple(parts)), members, released=True)
