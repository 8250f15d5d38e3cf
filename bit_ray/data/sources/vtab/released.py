"""Tasks as others re-publish them: a folder of images with lists of the 800, the 200 and the test set.

``train800.txt``, ``val200.txt`` and ``test.txt`` have an image and its label per line, ``images/test/000000.jpg 3``,
with the path below the folder, which is named after the task.
"""

from pathlib import Path, PurePath

from bit_ray import store
from bit_ray.data.sources.archived import Items
from bit_ray.data.sources.archives import MAX_WHOLE_BYTES, Member, as_text
from bit_ray.data.sources.labels import is_number
from bit_ray.data.sources.vtab.images import KnownSource
from bit_ray.data.sources.vtab.structured import CLASSES
from bit_ray.data.sources.vtab.tasks import Task
from bit_ray.errors import DataError

LISTS = {"train": "train800.txt", "val": "val200.txt", "test": "test.txt"}


def is_released(task: Task, folder: Path) -> bool:
    """Return whether the task exists in this form."""
    return (folder / task.name / LISTS["train"]).exists()


def open_released(task: Task, folder: Path, part: str) -> KnownSource:
    """Open the 800, the 200 or the test set, in the order of the list.

    Raises:
        DataError: A list or an image is missing, or a line is not an image and a label.
    """
    where = folder / task.name / LISTS[part]
    if not where.exists():
        given = f"{where} is missing next to {LISTS['train']}"
        raise DataError.of(task.name, given, f"all of {', '.join(LISTS.values())}", "add it")
    items = Items()
    for number, line in enumerate(as_text(store.read_bytes(where, MAX_WHOLE_BYTES), where).splitlines(), 1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        outside = PurePath(name).is_absolute() or ".." in PurePath(name).parts
        if not name or outside or not is_number(label) or int(label) >= task.num_classes:
            given = f"{where}: line {number}: {line[:60]!r}"
            accepted = f"IMAGE LABEL, the label from 0 to {task.num_classes - 1}, the image below the folder"
            raise DataError.of(task.name, given, accepted, "correct the list")
        path = where.parent / name
        if not path.is_file():
            given = f"{where}: line {number}: no file {path}"
            raise DataError.of(task.name, given, "a file that exists", "fetch it")
        items.add(name, Member(name, str(path), 0, path.stat().st_size), [int(label)])
    return items.source(task.name, CLASSES.get(task.name) or tuple(f"class {i}" for i in range(task.num_classes)))
