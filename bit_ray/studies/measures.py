"""What is measured of a training and its network; the examples that it is tested on are held in memory."""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from bit_ray.data.images.resize import eval_view
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.shards.scan import read_views, row_groups, single_labels
from bit_ray.errors import ConfigError
from bit_ray.evaluation.frozen import probe_features
from bit_ray.evaluation.metrics import ClassificationMetrics
from bit_ray.models.inputs import ResizeMode
from bit_ray.models.network import Network
from bit_ray.studies.cells import Part, Probe
from bit_ray.training.device import normalize
from bit_ray.training.plan import TrainPlan

# Share of all steps over whose end the training loss of a point is the mean.
_SMOOTHED = 0.03
_MAX_EXAMPLE_BYTES = 4e9
_BATCH = 128


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
    return {f"norm/stage{number}": _norm(kernels(stage)) for number, stage in stages}


def decay_exposure(plan: TrainPlan) -> float:
    """Return the sum over steps of learning rate x weight decay / (1 - momentum)."""
    if not plan.weight_decay:
        return 0.0
    rates = sum(map(plan.schedule.lr_at, range(plan.schedule.num_steps)))
    return rates * plan.weight_decay / (1 - plan.momentum)


def check_size(number: int, height: int, width: int, shards: str) -> None:
    """Refuse images that take more than the memory that a training may have.

    Raises:
        ConfigError: they do.
    """
    if (size := number * height * width * 3) > _MAX_EXAMPLE_BYTES:
        images = f"{number:,} images of about {height} x {width} pixels, {size / 1e9:.0f} GB"
        accepted = f"at most {_MAX_EXAMPLE_BYTES / 1e9:.0f} GB"
        raise ConfigError.of("where", f"memory, but {shards} has {images}", accepted, "use where cluster")


def kernels(module: torch.nn.Module) -> list[torch.Tensor]:
    """Return all kernels of a network or a part of it."""
    return [p.detach() for p in module.parameters() if p.ndim > 1]


def _norm(kernels: list[torch.Tensor]) -> float:
    return math.sqrt(sum(float(k.square().sum()) for k in kernels))


def angle(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the radians between two kernels; by the chord, which is exact for small ones."""
    chord = a.flatten() / a.norm() - b.flatten() / b.norm()
    return 2 * math.asin(min(1.0, float(chord.norm()) / 2)) if bool(a.any()) and bool(b.any()) else 0.0


@functools.lru_cache(maxsize=4)
def _views(
    part: Part, resize_mode: ResizeMode, resize_size: int, crop_size: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Views ``[N, H, W, 3]`` for evaluation and labels ``[N]``, kept for the next time they are measured."""
    manifest = read_manifest(part.shards, part.digest)
    check_size(manifest.num_examples if part.rows is None else len(part.rows), crop_size, crop_size, part.shards)

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


def scores(model: Network, part: Part, plan: TrainPlan, name: str) -> dict[str, float]:
    """Return loss and top-1 of a set, as ``NAME/loss`` and ``NAME/top_1``."""
    logits, labels = _outputs(model, model, part, plan)
    metrics = ClassificationMetrics(plan.num_classes)
    metrics.update(logits, torch.from_numpy(labels))
    found = metrics.result()
    return {f"{name}/loss": found["cross_entropy"], f"{name}/top_1": found["top_1"]}


def probe_accuracy(model: Network, probe: Probe, plan: TrainPlan) -> float:
    """Return the few-shot accuracy of the frozen features."""
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
