"""Scores of some row groups of a set, in a process of their own: without MLflow and figures, which take it seconds."""

from typing import Any

import numpy as np
import torch

from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.shards.scan import Group, read_views, single_labels
from bit_ray.evaluation.metrics import ClassificationMetrics
from bit_ray.evaluation.worst import SurestPredictions, WorstPrediction, WorstPredictions
from bit_ray.inference.classifier import Classifier, ClassifierState


def evaluate_part(
    groups: list[Group], model: ClassifierState, shards: str, digest: str, batch_size: int
) -> tuple[dict[str, Any], list[WorstPrediction], list[WorstPrediction]]:
    """Metrics, worst and surest predictions over some row groups; it may run again."""
    classifier = Classifier.from_state(model, "cuda" if torch.cuda.is_available() else "cpu")
    manifest = read_manifest(shards, digest)
    metrics = ClassificationMetrics(manifest.num_classes, manifest.multi_label)
    worst, surest = WorstPredictions(), SurestPredictions()
    for ids, views, labels in read_views(shards, manifest, groups, classifier.view):
        for start in range(0, len(ids), batch_size):
            rows = slice(start, start + batch_size)
            pixels = np.stack(views[rows])
            if manifest.multi_label:
                targets = torch.zeros(len(pixels), manifest.num_classes)
                for row, names in enumerate(labels[rows]):
                    targets[row, names] = 1
            else:
                targets = torch.from_numpy(single_labels(labels[rows]))
            outcomes = metrics.update(classifier.logits(pixels), targets)
            for kept in (worst, surest):
                kept.update(outcomes, ids[rows], labels[rows], pixels)
    return metrics.state(), worst.items, surest.items
