"""Evaluation of a saved model on a shard set, over the whole cluster: every image once, no batch dropped."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from bit_ray import store
from bit_ray.cluster.session import cluster
from bit_ray.cluster.slots import Resources
from bit_ray.cluster.tasks import spread_over_cluster
from bit_ray.config import to_dict
from bit_ray.data.shards.manifest import Manifest, read_manifest
from bit_ray.data.shards.scan import row_groups
from bit_ray.errors import ConfigError
from bit_ray.evaluation.config import EvaluateConfig
from bit_ray.evaluation.intervals import Interval, bootstrap_intervals
from bit_ray.evaluation.metrics import Calibration, ClassificationMetrics
from bit_ray.evaluation.part import evaluate_part
from bit_ray.evaluation.worst import SurestPredictions, WorstPrediction, WorstPredictions
from bit_ray.inference.classifier import Classifier, load_model
from bit_ray.plots.confusion import confusion_figure
from bit_ray.plots.predictions import prediction_figure
from bit_ray.plots.reliability import reliability_figure
from bit_ray.tracking.address import tracking_uri
from bit_ray.tracking.runs import Input, TrackedRun
from bit_ray.weights.package import ModelSpec


@dataclass(frozen=True)
class Evaluation:
    """Results over all images of the set."""

    metrics: dict[str, float]
    """top_1, top_5, cross_entropy, mean_per_class, ece, num_examples."""
    intervals: dict[str, Interval]
    """95 % bootstrap intervals of top_1, top_5, cross_entropy and mean_per_class."""
    calibration: Calibration
    """Confidence against accuracy."""
    worst: tuple[WorstPrediction, ...]
    """The most confident errors, the most confident first."""
    confusion: npt.NDArray[np.int64] | None
    """``[C, C]``, rows true and columns predicted; None for very many classes or several labels per image."""
    class_names: tuple[str, ...]
    """The C names."""
    surest: tuple[WorstPrediction, ...] = ()
    """The most confident right prediction of each class, of the dozen classes where it is most confident."""
    run_id: str = ""
    """MLflow run of the evaluation, with its pictures below ``evaluation/``."""


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Evaluate a model and record the result as a separate MLflow run.

    Raises:
        BitRayError: Anything the user can fix.
    """
    manifest = read_manifest(config.shards)
    uri = tracking_uri(config.tracking.uri, config.storage)
    labels = manifest.class_names if config.labels == "shards" else config.labels
    classifier = load_model(config.model, tracking_uri=uri, labels=labels, crop_size=config.crop_size)
    check_classes(classifier.spec, manifest, config.shards)
    with TrackedRun.open(
        config.tracking,
        run_name=config.name or f"{config.model} on {manifest.name}",
        storage=config.storage,
        params=to_dict(config),
        tags={"bit_ray.manifest_digest": manifest.digest, "bit_ray.weights_sha256": classifier.sha256},
        kind="evaluate",
        inputs=[Input("test", manifest.name, manifest.digest, config.shards)],
    ) as run:
        with cluster() as resources:
            evaluation = evaluate_model(classifier, config.shards, manifest, resources, config.batch_size)
        record(run, evaluation, manifest, step=0)
    return replace(evaluation, run_id=run.run_id)


def check_classes(spec: ModelSpec, manifest: Manifest, shards: str) -> None:
    """Make sure that the model's outputs mean the classes of the set.

    Raises:
        ConfigError: They do not.
    """
    if spec.multi_label != manifest.multi_label:
        kinds = {True: "several labels per image", False: "one label per image"}
        raise ConfigError.of(
            "shards",
            f"{shards} has {kinds[manifest.multi_label]}",
            f"a set with {kinds[spec.multi_label]}, as the model was trained on",
            "use such a set, or fine-tune the model on this one",
        )
    if spec.class_names != manifest.class_names:
        raise ConfigError.of(
            "shards",
            f"{shards} has {manifest.num_classes} classes that are not those of the model's head ({spec.num_classes})",
            "a set written with the model's class list",
            "write it with --class-names SHARDS, those that the model was trained on, or fine-tune the model on "
            "this one; if the weights are of another program and its outputs are these classes in this order, set "
            "labels to shards",
        )


