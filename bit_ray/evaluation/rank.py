"""Which of the registered models will probably suit some images best: one pass of features each, no fine-tuning."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from bit_ray.cluster.slots import Resources
from bit_ray.data.shards.manifest import Manifest
from bit_ray.data.shards.scan import read_labels
from bit_ray.errors import BitRayError, ConfigError, DataError
from bit_ray.evaluation.frozen import knn_predict, logme, ridge_predict
from bit_ray.evaluation.subsets import few_shot_subset
from bit_ray.inference.classifier import load_model
from bit_ray.inference.features import FeatureSet, check_single_label, cluster_features

Criterion = Literal["ridge", "knn", "logme"]
_NEIGHBORS = 10
NUM_DRAWS = 3


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """Scores of one model's features on a data set."""

    uri: str
    """The model."""
    model: str
    """Name of its network."""
    sha256: str
    """Digest of its weights."""
    ridge: float
    """Mean top-1 of few-shot ridge regression on the examples that were not drawn, a fraction of 1."""
    knn: float
    """Top-1 of nearest neighbours, each example classified by all others, a fraction of 1."""
    logme: float
    """Log evidence per example, see `bit_ray.evaluation.frozen.logme`."""
    seconds: float
    """Time it took, including the features."""
    trained_on_these: bool = False
    """Whether it was trained on this very set, so that its scores say little of other images."""


def score_features(found: FeatureSet, class_names: Sequence[str], shots: int) -> tuple[float, float, float]:
    """Ridge, nearest neighbours and LogME of a set that serves as training and test data at once.

    Ridge regression learns from ``shots`` examples per class and is tested on the other examples, in three draws;
    nearest neighbours leave one out; LogME needs no test.

    Raises:
        DataError: A class has too few examples.
    """
    labels, num_classes = found.labels, len(class_names)
    ridge = []
    for seed in range(NUM_DRAWS):
        chosen = few_shot_subset(labels, shots, seed, class_names)
        rest = np.setdiff1d(np.arange(len(labels)), chosen)
        predicted = ridge_predict(found.features[chosen], labels[chosen], found.features[rest], num_classes)
        ridge.append(float(np.mean(predicted == labels[rest])))
    neighbors = min(_NEIGHBORS, int(np.bincount(labels).min()) - 1)
    nearest = knn_predict(found.features, labels, found.features, num_classes, neighbors, leave_one_out=True)
    return float(np.mean(ridge)), float(np.mean(nearest == labels)), logme(found.features, labels, num_classes)


def choose_examples(
    labels: npt.NDArray[np.int64], class_names: Sequence[str], shots: int, per_class: int
) -> npt.NDArray[np.int64]:
    """Ascending indices of the examples to rank by: at most ``per_class`` of each class, drawn by seed 0.

    Raises:
        DataError: A class has at most ``shots`` examples, so that none would be left to test on.
    """
    counts = np.bincount(labels, minlength=len(class_names))
    if counts.min() <= shots:
        c = int(counts.argmin())
        examples = f"class {c} ({class_names[c]!r}) has {counts[c]} examples, and one of them is for the test"
        accepted = f"at most {max(counts[c] - 1, 0)}, because {examples}"
        raise DataError.of("shots", shots, accepted, "lower it, or add examples")
    chosen = [
        positions[few_shot_subset(np.zeros(len(positions), np.int64), min(per_class, len(positions)), 0)]
        for positions in (np.flatnonzero(labels == c) for c in range(len(class_names)))
    ]
    return np.sort(np.concatenate(chosen))


def rank_models(
    uris: Sequence[str],
    shards: str,
    manifest: Manifest,
    resources: Resources,
    *,
    shots: int = 5,
    per_class: int = 100,
    by: Criterion = "ridge",
    tracking_uri: str | None = None,
) -> tuple[list[Ranked], list[tuple[str, str]]]:
    """Score models by their features of a shard set, the most promising first.

    Args:
        uris: The models; of those with the same weights and the same view only the first is scored.
        shards: The set.
        manifest: Its manifest.
        resources: The running cluster.
        shots: Examples per class of the ridge regression.
        per_class: Most examples of a class to look at, more than ``shots``.
        by: The score to sort by.
        tracking_uri: Where the registry is.

    Returns:
        The scores, and the models that cannot be loaded with the reason.

    Raises:
        ConfigError: The set is multi-label, or ``per_class`` is too small.
        DataError: A class has too few examples, or the set is damaged.
    """
    check_single_label(manifest, shards)
    if not 1 <= shots < per_class:
        accepted = f"more than shots ({shots}), which is at least 1"
        raise ConfigError.of("per_class", per_class, accepted, "raise it")
    _, labels = read_labels(shards, manifest)
    positions = choose_examples(labels, manifest.class_names, shots, per_class)
    ranked: dict[tuple[object, ...], Ranked] = {}
    broken = []
    for uri in uris:
        started = time.perf_counter()
        try:
            classifier = load_model(uri, tracking_uri=tracking_uri, features_only=True)
        except BitRayError as error:
            broken.append((uri, str(error)))
            continue
        spec = classifier.spec
        key = (classifier.sha256, spec.resize_mode, spec.resize_size, spec.crop_size, spec.input_range)
        if key in ranked:
            continue
        found = cluster_features(classifier, shards, manifest, resources, positions)
        ridge, knn, evidence = score_features(found, manifest.class_names, shots)
        ranked[key] = Ranked(
            uri=uri,
            model=spec.model,
            sha256=classifier.sha256,
            ridge=ridge,
            knn=knn,
            logme=evidence,
            seconds=time.perf_counter() - started,
            trained_on_these=spec.provenance.get("manifest_digest") == manifest.digest,
        )
    return sorted(ranked.values(), key=lambda row: -getattr(row, by)), broken
