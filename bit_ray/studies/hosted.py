"""One training of a study as a Ray Train run of its own, with any number of workers, started inside a trial.

The run has its own name, ``STUDY.KEY``, and continues by it; the trial only waits. A trial must never be stopped from
outside: Ray Train's workers would keep their CPUs.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch

from bit_ray import store
from bit_ray.claim import claimed_run
from bit_ray.cluster.session import cluster
from bit_ray.cluster.slots import Resources
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.errors import ConfigError
from bit_ray.evaluation.config import ProbeConfig
from bit_ray.evaluation.evaluate import evaluate_model
from bit_ray.evaluation.probe import ProbeTask, probe
from bit_ray.inference.classifier import Classifier, load_model
from bit_ray.progress import console
from bit_ray.run_folder import RunFolder
from bit_ray.studies.cells import Cell, CellScore, Part, Point, Probe
from bit_ray.studies.engine import Need
from bit_ray.studies.measures import decay_exposure, recent_loss, stage_norms
from bit_ray.tracking.config import TrackingConfig
from bit_ray.tracking.recorded import recorded_metrics
from bit_ray.tracking.runs import send_kept
from bit_ray.training.config import FinetuneConfig, PretrainConfig, Runtime
from bit_ray.training.driver import train
from bit_ray.training.initial_weights import InitialWeights
from bit_ray.weights.location import DESCRIPTION_FILE


@dataclass(frozen=True, kw_only=True)
class Host:
    """What the runs of a study have in common."""

    study: str
    """Name of the study, which their names begin with."""
    runtime: Runtime
    """How each is carried out; it names the number of workers."""
    storage: str
    tracking: TrackingConfig
    parent_run_id: str
    """MLflow run of the study."""


@dataclass(frozen=True, kw_only=True)
class _Points:
    """The content of the file of what was measured along the way."""

    values: dict[str, dict[str, float]]
    """By step."""


def need(runtime: Runtime, num_gpus: int) -> Need:
    """Return what one run takes of a cluster.

    Raises:
        ConfigError: the number of workers is not given: the first run would take all of the cluster.
    """
    num_workers, most = runtime.workers
    if num_workers != most or not num_workers:
        accepted = "the number of workers of one training"
        raise ConfigError.of(
            "runtime.num_workers", f"{runtime.num_workers}, with where cluster", accepted, "--set runtime.num-workers=8"
        )
    use_gpu = runtime.device == "cuda" or (runtime.device == "auto" and num_gpus > 0)
    return Need(num_cpus=num_workers * (1 + runtime.num_readers), num_gpus=num_workers if use_gpu else 0)


def check_hosted(cell: Cell, runtime: Runtime) -> None:
    """Refuse what only a training in memory can do.

    Raises:
        ConfigError: it trains on a part of a set, or the number of workers is not given.
    """
    if cell.train.rows is not None:
        raise ConfigError.of(
            "where",
            f"cluster, but the training is on a part of {cell.train.shards}",
            "whole sets",
            "name a set to select on by val_shards and leave shots out, or use where memory",
        )
    need(runtime, 0)


def carry_out_hosted(
    tensors: Mapping[str, Mapping[str, torch.Tensor]], cell: Cell, key: str, host: Host, num_threads: int
) -> CellScore:
    """Train a cell on the cluster from the last checkpoint of its run, and measure the result.

    Args:
        tensors: Initial tensors by name, by the digest of the weights.
        cell: The cell; it is measured after the training, from the weights that were kept along the way.
        key: Its name in the study.
        host: The study.
        num_threads: Not used: Ray Train starts its own workers.

    Raises:
        BitRayError: anything the user can fix.
    """
    console.quiet = True
    started, plan = time.monotonic(), cell.plan
    kind = PretrainConfig if plan.kind == "pretrain" else FinetuneConfig
    name = f"{host.study}.{key}"
    config = kind(
        name=name, shards=cell.train.shards, storage=host.storage, tracking=host.tracking, runtime=host.runtime
    )
    init = None
    if plan.init:
        init = InitialWeights(plan.model, tensors[plan.init_digest], plan.init_digest, plan.init)
    manifest = read_manifest(cell.train.shards, cell.train.digest)
    folder, steps = RunFolder.of(host.storage, name), plan.schedule.num_steps
    with claimed_run(host.storage, name):
        result = train(
            config,
            plan,
            cell.train.shards,
            manifest,
            init=init,
            parent_run_id=host.parent_run_id,
            milestones=cell.at_steps,
        )
        send_kept(host.tracking, host.storage, result.run_id)  # a score whose losses have gaps would stay so
        losses = recorded_metrics(host.tracking, host.storage, name, plan.kind, "train/loss").get("train/loss", [])
        with cluster() as resources:
            points = [
                Point(step=step, values=values | recent_loss(losses, step, steps))
                for step, values in _measured_milestones(cell, folder, resources)
            ]
            classifier = load_model(result.package_uri)
            values = _measure(classifier, cell, resources) | {"train/loss": result.metrics["train/loss"]}
            points.append(Point(step=steps, values=values | recent_loss(losses, steps, steps)))
            final = dict(points[-1].values)
            if cell.test is not None:
                final |= _scores(classifier, cell.test, "test", resources)
    return CellScore(
        identity=cell.identity,
        final=final,
        points=tuple(points),
        losses=tuple(losses),
        images=steps * plan.global_batch_size,
        device_s=(time.monotonic() - started) * host.runtime.workers[0],
        decay_exposure=decay_exposure(plan),
        rate_changed_at=max((b for b in plan.schedule.boundaries if b < steps), default=0),
    )


def _measured_milestones(cell: Cell, folder: RunFolder, resources: Resources) -> list[tuple[int, dict[str, float]]]:
    """Measure the weights along the way, each once, and remove them."""
    known = store.read_record(_Points, folder.points).values if store.exists(folder.points) else {}
    for step in cell.at_steps:
        uri = folder.milestone(step)
        if str(step) not in known and store.exists(store.join(uri, DESCRIPTION_FILE)):
            known = {**known, str(step): _measure(load_model(uri), cell, resources)}
            store.write_json(folder.points, asdict(_Points(values=known)))
        store.delete_directory(uri)
    return [(step, known[str(step)]) for step in cell.at_steps if str(step) in known]


def _measure(classifier: Classifier, cell: Cell, resources: Resources) -> dict[str, float]:
    values = stage_norms(classifier.model) if cell.norms else {}
    for name, part in cell.parts.items():
        values |= _scores(classifier, part, name, resources)
    if cell.probe is not None:
        values["probe/top_1"] = _probe(classifier, cell.probe, resources)
    return values


def _scores(classifier: Classifier, part: Part, name: str, resources: Resources) -> dict[str, float]:
    assert part.rows is None
    found = evaluate_model(classifier, part.shards, read_manifest(part.shards, part.digest), resources)
    return {f"{name}/loss": found.metrics["cross_entropy"], f"{name}/top_1": found.metrics["top_1"]}


def _probe(classifier: Classifier, task: Probe, resources: Resources) -> float:
    support, tested = task.support, task.test
    manifest = read_manifest(support.shards, support.digest)
    rows = np.arange(manifest.num_examples) if support.indices is None else support.indices
    config = ProbeConfig(shards=support.shards, test_shards=tested.shards, shots=(task.shots,), num_subsets=1)
    test_manifest = read_manifest(tested.shards, tested.digest)
    [score] = probe(
        classifier, ProbeTask(config, manifest, test_manifest, rows, {task.shots: [np.arange(len(rows))]}), resources
    )
    return score.ridge[0]
