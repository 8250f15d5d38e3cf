"""Fills the directory of a checkpoint on a disk or in an object store; ``training.json`` comes last."""

from collections.abc import Callable
from pathlib import Path

from bit_ray import store
from bit_ray.errors import StoreError
from bit_ray.locks import partial, scratch_directory
from bit_ray.run_folder import TRAINING_FILE


def write_directory(uri: str, write: Callable[[Path], object], *, part: str = "") -> None:
    """Have a local directory filled, and put it at the URI, complete or not at all.

    Args:
        uri: The place; what is there is replaced.
        write: Fills the directory.
        part: Name of what is written, if the files join those that other processes put there.

    Raises:
        BitRayError: It cannot be written; ``uri`` then has no ``training.json``.
    """
    try:
        if store.is_local(uri):
            target = Path(store.filesystem(uri)[1])
            target.parent.mkdir(parents=True, exist_ok=True)
            if part:
                target.mkdir(exist_ok=True)
                with partial(target / part, directory=True) as directory:
                    write(directory)
                    for file in _in_order(directory):
                        file.replace(target / file.name)
                return
            store.delete_directory(uri)  # what a killed process of an older version has left
            with partial(target, directory=True) as directory:
                write(directory)
                directory.rename(target)
            return
        with scratch_directory() as directory:
            write(directory)
            for file in _in_order(directory):
                store.upload_file(file, store.join(uri, file.name))
    except OSError as error:
        raise StoreError(
            f"{uri}: cannot be written ({error.strerror or error}); the checkpoint before it is kept; free some space "
            "or correct the permissions, and start the run again"
        ) from error


def _in_order(directory: Path) -> list[Path]:
    return sorted(directory.iterdir(), key=lambda file: file.name == TRAINING_FILE)
