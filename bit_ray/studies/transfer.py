"""One transfer in a separate process: read examples of a shard set into memory, train, score on a set."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from bit_ray.data.images.resize import eval_view, resize
from bit_ray.data.images.views import TrainView
from bit_ray.data.shards.manifest import Manifest, read_manifest
from bit_ray.data.shards.scan import read_views, row_groups, single_labels
from bit_ray.evaluation.metrics import ClassificationMetrics
from bit_ray.models.network import Network
from bit_ray.training.device import normalize
from bit_ray.training.in_memory import Examples, fit
from bit_ray.training.plan import TrainPlan


@dataclass(frozen=True, kw_only=True)
class Score:
    """Of one training of the few-shot protocol: the content of its trial's file."""

    identity: str
    test_digest: str
    top_1: float
    validation_top_1: float | None = None
    """Accuracy on the images that a learning rate is chosen by; None if none is chosen."""


def transfer(
    plan: TrainPlan,
    shards: str,
    manifest: Manifest,
    chosen: npt.NDArray[np.int64] | None,
    tensors: Mapping[str, torch.Tensor] | None,
    *,
    num_threads: int,
    micro_batch_size: int = 0,
) -> Network:
    """Train a plan on examples of a single-label set, on a GPU if this process has one, and return the network.

    Args:
        plan: What to learn.
        shards: The set.
        manifest: Its manifest.
        chosen: ``[N]`` ascending indices of the examples in the set; None: all.
        tensors: Initial tensors by name; None: from scratch.
        num_threads: Threads of training on a CPU.
        micro_batch_size: Examples per forward and backward pass; 0: the whole batch.

    Raises:
        DataError: A shard is missing or damaged, or an image cannot be decoded.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(num_threads)
    examples = read_examples(shards, manifest, chosen, plan.view)
    return fit(plan, examples, tensors, device=device, micro_batch_size=micro_batch_size)


def read_examples(shards: str, manifest: Manifest, chosen: npt.NDArray[np.int64] | None, view: TrainView) -> Examples:
    """Return training examples of a single-label set, as `fit` takes them for a view.

    Args:
        shards: The set.
        manifest: Its manifest.
        chosen: ``[N]`` ascending indices in the set; None: all.
        view: Random view of training; sets the size of the square that they are resized to, here and only once.

    Raises:
        DataError: A shard is missing or damaged, or an image cannot be decoded.
    """
    side = {"resize_crop": view.resize_size, "resize": view.crop_size}.get(view.crop, 0)

    def resized(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        return resize(image, side, side) if side else image

    parts = list(read_views(shards, manifest, row_groups(manifest, chosen), resized))
    return Examples(
        tuple(name for ids, _, _ in parts for name in ids),
        [image for _, images, _ in parts for image in images],
        np.concatenate([single_labels(labels) for _, _, labels in parts]),
    )


@torch.inference_mode()
def top_1_on(
    model: Network,
    shards: str,
    manifest: Manifest,
    plan: TrainPlan,
    chosen: npt.NDArray[np.int64] | None = None,
    batch_size: int = 128,
) -> float:
    """Return the top-1 of a network on examples of a single-label set, with the plan's view for evaluation.

    Args:
        model: The network.
        shards: The set.
        manifest: Its manifest.
        plan: Sets the view.
        chosen: ``[N]`` ascending indices of the examples in the set; None: all.
        batch_size: Images at a time.

    Raises:
        DataError: A shard is missing or damaged, or an image cannot be decoded.
    """
    device = next(model.parameters()).device
    metrics = ClassificationMetrics(plan.num_classes)

    def view(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        return eval_view(
            image, resize_mode=plan.resize_mode, resize_size=plan.resize_size, crop_size=plan.view.crop_size
        )

    for _, images, names in read_views(shards, manifest, row_groups(manifest, chosen), view):
        labels = single_labels(names)
        for start in range(0, len(images), batch_size):
            x = normalize(torch.from_numpy(np.stack(images[start : start + batch_size])), device)
            metrics.update(model(x), torch.from_numpy(labels[start : start + batch_size]))
    return metrics.result()["top_1"]


def train_and_test(
    tensors: dict[str, torch.Tensor],
    identity: str,
    plan: TrainPlan,
    shards: str,
    chosen: npt.NDArray[np.int64],
    validation: npt.NDArray[np.int64] | None,
    test_shards: str,
    test_digest: str,
    num_threads: int,
) -> Score:
    """Train and test once, as a trial of the few-shot protocol."""
    manifest, test_manifest = read_manifest(shards, plan.manifest_digest), read_manifest(test_shards, test_digest)
    start = tensors if plan.init else None
    model = transfer(plan, shards, manifest, chosen, start, num_threads=num_threads)
    return Score(
        identity=identity,
        test_digest=test_digest,
        top_1=top_1_on(model, test_shards, test_manifest, plan),
        validation_top_1=None if validation is None else top_1_on(model, shards, manifest, plan, validation),
    )
