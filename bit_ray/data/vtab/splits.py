"""The splits of a task, and which 1,000 examples it is learnt from.

The benchmark takes the first 800 training and the first 200 validation examples in the storage order of TensorFlow
Datasets. Publishers' files do not have that order: then a seeded draw takes its place and is kept in an index file, or
a user brings a list, and whatever is printed says so. Where the benchmark carves validation or test out of one
published part, a fixed permutation stands for that order, because publishers sort theirs by class or by pose.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bit_ray.data import store
from bit_ray.data.shards import Example, Source, Unreadable
from bit_ray.data.vtab.images import KnownSource, Selected
from bit_ray.data.vtab.place import seeded_order
from bit_ray.data.vtab.prepared import is_prepared, open_prepared
from bit_ray.data.vtab.readers import READERS
from bit_ray.data.vtab.tasks import NUM_TRAIN, NUM_VAL, Split, Task, find_task
from bit_ray.errors import ConfigError, DataError

SUBSETS = ("train800", "val200", "train800val200", "test", "train", "val")
"""What can be had of a task: the 800, the 200, both, and the three whole splits."""
_FORMAT = 1
_FIRST = "the first in the order of TensorFlow Datasets"
_SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class Index:
    """The examples that a task is learnt from, by id."""

    task: str
    """Name of the task."""
    origin: str
    """Where they come from, as the end of a sentence."""
    train: tuple[str, ...]
    """The 800."""
    val: tuple[str, ...]
    """The 200."""
    test: tuple[str, ...] = ()
    """The test set, where the list says that, too; empty: the whole test split."""
    canonical: bool = False
    """Whether this is the subset that the benchmark has."""

    @property
    def statement(self) -> str:
        """One line on what the numbers of this subset may be compared with."""
        return f"{self.task}: {len(self.train)} + {len(self.val)} examples, {self.origin}"


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
        """Take each from its own."""
        readers = [iter(part) for part in self.parts]
        for owner in self.owner:
            yield next(readers[owner])


@dataclass(frozen=True)
class TaskData:
    """All images of a task, and which split each belongs to."""

    task: Task
    source: Joined
    places: dict[Split, npt.NDArray[np.int64]]
    """Places of each split's images."""
    in_storage_order: bool = False
    """Whether they are in the order by which the benchmark takes its subsets."""

    @property
    def missing(self) -> str:
        """What differs from the published sizes, as a line, or empty."""
        found = {split: len(self.places[split]) for split in _SPLITS}
        wrong = [
            f"{split} {found[split]:,} of {size:,}"
            for split, size in zip(_SPLITS, self.task.sizes, strict=True)
            if found[split] != size
        ]
        return f"{self.task.name}: not the published number of images: {', '.join(wrong)}" if wrong else ""

    def subset(self, name: str, index: Index) -> Source:
        """Return one of `SUBSETS` as a source; the index says what the 800 and the 200 are.

        Raises:
            DataError: the index names an example that is not there, or a test image for training.
            ConfigError: no such subset.
        """
        if name not in SUBSETS:
            raise ConfigError(f"{self.task.name}:{name}: no such split; accepted: {', '.join(SUBSETS)}; choose one")
        if name in ("train", "val"):
            return Selected(self.source, self.places["train" if name == "train" else "val"])
        place = {id: i for i, id in enumerate(self.source.ids)}
        test = (
            np.array([place[id] for id in index.test if id in place], np.int64) if index.test else self.places["test"]
        )
        of_test = set(test.tolist())
        wanted = {"train800": index.train, "val200": index.val, "train800val200": index.train + index.val}.get(name)
        for id in (*index.train, *index.val, *index.test):
            if id not in place:
                known = ", ".join(self.source.ids[:2])
                raise DataError(
                    f"{self.task.name}: {id}: in the index but not in the data; accepted: ids such as {known}; "
                    "correct the index, or fetch the data it was made for"
                )
        if name == "test":
            return Selected(self.source, test)
        assert wanted is not None
        leaked = next((id for id in wanted if place[id] in of_test), None)
        if leaked is not None:
            raise DataError(
                f"{self.task.name}: {leaked}: in the index for training, but in the test set; accepted: training and "
                "validation images; correct the index, or list its test set, too"
            )
        return Selected(self.source, np.array([place[id] for id in wanted], np.int64))


def open_task(task: Task, data: str | Path) -> TaskData:
    """Open the data of a task, in the files of its publisher.

    Args:
        task: The task.
        data: Folder in which each data set has its own, named by ``task.folder``.

    Raises:
        DataError: files are missing, with what to fetch and where to put it, or damaged.
    """
    folder = Path(data).expanduser().absolute()
    names = list(dict.fromkeys(cut.part for cut in task.cuts))
    prepared = is_prepared(task, folder)
    read = open_prepared if prepared else READERS[task.name]
    parts = {name: read(task, folder, name) for name in names}
    starts = dict(zip(names, np.cumsum([0, *(len(part) for part in parts.values())]).tolist(), strict=False))
    places: dict[Split, npt.NDArray[np.int64]] = {}
    for split in _SPLITS:
        cut = task.cut(split)
        size = len(parts[cut.part])
        first, end = cut.bounds(size)
        # A whole part keeps its order; a cut one is mixed first, always in the same way, unless it has been.
        order = np.arange(size) if prepared or (first, end) == (0, size) else seeded_order(size, 0)
        places[split] = starts[cut.part] + order[first:end]
    return TaskData(task, Joined(tuple(parts.values())), places, prepared)


def is_vtab(source: str) -> bool:
    """Return whether the text is meant as vtab:TASK:SUBSET."""
    return source.startswith("vtab:")


