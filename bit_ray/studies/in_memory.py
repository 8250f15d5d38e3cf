"""One training of a study in one process: its examples are held in memory, and it is measured while it learns.

It saves itself from time to time, so that a killed one continues. What it needs of the data is read in its process.
"""

import functools
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from bit_ray.data.images.views import TrainView
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.run_folder import RunFolder
from bit_ray.studies.cells import Cell, CellScore, Part, Point
from bit_ray.studies.halving import goes_on
from bit_ray.studies.measures import (
    angle,
    check_size,
    decay_exposure,
    kernels,
    probe_accuracy,
    recent_loss,
    scores,
    stage_norms,
)
from bit_ray.studies.transfer import read_examples
from bit_ray.training.checkpoint.directory import write_directory
from bit_ray.training.checkpoint.state import OPTIMIZER_FILE, Position, fetched, load_checkpoint, save_checkpoint
from bit_ray.training.healing import NonFiniteError
from bit_ray.training.in_memory import Examples, fit
from bit_ray.training.learner import Learner
from bit_ray.weights.package import ModelSpec

_MEASURED_FILE = "measured.json"
# Points of a curve of the training loss, each the mean of a block of steps.
_NUM_BLOCKS = 200


def carry_out(
    tensors: Mapping[str, Mapping[str, torch.Tensor]], cell: Cell, folder: str, save_every_s: float, num_threads: int
) -> CellScore:
    """Train and measure a cell, in this process, from where an earlier one has saved it.

    Args:
        tensors: Initial tensors by name, by the digest of the weights.
        cell: The cell.
        folder: URI of the folder for its checkpoints, which are removed at the end.
        save_every_s: Seconds between two checkpoints.
        num_threads: Threads on a CPU.

    Raises:
        BitRayError: anything the user can fix.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(num_threads)
    watch = _Watch(cell, RunFolder(folder), save_every_s)
    examples = _examples(cell.train, cell.plan.view)
    diverged, stopped_at = False, 0
    try:
        network = fit(
            cell.plan,
            examples,
            tensors[cell.plan.init_digest] if cell.plan.init else None,
            device=device,
            watch=watch,
        )
        final = dict(watch.points[-1].values)
        if cell.test is not None:
            final |= scores(network, cell.test, cell.plan, "test")
    except _NotAmongTheBest:
        stopped_at = watch.points[-1].step
        final = dict(watch.points[-1].values)
    except NonFiniteError:
        diverged = True
    # Weights may be finite and their loss on other images not.
    diverged = diverged or not all(map(math.isfinite, final.values()))
    if diverged:
        final = {f"{name}/top_1": 0.0 for name in (*cell.parts, *(("test",) if cell.test is not None else ()))}
    watch.remove()
    plan, schedule = cell.plan, cell.plan.schedule
    return CellScore(
        identity=cell.identity,
        final=final,
        points=tuple(point for point in watch.points if all(map(math.isfinite, point.values.values()))),
        losses=tuple(watch.losses),
        images=(stopped_at or schedule.num_steps) * plan.global_batch_size,
        device_s=watch.seconds(),
        decay_exposure=decay_exposure(plan),
        rate_changed_at=max((b for b in schedule.boundaries if b < schedule.num_steps), default=0),
        diverged=diverged,
        stopped_at=stopped_at,
    )


@functools.lru_cache(maxsize=1)
def _examples(part: Part, view: TrainView) -> Examples:
    """Training examples, kept for the next cell of this process, which often has the same."""
    manifest = read_manifest(part.shards, part.digest)
    height, width = manifest.median_image_size
    check_size(manifest.num_examples if part.rows is None else len(part.rows), height, width, part.shards)
    return read_examples(part.shards, manifest, part.indices, view)


class _NotAmongTheBest(Exception):
    """A trial ends itself."""


class _Watch:
    """Measures a cell while it is trained, and saves it."""

    def __init__(self, cell: Cell, folder: RunFolder, save_every_s: float) -> None:
        self.points: list[Point] = []
        self.losses: list[tuple[int, float]] = []
        self._cell, self._folder, self._save_every_s = cell, folder, save_every_s
        self._steps = {*cell.at_steps, cell.plan.schedule.num_steps}
        self._block = max(1, cell.plan.schedule.num_steps // _NUM_BLOCKS)
        self._sum: torch.Tensor | None = None
        self._count = 0
        self._before: list[torch.Tensor] = []
        self._earlier_s, self._started = 0.0, time.monotonic()
        self._saved = self._started

    def begin(self, learner: Learner) -> int:
        """Restore the learner from the last whole checkpoint."""
        newest = self._folder.newest_checkpoint()
        if not newest:
            return 0
        with fetched(self._folder.checkpoint(newest)) as local:
            position = load_checkpoint(local, learner.model, learner.optimizer, self._cell.plan)
            measured = json.loads((local / _MEASURED_FILE).read_bytes())
        self.points = [Point(step=step, values=values) for step, values in measured["points"]]
        self.losses = [(step, loss) for step, loss in measured["losses"]]
        self._earlier_s = position.train_s
        return position.next_step

    def after(self, learner: Learner, step: int, loss: torch.Tensor) -> None:
        """Measure and save, where it is time for it."""
        done = step + 1
        self._sum = loss if self._sum is None else self._sum + loss
        self._count += 1
        last = done == self._cell.plan.schedule.num_steps
        block_ends = done % self._block == 0 or last
        if block_ends:
            learner.check()
            self.losses.append((done, self._sum.item() / self._count))
            self._sum, self._count = None, 0
        if done in self._steps:
            learner.check()
            self.points.append(Point(step=done, values=self._measure(learner, done)))
            if self._cell.rungs and not last and not self._goes_on():
                raise _NotAmongTheBest
        if self._cell.norms:
            self._before = [k.detach().clone() for k in kernels(learner.model)] if done + 1 in self._steps else []
        # Between two blocks the sum of the losses would be lost.
        if block_ends and not last and time.monotonic() - self._saved >= self._save_every_s:
            self._save(learner, done)

    def _goes_on(self) -> bool:
        values = [self.points[-1].values[f"{name}/top_1"] for name in self._cell.parts]
        key = self._folder.uri.rpartition("/")[2]
        return goes_on(self._cell.rungs, len(self.points) - 1, key, sum(values) / len(values))

    def seconds(self) -> float:
        """Seconds so far, those of earlier processes included."""
        return self._earlier_s + time.monotonic() - self._started

    def remove(self) -> None:
        """Remove the checkpoints."""
        self._remove(self._folder.checkpoints(OPTIMIZER_FILE))

    def _measure(self, learner: Learner, done: int) -> dict[str, float]:
        cell, model = self._cell, learner.model
        values = recent_loss(self.losses, done, cell.plan.schedule.num_steps)
        if cell.norms:
            values |= stage_norms(model)
            if self._before:
                turns = [angle(a, b) for a, b in zip(self._before, kernels(model), strict=True)]
                values["turn"] = sum(turns) / len(turns)
        model.eval()
        for name, part in cell.parts.items():
            values |= scores(model, part, cell.plan, name)
        if cell.probe is not None:
            values["probe/top_1"] = probe_accuracy(model, cell.probe, cell.plan)
        model.train()
        return values

    def _save(self, learner: Learner, done: int) -> None:
        plan, earlier = self._cell.plan, self._folder.checkpoints(OPTIMIZER_FILE)
        spec = ModelSpec(
            model=plan.model,
            num_classes=plan.num_classes,
            class_names=tuple(str(number) for number in range(plan.num_classes)),
            multi_label=False,
            resize_mode=plan.resize_mode,
            resize_size=plan.resize_size,
            crop_size=plan.view.crop_size,
        )
        position = Position(next_step=done, train_s=self.seconds())
        measured = {"points": [[p.step, p.values] for p in self.points], "losses": self.losses}

        def write(directory: Path) -> None:
            save_checkpoint(directory, learner.model, spec, learner.optimizer, plan, position)
            (directory / _MEASURED_FILE).write_text(json.dumps(measured))

        write_directory(self._folder.checkpoint(done), write)
        self._remove(earlier)
        self._saved = time.monotonic()

    def _remove(self, steps: list[int]) -> None:
        for step in steps:
            self._folder.delete_checkpoint(step)
