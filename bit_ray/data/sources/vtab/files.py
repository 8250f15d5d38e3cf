"""Where a task's files are, and what to fetch if they are missing."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bit_ray.data.sources.vtab.images import Files
from bit_ray.data.sources.vtab.tasks import Task
from bit_ray.errors import DataError


def find(task: Task, folder: Path, *names: str) -> Path:
    """Return the first of these files or folders in the task's folder.

    Raises:
        DataError: None of them exists; the message says what to fetch, and where to put it.
    """
    found = next((folder / task.folder / name for name in names if (folder / task.folder / name).exists()), None)
    if found is None:
        raise DataError.of(task.name, f"{folder / task.folder / names[0]} is missing", task.files, task.fetch)
    return found


def class_folders(task: Task, files: Files) -> tuple[list[str], npt.NDArray[np.int64], list[str]]:
    """Return images in class folders: paths, ``[N]`` class indices and the sorted class names.

    Raises:
        DataError: Another number of classes than the task has.
    """
    names = files.image_names
    classes = sorted({name.split("/")[-2] for name in names if "/" in name})
    check_classes(task, files.path, classes)
    index = {name: i for i, name in enumerate(classes)}
    names = [name for name in names if "/" in name]
    return names, np.array([index[name.split("/")[-2]] for name in names], np.int64), classes


def check_classes(task: Task, where: Path, classes: Sequence[str]) -> None:
    """Make sure that all classes were found.

    Raises:
        DataError: There are more or fewer.
    """
    if len(classes) != task.num_classes:
        raise DataError(
            f"{where}: {len(classes)} classes; accepted: the {task.num_classes} of {task.name}; fetch it again"
        )


def seeded_order(num_examples: int, *seed: int) -> npt.NDArray[np.int64]:
    """Return a permutation from the words of PCG64; NumPy guarantees that they never change."""
    words = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(num_examples)
    return np.argsort(words, kind="stable").astype(np.int64)