def open_subset(source: str, data: str | Path) -> Source:
    """Open a subset by name, as ``vtab:svhn:train800``; the 800 and the 200 are drawn with seed 0.

    Raises:
        ConfigError: no such task or subset.
        DataError: files are missing or damaged.
    """
    _, task, subset = (*source.split(":", 2), "", "")[:3]
    found = find_task(task)
    if subset not in SUBSETS:
        raise ConfigError(f"{source}: no such subset; accepted: {', '.join(SUBSETS)}; for example vtab:{task}:test")
    opened = open_task(found, data)
    needs_index = subset not in ("train", "val", "test")
    return opened.subset(subset, draw_index(opened) if needs_index else Index(task=task, origin="", train=(), val=()))


def draw_index(data: TaskData, seed: int = 0, num_train: int = NUM_TRAIN, num_val: int = NUM_VAL) -> Index:
    """Take the examples of a task: the first in storage order, or where there is none, drawn by a seed.

    Raises:
        DataError: a split has fewer.
    """
    chosen: dict[str, tuple[str, ...]] = {}
    for number, (split, count) in enumerate((("train", num_train), ("val", num_val))):
        places = data.places["train" if split == "train" else "val"]
        if len(places) < count:
            raise DataError(
                f"{data.task.name}: {len(places)} {split} images; accepted: at least {count}; fetch the whole set"
            )
        order = np.arange(count) if data.in_storage_order else seeded_order(len(places), seed, number)[:count]
        chosen[split] = tuple(data.source.ids[i] for i in places[order])
    if data.in_storage_order:
        whole = not data.missing and (num_train, num_val) == (NUM_TRAIN, NUM_VAL)
        said = "the canonical subset of VTAB-1k" if whole else "but not of the published whole"
        origin = f"{_FIRST}, {said}"
        return Index(task=data.task.name, origin=origin, train=chosen["train"], val=chosen["val"], canonical=whole)
    return Index(task=data.task.name, origin=drawn(seed), train=chosen["train"], val=chosen["val"])


def drawn(seed: int) -> str:
    """Return the origin of examples that were drawn by a seed."""
    return f"drawn with seed {seed}, not the canonical subset of VTAB-1k"


def fits(index: Index, seed: int, num_train: int, num_val: int) -> bool:
    """Return whether `draw_index` with this seed and these numbers would give such an index."""
    origin = index.origin.startswith(_FIRST) or index.origin == drawn(seed)
    return origin and (len(index.train), len(index.val)) == (num_train, num_val)


def read_index(place: str | Path, task: Task) -> Index | None:
    """Read a user's lists of a task: ``TASK.json`` as `write_index` writes it, or text files below ``TASK/``.

    Those are ``train800.txt`` and ``val200.txt``, if wanted ``test.txt``: an id per line, as others publish them.

    Args:
        place: Folder of the lists.
        task: The task.

    Returns:
        None where there is nothing for this task.

    Raises:
        DataError: a list that is damaged, or has an id twice.
    """
    path = store.join(place, f"{task.name}.json")
    if store.exists(path):
        return load_index(path, task)
    lists: dict[str, tuple[str, ...]] = {}
    for field, name in (("train", "train800.txt"), ("val", "val200.txt"), ("test", "test.txt")):
        path = store.join(place, task.name, name)
        if store.exists(path):
            lines = store.read_bytes(path).decode().splitlines()
            lists[field] = tuple(line.split()[0] for line in lines if line.strip())
        elif field == "train":
            return None
        elif field == "val":
            raise DataError(f"{path}: missing beside train800.txt; accepted: both; add it")
    origin = f"from the lists in {place}, which are canonical if their author says so"
    return _checked(
        Index(task=task.name, origin=origin, train=lists["train"], val=lists["val"], test=lists.get("test", ())),
        store.join(place, task.name),
    )


def write_index(index: Index, uri: str | Path) -> None:
    """Write an index file, JSON, whole or not at all."""
    store.write_json(uri, {"format": _FORMAT, **asdict(index)})


def load_index(uri: str | Path, task: Task) -> Index:
    """Read an index file.

    Raises:
        DataError: no such file, not one of this format, or of another task.
    """
    found = store.read_json(uri)
    remedy = "draw the subset again, or correct the file"
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise DataError(f"{uri}: not an index file of format {_FORMAT}; accepted: one written by bit-ray; {remedy}")
    if found.get("task") != task.name:
        raise DataError(f"{uri}: of the task {found.get('task')}; accepted: {task.name}; {remedy}")
    for name in ("train", "val", "test"):
        ids = found.get(name, [])
        if not isinstance(ids, list) or not all(isinstance(id, str) for id in ids):
            raise DataError(f"{uri}: {name}: accepted: a list of ids; {remedy}")
    train, val, test = (tuple(found.get(name, ())) for name in ("train", "val", "test"))
    origin, canonical = found.get("origin"), found.get("canonical", False)
    if not isinstance(canonical, bool):
        raise DataError(f"{uri}: canonical: {canonical!r}; accepted: true or false; {remedy}")
    if not isinstance(origin, str):
        raise DataError(f"{uri}: origin: {origin!r}; accepted: text; {remedy}")
    return _checked(Index(task=task.name, origin=origin, train=train, val=val, test=test, canonical=canonical), uri)


def _checked(index: Index, uri: str | Path) -> Index:
    ids = [*index.train, *index.val]
    if not index.train or not index.val:
        raise DataError(
            f"{uri}: {len(index.train)} train and {len(index.val)} val examples; accepted: at least one each"
        )
    if len(set(ids)) < len(ids):
        twice = next(id for id in ids if ids.count(id) > 1)
        raise DataError(f"{uri}: {twice} comes twice; accepted: different examples; remove one")
    return index
