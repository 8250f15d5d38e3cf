"""Which 1,000 examples a task is learned from: an index, in an index file or in lists as others publish them."""

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from bit_ray import store
from bit_ray.config import is_unicode
from bit_ray.data.sources.archives import MAX_WHOLE_BYTES, as_text
from bit_ray.data.sources.vtab.tasks import Task
from bit_ray.errors import DataError, brief

FIRST = "the first in the order of TensorFlow Datasets"
RELEASED = "from the lists next to the images, which are canonical if their author says so"
LISTED = "from the lists in"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Index:
    """The examples that a task is learned from, by id."""

    task: str
    """Name of the task."""
    origin: str
    """Where they come from, as the end of a sentence."""
    train: tuple[str, ...]
    """The 800."""
    val: tuple[str, ...]
    """The 200."""
    test: tuple[str, ...] = ()
    """The test set, if the list also gives it; empty: the whole test split."""
    canonical: bool = False
    """Whether this is the benchmark's own subset."""

    @property
    def statement(self) -> str:
        """One line on what the numbers of this subset may be compared with."""
        return f"{self.task}: {len(self.train)} + {len(self.val)} examples, {self.origin}"

    def has_own_test(self, task: Task) -> bool:
        """Return whether the test set of the task is specific to this index, not published."""
        chosen_here = self.origin.startswith("drawn") or (self.origin.startswith(LISTED) and not self.test)
        return chosen_here and not task.test_is_published


def drawn(seed: int) -> str:
    """Return the origin of examples that were drawn by a seed."""
    return f"drawn with seed {seed}, not the canonical subset of VTAB-1k"


def fits(index: Index, seed: int, num_train: int, num_val: int) -> bool:
    """Return whether `draw_index` with this seed and these numbers would give such an index."""
    origin = index.origin in (drawn(seed), RELEASED) or (not seed and index.origin.startswith(FIRST))
    return origin and (len(index.train), len(index.val)) == (num_train, num_val)


def read_index(folder: str | Path, task: Task) -> Index | None:
    """Read a user's lists of a task: ``TASK.json`` as `write_index` writes it, or text files below ``TASK/``.

    Those are ``train800.txt`` and ``val200.txt``, if wanted ``test.txt``: an id per line, as others publish them.

    Args:
        folder: Folder of the lists.
        task: The task.

    Returns:
        None if there is no list for this task.

    Raises:
        DataError: A list that is damaged, or has an id twice.
    """
    path = store.join(folder, f"{task.name}.json")
    if store.exists(path):
        return load_index(path, task)
    lists: dict[str, tuple[str, ...]] = {}
    for field, name in (("train", "train800.txt"), ("val", "val200.txt"), ("test", "test.txt")):
        path = store.join(folder, task.name, name)
        if store.exists(path):
            lines = as_text(store.read_bytes(path, MAX_WHOLE_BYTES), path).splitlines()
            lists[field] = tuple(line.split()[0] for line in lines if line.strip())
        elif field == "train":
            return None
        elif field == "val":
            raise DataError(f"{path}: missing, but train800.txt exists; accepted: both; add it")
    origin = f"{LISTED} {folder}, which are canonical if their author says so"
    return _checked(
        Index(task=task.name, origin=origin, train=lists["train"], val=lists["val"], test=lists.get("test", ())),
        store.join(folder, task.name),
    )


def write_index(index: Index, uri: str | Path) -> None:
    """Write an index file, JSON, completely or not at all."""
    store.write_json(uri, {"format": _FORMAT, **asdict(index)})


def load_index(uri: str | Path, task: Task) -> Index:
    """Read an index file.

    Raises:
        DataError: No such file, not one of this format, or of another task.
    """
    found = store.read_json(uri)
    remedy = "draw the subset again, or correct the file"
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise DataError(f"{uri}: not an index file of format {_FORMAT}; accepted: one written by bit-ray; {remedy}")
    if found.get("task") != task.name:
        raise DataError(f"{uri}: for the task {found.get('task')}; accepted: {task.name}; {remedy}")
    for name in ("train", "val", "test"):
        ids = found.get(name, [])
        if not isinstance(ids, list) or not all(isinstance(id, str) and is_unicode(id) for id in ids):
            raise DataError(f"{uri}: {name}: {brief(ids)}; accepted: a list of ids; {remedy}")
    train, val, test = (tuple(found.get(name, ())) for name in ("train", "val", "test"))
    origin, canonical = found.get("origin"), found.get("canonical", False)
    if not isinstance(canonical, bool):
        raise DataError(f"{uri}: canonical: {canonical!r}; accepted: true or false; {remedy}")
    if not isinstance(origin, str) or not is_unicode(origin):
        raise DataError(f"{uri}: origin: {origin!r}; accepted: text; {remedy}")
    return _checked(Index(task=task.name, origin=origin, train=train, val=val, test=test, canonical=canonical), uri)


def _checked(index: Index, uri: str | Path) -> Index:
    ids = [*index.train, *index.val]
    if not index.train or not index.val:
        raise DataError(
            f"{uri}: {len(index.train)} train and {len(index.val)} val examples; accepted: at least one of each"
        )
    if len(set(ids)) < len(ids):
        twice = next(id for id, count in Counter(ids).items() if count > 1)
        raise DataError(f"{uri}: {twice} is there twice; accepted: different examples; remove one")
    return index
