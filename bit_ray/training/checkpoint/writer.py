"""Writes checkpoints while the training goes on: the training waits only for a copy in memory."""

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from bit_ray import store
from bit_ray.errors import StoreError
from bit_ray.locks import partial, scratch_directory
from bit_ray.run_folder import TRAINING_FILE, RunFolder
from bit_ray.training.checkpoint.state import Position, checkpoint_tensors, write_checkpoint
from bit_ray.training.learner import Learner
from bit_ray.weights.package import ModelSpec


class CheckpointWriter:
    """One checkpoint at a time is written, by a thread of its own.

    A checkpoint is complete once it has its ``training.json``: on a disk the directory appears whole, in an object
    store that file comes last.
    """

    def __init__(self, folder: RunFolder, spec: ModelSpec, on_written: Callable[[int], None]) -> None:
        """Write into ``folder``; ``on_written`` gets the step of each complete checkpoint, in the thread."""
        self.num_skipped = 0
        """Checkpoints left out, because the one before was still being written."""
        self.stall_s = 0.0
        """Seconds for which the training has waited, in all."""
        self.write_s = 0.0
        """Seconds that the last complete checkpoint took to write, behind the training."""
        self._folder, self._spec, self._on_written = folder, spec, on_written
        self._buffers: dict[str, dict[str, Tensor]] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, learner: Learner, position: Position, metrics: dict[str, float], *, wait: bool) -> None:
        """Write a checkpoint; leave it out if one is being written.

        Args:
            learner: What to save.
            position: How far it has learned.
            metrics: What was reported at this step, kept with it.
            wait: Return only when it is complete; it is never left out then.

        Raises:
            BitRayError: This one, or the one before it, could not be written.
        """
        started = time.perf_counter()
        if wait:
            self.finish()
        self.check()
        if self._thread is not None and self._thread.is_alive():
            self.num_skipped += 1
            return
        # A copy in memory, so that the training may change them.
        state, model = (
            self._copied(kind, tensors)
            for kind, tensors in zip(
                ("state", "model"), checkpoint_tensors(learner.model, learner.optimizer), strict=True
            )
        )
        if learner.device.type == "cuda":
            torch.cuda.synchronize(learner.device)

        def write(directory: Path) -> None:
            write_checkpoint(directory, state, model, self._spec, learner.plan, position, metrics)

        self._thread = threading.Thread(
            target=self._write, args=(position.next_step, write), name="checkpoint", daemon=True
        )
        self._thread.start()
        if wait:
            self.finish()
        self.stall_s += time.perf_counter() - started

    def check(self) -> None:
        """Make sure that no checkpoint has failed.

        Raises:
            BitRayError: One has.
        """
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def finish(self) -> None:
        """Wait until the checkpoint under way is complete.

        Raises:
            BitRayError: It could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def _copied(self, kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors into memory that is kept for the next checkpoint; on a GPU, begin to."""
        kept = self._buffers.setdefault(kind, {})
        for name, tensor in tensors.items():
            if name not in kept:
                kept[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            kept[name].copy_(tensor, non_blocking=True)
        return kept

    def _write(self, step: int, write: Callable[[Path], None]) -> None:
        started = time.perf_counter()
        try:
            write_directory(self._folder.checkpoint(step), write)
            self.write_s = time.perf_counter() - started
            self._on_written(step)
        except BaseException as error:
            self._error = error


def write_directory(uri: str, write: Callable[[Path], object]) -> None:
    """Have a local directory filled, and put it at the URI, complete or not at all.

    Raises:
        BitRayError: It cannot be written; ``uri`` then has no ``training.json``.
    """
    try:
        if store.is_local(uri):
            target = Path(store.filesystem(uri)[1])
            target.parent.mkdir(parents=True, exist_ok=True)
            store.delete_directory(uri)  # what a killed process of an older version has left
            with partial(target, directory=True) as directory:
                write(directory)
                directory.rename(target)
            return
        with scratch_directory() as directory:
            write(directory)
            files = sorted(directory.iterdir(), key=lambda file: file.name == TRAINING_FILE)
            for file in files:
                place = store.join(uri, file.name)
                store.upload_file(file, place, patience_s=store.PATIENCE_S)
                if store.file_sizes([place]) != [file.stat().st_size]:
                    raise StoreError(
                        f"{place}: has another size than what was written; check the store, and start again"
                    )
    except OSError as error:
        raise StoreError(
            f"{uri}: cannot be written ({error.strerror or error}); the checkpoint before it is kept; free some space "
            "or correct the permissions, and start the run again"
        ) from error
