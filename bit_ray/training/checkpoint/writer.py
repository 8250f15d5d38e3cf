"""Writes checkpoints while the training goes on: the training waits only for a copy in memory."""

import threading
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from bit_ray import store
from bit_ray.run_folder import RunFolder
from bit_ray.training.checkpoint.directory import write_directory
from bit_ray.training.checkpoint.sharded import Parts
from bit_ray.training.checkpoint.state import Position, checkpoint_tensors, write_checkpoint
from bit_ray.training.learner import Learner
from bit_ray.training.sharding import whole
from bit_ray.weights.package import ModelSpec


class CheckpointWriter:
    """One checkpoint at a time is written, by a thread of its own.

    A checkpoint is complete once it has its ``training.json``: on a disk the directory appears whole, in an object
    store that file comes last. In a training in shards every worker has a writer, which writes some of the tensors; all
    of them are asked at the same steps.
    """

    def __init__(
        self, folder: RunFolder, spec: ModelSpec, on_written: Callable[[int], None], parts: Parts | None = None
    ) -> None:
        """Write into ``folder``; ``on_written`` gets the step of each complete checkpoint, in the thread.

        In a training in shards, ``parts`` is how its workers share the work.
        """
        self.num_skipped = 0
        """Checkpoints left out, because the one before was still being written."""
        self.stall_s = 0.0
        """Seconds for which the training has waited, in all."""
        self.write_s = 0.0
        """Seconds that the last complete checkpoint took to write, behind the training."""
        self._folder, self._spec, self._on_written, self._parts = folder, spec, on_written, parts
        self._buffers: dict[str, dict[str, Tensor]] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self, learner: Learner, position: Position, metrics: dict[str, float], *, wait: bool, place: str = ""
    ) -> None:
        """Write a checkpoint; leave it out if one is being written.

        Args:
            learner: What to save.
            position: How far it has learned.
            metrics: What was reported at this step, kept with it.
            wait: Return only when it is complete; it is never left out then.
            place: URI of the directory, if it is not a checkpoint to go on from.

        Raises:
            BitRayError: This one, or the one before it, could not be written.
        """
        started = time.perf_counter()
        if wait:
            self.finish()
        self.check()
        uri = place or self._folder.checkpoint(position.next_step)
        busy = self._thread is not None and self._thread.is_alive()
        if self._parts is not None:
            if self._parts.rank == 0:
                store.delete_directory(uri)  # what killed workers have left; nobody writes there before `any`
            busy = self._parts.any(busy, learner.device)
        if busy:
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
        about = learner.plan, position, metrics
        if self._parts is None:
            write = partial(
                write_directory, uri, lambda directory: write_checkpoint(directory, state, model, self._spec, *about)
            )
        else:
            write = partial(self._parts.write, uri, state, model, self._spec, *about)
        written = None if place else position.next_step
        self._thread = threading.Thread(target=self._write, args=(write, written), name="checkpoint", daemon=True)
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
        mine = tensors.keys() if self._parts is None else self._parts.mine(tensors)
        for name, shard in tensors.items():
            tensor = whole(shard)  # together with the other workers
            if name not in mine:
                continue
            if name not in kept:
                kept[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            kept[name].copy_(tensor, non_blocking=True)
        return kept

    def _write(self, write: Callable[[], None], step: int | None) -> None:
        started = time.perf_counter()
        try:
            write()
            self.write_s = time.perf_counter() - started
            if step is not None:
                self._on_written(step)
        except BaseException as error:
            self._error = error
