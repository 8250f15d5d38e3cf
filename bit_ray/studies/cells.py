"""One training of a study in one process: its examples are held in memory, and it is measured while it learns.

A cell saves itself from time to time, so that a killed one continues. What it needs of the data is read in its process.
"""

import functools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from bit_ray import store
from bit_ray.config import digest
from bit_ray.data.images.resize import eval_view
from bit_ray.data.images.views import TrainView
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.shards.scan import read_views, row_groups, single_labels
from bit_ray.errors import ConfigError
from bit_ray.evaluation.frozen import probe_features
from bit_ray.evaluation.metrics import ClassificationMetrics
from bit_ray.models.inputs import ResizeMode
from bit_ray.models.network import Network
from bit_ray.run_folder import RunFolder
from bit_ray.studies.halving import goes_on
from bit_ray.studies.transfer import read_examples
from bit_ray.training.checkpoint.directory import write_directory
from bit_ray.training.checkpoint.state import OPTIMIZER_FILE, Position, fetched, load_checkpoint, save_checkpoint
from bit_ray.training.device import normalize
from bit_ray.training.healing import NonFiniteError
from bit_ray.training.in_memory import Examples, fit
from bit_ray.training.learner import Learner
from bit_ray.training.plan import TrainPlan
from bit_ray.weights.package import ModelSpec

_MEASURED_FILE = "measured.json"
# Points of a curve of the training loss, each the mean of a block of steps.
_NUM_BLOCKS = 200
# Share of all steps over whose end the training loss of a point is the mean.
_SMOOTHED = 0.03
_MAX_EXAMPLE_BYTES = 4e9
_BATCH = 128


@dataclass(frozen=True)
class Part:
    """Some examples of a shard set."""

    shards: str
    """URI of the set."""
    digest: str
    """Digest of its manifest."""
    rows: tuple[int, ...] | None = None
    """Ascending indices of the examples in the set; None: all."""

    @property
    def indices(self) -> npt.NDArray[np.int64] | None:
        """The rows as an array."""
        return None if self.rows is None else np.asarray(self.rows, np.int64)


@dataclass(frozen=True)
class Probe:
    """Few-shot accuracy of the frozen features: ridge regression on a few examples of another set."""

    support: Part
    """What the examples are: a set, and the rows of one draw."""
    shots: int
    """Examples per class in it."""
    test: Part
    """What they are tested on."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training of a study, and what is measured of it."""

    plan: TrainPlan
    """What to learn."""
    train: Part
    """From which examples."""
    at_steps: tuple[int, ...] = ()
    """Numbers of steps after which it is measured; it always is at the end."""
    parts: Mapping[str, Part] = field(default_factory=dict)
    """Sets whose loss and top-1 are measured, by name, such as ``val``."""
    test: Part | None = None
    """Scored once, at the end. Only a configuration that was chosen without it may have one."""
    probe: Probe | None = None
    """Measured too, if given."""
    norms: bool = False
    """Whether norms and turns of the kernels are measured too."""
    rungs: str = ""
    """URI of the folder in which it is compared with others at each of ``at_steps``, and ends itself where it is not
    among the best; empty: it runs to its end."""

    @property
    def identity(self) -> str:
        """Digest of all that decides its score."""
        parts = {name: asdict(part) for name, part in self.parts.items()}
        return digest(
            {
                "plan": self.plan.digest,
                "train": asdict(self.train) | {"shards": ""},
                "at_steps": list(self.at_steps),
                "parts": {name: part | {"shards": ""} for name, part in parts.items()},
                "test": None if self.test is None else asdict(self.test) | {"shards": ""},
                "probe": None if self.probe is None else [self.probe.shots, self.probe.support.digest],
                "norms": self.norms,
                **({"rungs": True} if self.rungs else {}),
            }
        )


@dataclass(frozen=True, kw_only=True)
class Point:
    """What was measured after some steps."""

    step: int
    values: dict[str, float]
    """By name: ``val/loss``, ``val/top_1``, ``train/loss``, ``probe/top_1``, ``norm/stage1``, ``turn``."""


@dataclass(frozen=True, kw_only=True)
class CellScore:
    """What came out of a cell."""

    identity: str
    """Of the cell."""
    final: dict[str, float]
    """Values at the end, also of the test set; without losses if it diverged."""
    points: tuple[Point, ...]
    """Values along the way and at the end."""
    losses: tuple[tuple[int, float], ...]
    """Training loss: the last step of each block of steps, and the mean over them."""
    images: int
    """Training images seen."""
    device_s: float
    """Seconds of its device, GPU or CPU core, for training and measuring."""
    decay_exposure: float
    """Sum over steps of learning rate x weight decay / (1 - momentum): by how much decay alone shrinks log weights."""
    rate_changed_at: int
    """Last step at which the learning rate changed by a drop; a cosine has none."""
    diverged: bool = False
    """Whether the loss became not finite; accuracies are 0 then."""
    stopped_at: int = 0
    """Steps after which it ended itself as not among the best; 0: it ran to its end."""


def load_cell(uri: str, identity: str) -> CellScore | None:
    """Read the score of a cell; None if it has none, or was another cell.

    Raises:
        DataError: the file is not a score.
    """
    if not store.exists(uri):
        return None
    score = store.read_record(CellScore, uri, "delete it to run the training again")
    return score if score.identity == identity else None


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
            final |= _scores(network, cell.test, cell.plan, "test")
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


