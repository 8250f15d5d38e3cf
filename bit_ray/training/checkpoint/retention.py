"""Which checkpoints of a run are kept: the newest, the best, and what somebody may still need."""

from collections.abc import Collection, Mapping

from bit_ray import store
from bit_ray.config import to_dict
from bit_ray.run_folder import TRAINING_FILE, RunFolder
from bit_ray.run_records import BestCheckpoint
from bit_ray.tracking.registry import registered_packages
from bit_ray.tracking.runs import TrackedRun


class Retention:
    """Deletes checkpoints that are no longer needed.

    Args:
        folder: Of the run.
        keep: So many of the newest are kept.
        run: What a registered version of this run refers to is kept.
        best_by: Metric of the probes by which the best is kept; empty: none.
        steps_back: The newest that is older than the newest of all by so many steps is kept; 0: none.
    """

    def __init__(self, folder: RunFolder, keep: int, run: TrackedRun, *, best_by: str = "", steps_back: int = 0):
        self._folder, self._keep, self._run = folder, keep, run
        self._best_by, self._steps_back = best_by, steps_back

    def best(self) -> BestCheckpoint | None:
        """Return the best checkpoint that was scored so far and still exists."""
        if not self._best_by or not store.exists(self._folder.best):
            return None
        best = store.read_record(BestCheckpoint, self._folder.best)
        there = best.step in self._folder.checkpoints(TRAINING_FILE)
        return best if there and best.metric == self._best_by else None

    def scored(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hear of a checkpoint's scores; of two that are equal the earlier one is the best."""
        value = metrics.get(self._best_by)
        if value is None or step not in self._folder.checkpoints(TRAINING_FILE):
            return
        best = self.best()
        if best is None or value > best.value:
            record = BestCheckpoint(metric=self._best_by, step=step, value=value)
            store.write_json(self._folder.best, to_dict(record))

    def delete_others(self, needed: Collection[int] = ()) -> None:
        """Delete what is not kept, and what is left of incomplete ones.

        Args:
            needed: Steps of checkpoints that are being scored, or will be.
        """
        steps = self._folder.checkpoints(TRAINING_FILE)
        kept = {*steps[-self._keep :]}
        if self._best_by:
            best = self.best()
            kept |= {*needed} | ({best.step} if best is not None else set())
        if self._steps_back:
            kept |= {*[step for step in steps if step < steps[-1] - self._steps_back][-1:]}
        others = [step for step in steps if step not in kept] + self._folder.abandoned()
        if others:
            registered = registered_packages(self._run.tracking_uri, self._run.run_id)
            for step in others:
                if self._folder.checkpoint(step) not in registered:
                    self._folder.delete_checkpoint(step)
