"""Probes of a model on a shard set: a few examples per class, one pass of features, ridge and nearest neighbours."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from bit_ray import store
from bit_ray.cluster.slots import Resources
from bit_ray.data.shards.manifest import Manifest, check_same_classes, read_manifest
from bit_ray.evaluation.config import ProbeConfig
from bit_ray.evaluation.frozen import ProbeScore, probe_features
from bit_ray.evaluation.subsets import draw_subsets
from bit_ray.inference.classifier import Classifier
from bit_ray.inference.features import CentreCrop, FeatureSet, check_single_label, cluster_features, read_features


@dataclass(frozen=True)
class ProbeTask:
    """Inputs of a probe besides the model, checked and drawn."""

    config: ProbeConfig
    manifest: Manifest
    test_manifest: Manifest
    rows: npt.NDArray[np.int64]
    """``[N]`` ascending indices of all examples that are in a subset."""
    subsets: dict[int, list[npt.NDArray[np.int64]]]
    """k -> for each draw the indices of its examples in ``rows``."""


def probe_task(config: ProbeConfig) -> ProbeTask:
    """Check the sets of a probe, and draw its subsets; no image is read.

    Raises:
        BitRayError: The sets are missing, multi-label, of different classes, or a class has too few examples.
    """
    assert config.shards
    manifest, test_manifest = read_manifest(config.shards), read_manifest(config.test_shards)
    check_single_label(manifest, config.shards)
    check_same_classes(manifest, test_manifest, config.test_shards)
    drawn = draw_subsets(config.shards, manifest, config.shots, config.num_subsets)
    rows = np.unique(np.concatenate(list(drawn.values())))
    subsets: dict[int, list[npt.NDArray[np.int64]]] = {k: [] for k in config.shots}
    for (k, _), chosen in drawn.items():
        subsets[k].append(np.searchsorted(rows, chosen))
    # Ray tasks may have another current directory.
    config = replace(config, shards=store.absolute(config.shards), test_shards=store.absolute(config.test_shards))
    return ProbeTask(config, manifest, test_manifest, rows, subsets)


def probe(classifier: Classifier, task: ProbeTask, resources: Resources | None = None) -> list[ProbeScore]:
    """Score a model, on the cluster, or without ``resources`` in this process.

    Raises:
        DataError: A shard is missing or damaged, or an image cannot be decoded.
    """
    config = task.config
    if config.resize:
        classifier = CentreCrop(classifier, config.resize, config.crop)

    def features(shards: str, manifest: Manifest, rows: npt.NDArray[np.int64] | None) -> FeatureSet:
        if resources is None:
            return read_features(classifier, shards, manifest, rows)
        return cluster_features(classifier, shards, manifest, resources, rows)

    train = features(config.shards, task.manifest, task.rows)
    test = features(config.test_shards, task.test_manifest, None)
    return probe_features(
        train.features,
        train.labels,
        task.subsets,
        test.features,
        test.labels,
        task.manifest.num_classes,
        neighbors=config.neighbors,
    )


def probe_metrics(scores: Sequence[ProbeScore]) -> dict[str, float]:
    """Return medians by name: ``probe/ridge_5_shot``, ``probe/knn_5_shot`` and so on, fractions of 1."""
    medians = {}
    for score in scores:
        medians[f"probe/ridge_{score.k}_shot"] = statistics.median(score.ridge)
        medians[f"probe/knn_{score.k}_shot"] = statistics.median(score.knn)
    return medians