def recent_loss(losses: Sequence[tuple[int, float]], step: int, num_steps: int) -> dict[str, float]:
    """Return the training loss around a step as ``train/loss``: a mean over the last steps; empty if no loss is known.

    Args:
        losses: Steps, and the mean loss since the one before.
        step: The step.
        num_steps: Length of the training.
    """
    recent = [loss for at, loss in losses if step - _SMOOTHED * num_steps < at <= step]
    return {"train/loss": sum(recent) / len(recent)} if recent else {}


def stage_norms(model: Network) -> dict[str, float]:
    """Return the norm of all kernels of each stage, as ``norm/stage1`` and so on."""
    stages = enumerate(model.parts().stages, start=1)
    return {f"norm/stage{number}": _norm(_kernels(stage)) for number, stage in stages}


def decay_exposure(plan: TrainPlan) -> float:
    """Return the sum over steps of learning rate x weight decay / (1 - momentum)."""
    if not plan.weight_decay:
        return 0.0
    rates = sum(map(plan.schedule.lr_at, range(plan.schedule.num_steps)))
    return rates * plan.weight_decay / (1 - plan.momentum)


@functools.lru_cache(maxsize=1)
def _examples(part: Part, view: TrainView) -> Examples:
    """Training examples, kept for the next cell of this process, which often has the same."""
    manifest = read_manifest(part.shards, part.digest)
    height, width = manifest.median_image_size
    _check_size(manifest.num_examples if part.rows is None else len(part.rows), height, width, part.shards)
    return read_examples(part.shards, manifest, part.indices, view)


def _check_size(number: int, height: int, width: int, shards: str) -> None:
    if (size := number * height * width * 3) > _MAX_EXAMPLE_BYTES:
        images = f"{number:,} images of about {height} x {width} pixels, {size / 1e9:.0f} GB"
        accepted = f"at most {_MAX_EXAMPLE_BYTES / 1e9:.0f} GB"
        raise ConfigError.of("where", f"memory, but {shards} has {images}", accepted, "use where cluster")


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
            self._before = [k.detach().clone() for k in _kernels(learner.model)] if done + 1 in self._steps else []
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
                turns = [_angle(a, b) for a, b in zip(self._before, _kernels(model), strict=True)]
                values["turn"] = sum(turns) / len(turns)
        model.eval()
        for name, part in cell.parts.items():
            values |= _scores(model, part, cell.plan, name)
        if cell.probe is not None:
            values["probe/top_1"] = _probe(model, cell.probe, cell.plan)
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


def _kernels(module: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach() for p in module.parameters() if p.ndim > 1]


def _norm(kernels: list[torch.Tensor]) -> float:
    return math.sqrt(sum(float(k.square().sum()) for k in kernels))


def _angle(a: torch.Tensor, b: torch.Tensor) -> float:
    """Radians between two kernels; by the chord, which is exact for small ones."""
    chord = a.flatten() / a.norm() - b.flatten() / b.norm()
    return 2 * math.asin(min(1.0, float(chord.norm()) / 2)) if bool(a.any()) and bool(b.any()) else 0.0


@functools.lru_cache(maxsize=4)
def _views(
    part: Part, resize_mode: ResizeMode, resize_size: int, crop_size: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Views ``[N, H, W, 3]`` for evaluation and labels ``[N]``, kept for the next time they are measured."""
    manifest = read_manifest(part.shards, part.digest)
    _check_size(manifest.num_examples if part.rows is None else len(part.rows), crop_size, crop_size, part.shards)

    def view(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        return eval_view(image, resize_mode=resize_mode, resize_size=resize_size, crop_size=crop_size)

    read = list(read_views(part.shards, manifest, row_groups(manifest, part.indices), view))
    images = [image for _, images, _ in read for image in images]
    return np.stack(images), np.concatenate([single_labels(labels) for _, _, labels in read])


@torch.inference_mode()
def _outputs(
    function: Callable[[torch.Tensor], torch.Tensor], model: Network, part: Part, plan: TrainPlan
) -> tuple[torch.Tensor, npt.NDArray[np.int64]]:
    """Outputs ``[N, ...]`` of a function of a batch of images, and labels ``[N]``."""
    images, labels = _views(part, plan.resize_mode, plan.resize_size, plan.view.crop_size)
    device = next(model.parameters()).device
    batches = (images[start : start + _BATCH] for start in range(0, len(images), _BATCH))
    return torch.cat([function(normalize(torch.from_numpy(b), device)).float().cpu() for b in batches]), labels


def _scores(model: Network, part: Part, plan: TrainPlan, name: str) -> dict[str, float]:
    logits, labels = _outputs(model, model, part, plan)
    metrics = ClassificationMetrics(plan.num_classes)
    metrics.update(logits, torch.from_numpy(labels))
    found = metrics.result()
    return {f"{name}/loss": found["cross_entropy"], f"{name}/top_1": found["top_1"]}


def _probe(model: Network, probe: Probe, plan: TrainPlan) -> float:
    support, labels = _outputs(model.forward_features, model, probe.support, plan)
    test, test_labels = _outputs(model.forward_features, model, probe.test, plan)
    everything = [np.arange(len(labels))]
    [score] = probe_features(
        support.numpy(),
        labels,
        {probe.shots: everything},
        test.numpy(),
        test_labels,
        int(max(labels.max(), test_labels.max())) + 1,
    )
    return score.ridge[0]
