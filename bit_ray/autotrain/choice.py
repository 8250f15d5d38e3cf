"""Which of the trained classifiers is the best, and how its probabilities are calibrated."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from bit_ray.autotrain.scan import Part
from bit_ray.autotrain.starts import DEFAULT_WEIGHTS, Say, Start
from bit_ray.autotrain.thumbnails import SIDE, thumbnail_accuracy
from bit_ray.data.shards.manifest import Manifest
from bit_ray.evaluation.linear_head import LinearHead, fit_temperature
from bit_ray.evaluation.metrics import ClassificationMetrics
from bit_ray.inference.classifier import Classifier
from bit_ray.inference.features import read_features


def choose(
    models: Mapping[str, Classifier],
    start: Start,
    shards: Mapping[Part, str],
    manifests: Mapping[Part, Manifest],
    *,
    seed: int,
    say: Say,
) -> tuple[Classifier, float, dict[str, float]]:
    """Return the best by the validation images, the temperature that calibrates it, and what was measured.

    What does not beat thumbnails is said to be so. The temperature is fitted on the validation images; for the
    linear head also on the training images, as the folds that they were not in classified them: with a few
    validation images alone it would make the calibration worse.
    """
    scored, head = {}, start.head
    for name, classifier in models.items():
        found = read_features(classifier, shards["val"], manifests["val"])
        logits = _logits(classifier, found.features)
        scored[name] = float((logits.argmax(1) == found.labels).mean()), logits, found.labels
    best = max(scored, key=lambda name: scored[name][0])
    accuracy, logits, labels = scored[best]
    others = [f"{name} has {scored[name][0]:.1%}" for name in scored if name != best]
    compared = f", {', '.join(others)}" if others else ""
    say(f"chosen: {best}, {accuracy:.1%} of {len(labels):,} validation images{compared}")
    sets = (shards["train"], manifests["train"]), (shards["val"], manifests["val"])
    by_thumbnails = thumbnail_accuracy(*sets, seed=seed)
    if by_thumbnails >= accuracy:
        is_open = accuracy < 1 and DEFAULT_WEIGHTS not in start.uri
        known = f"; weights trained on photographs may, --init {DEFAULT_WEIGHTS}" if is_open else ""
        say(
            f"no gain: a support vector machine on thumbnails of {SIDE} x {SIDE} pixels has {by_thumbnails:.1%} of "
            f"the validation images, so these weights do not help with such images{known}"
        )
    temperature, before, after, said = _calibrated(logits, labels, head if best == "linear head" else None)
    say(said)
    found_metrics = {f"val/top_1_{name.replace(' ', '_').replace('-', '_')}": scored[name][0] for name in scored}
    found_metrics["val/top_1_thumbnails"] = by_thumbnails
    return models[best], temperature, {**found_metrics, "val/ece_before": before, "val/ece": after}


def _logits(classifier: Classifier, features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    head = classifier.model.head
    weight, bias = head.weight.detach().cpu().numpy(), head.bias.detach().cpu().numpy()
    return features @ weight.T + bias


def _calibrated(
    logits: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], head: LinearHead | None
) -> tuple[float, float, float, str]:
    """Return the temperature, the calibration error before and after it, and what is said of them.

    Args:
        logits: Of the validation images.
        labels: Theirs.
        head: The linear head that they are of; its folds then count, too.
    """
    which = f"{len(labels):,} validation images"
    if head is not None:
        logits, labels = np.concatenate([logits, head.held_out]), np.concatenate([labels, head.labels])
        which += f" and {len(head.labels):,} cross-validated ones"
    temperature = fit_temperature(logits, labels)
    before, after = _calibration_error(logits, labels), _calibration_error(logits / temperature, labels)
    error = f"the error of the probabilities (ECE) of {which}"
    if temperature == 1:
        said = f"none, as its gain is below its standard error; {error} is {after:.1%}"
    else:
        said = f"logits divided by {temperature:.3g}; {error} was {before:.1%} and is {after:.1%}"
    return temperature, before, after, f"calibration: {said}"


def _calibration_error(logits: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> float:
    metrics = ClassificationMetrics(logits.shape[1], multi_label=False)
    metrics.update(torch.from_numpy(logits), torch.from_numpy(labels))
    return metrics.result()["ece"]