def record(run: TrackedRun, evaluation: Evaluation, manifest: Manifest, step: int) -> None:
    """Log an evaluation as ``test/...`` metrics, intervals as ``test/..._low`` and ``_high``, and its pictures."""
    run.log_metrics({f"test/{name}": value for name, value in evaluation.metrics.items()}, step=step)
    limits = {
        f"test/{name}_{end}": interval[i]
        for name, interval in evaluation.intervals.items()
        for i, end in enumerate(("low", "high"))
    }
    run.log_metrics(limits, step=step)
    run.log_figure(reliability_figure(evaluation.calibration), "evaluation/reliability.png")
    if evaluation.worst:
        run.log_text(_worst_table(evaluation.worst, manifest.class_names), "evaluation/worst.tsv")
        run.log_figure(worst_figure(evaluation.worst, manifest.class_names), "evaluation/worst.png")
    if evaluation.confusion is not None:
        rows = [["true \\ predicted", *manifest.class_names]]
        rows += [[name, *map(str, row)] for name, row in zip(manifest.class_names, evaluation.confusion, strict=True)]
        run.log_text("\n".join("\t".join(row) for row in rows) + "\n", "evaluation/confusion.tsv")
        run.log_figure(confusion_figure(evaluation.confusion, manifest.class_names), "evaluation/confusion.png")


def worst_figure(worst: Sequence[WorstPrediction], class_names: Sequence[str]) -> Figure:
    """Draw the most confident errors as a contact sheet."""
    return prediction_figure(
        [item.pixels for item in worst],
        [label_names(item, class_names) for item in worst],
        [(class_names[item.predicted], item.confidence) for item in worst],
        title=f"The {len(worst)} most confident errors",
        columns=8,
        tally=False,
    )


def _worst_table(worst: Sequence[WorstPrediction], class_names: Sequence[str]) -> str:
    rows = [("id", "true", "predicted", "confidence")]
    for item in worst:
        names = label_names(item, class_names), class_names[item.predicted]
        rows.append((item.id, *names, f"{item.confidence:.6f}"))
    return "\n".join("\t".join(row) for row in rows) + "\n"


def label_names(item: WorstPrediction, class_names: Sequence[str]) -> str:
    """Return the true class of a misclassified image, in words."""
    return ", ".join(class_names[label] for label in item.labels) or "none"


def evaluate_model(
    classifier: Classifier,
    shards: str,
    manifest: Manifest,
    resources: Resources | None,
    batch_size: int = 64,
    *,
    indices: npt.NDArray[np.int64] | None = None,
) -> Evaluation:
    """Evaluate on the running cluster: one task per part of the set, with a GPU each if there are GPUs.

    Args:
        classifier: The model.
        shards: The set.
        manifest: Its manifest.
        resources: The cluster's; None: in this process.
        batch_size: Images per forward pass.
        indices: ``[N]`` ascending indices of the examples that count; None: all.

    Raises:
        DataError: A shard is missing or damaged, or an image cannot be decoded.
    """
    shards = store.absolute(shards)  # tasks may have another current directory
    total = ClassificationMetrics(manifest.num_classes, manifest.multi_label)
    worst, surest = WorstPredictions(), SurestPredictions()
    shared = (classifier.state(), shards, manifest.digest, batch_size)
    groups = row_groups(manifest, indices)
    if resources is None:
        parts = [evaluate_part(groups, *shared)]
    else:
        parts = spread_over_cluster(evaluate_part, groups, resources, *shared)
    for state, wrong, right in parts:
        total.merge(ClassificationMetrics.from_state(state))
        worst.merge(wrong)
        surest.merge(right)
    assert total.num_examples == (manifest.num_examples if indices is None else len(indices))
    return Evaluation(
        metrics=total.result(),
        intervals=bootstrap_intervals(total),
        calibration=total.calibration(),
        worst=tuple(worst.items),
        surest=tuple(surest.items),
        confusion=total.confusion,
        class_names=manifest.class_names,
    )
