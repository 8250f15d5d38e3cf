"""One training of a study as a Ray Train run of its own, with any number of workers, started inside a trial.

The run has its own name, ``STUDY.KEY``, and continues by it; the trial only waits. A trial must never be stopped from
outside: Ray Train's workers would keep their CPUs.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from bit_ray.claim import claimed_run
from bit_ray.cluster.session import cluster
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.errors import ConfigError
from bit_ray.evaluation.evaluate import evaluate_model
from bit_ray.inference.classifier import load_model
from bit_ray.progress import console
from bit_ray.studies.cells import Cell, CellScore, Part, Point, decay_exposure
from bit_ray.studies.engine import Need
from bit_ray.tracking.config import TrackingConfig
from bit_ray.tracking.runs import recorded_metrics
from bit_ray.training.config import FinetuneConfig, PretrainConfig, Runtime
from bit_ray.training.driver import train
from bit_ray.training.initial_weights import InitialWeights


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


def need(runtime: Runtime, num_gpus: int) -> Need:
    """Return what one run takes of a cluster.

    Raises:
        ConfigError: the number of workers is not given: the first run would take all of the cluster.
    """
    if not runtime.num_workers:
        raise ConfigError(
            "runtime.num_workers: 0, with where cluster; the workers of one training; --set runtime.num-workers=8"
        )
    use_gpu = runtime.device == "cuda" or (runtime.device == "auto" and num_gpus > 0)
    return Need(
        num_cpus=runtime.num_workers * (1 + runtime.num_readers), num_gpus=runtime.num_workers if use_gpu else 0
    )


def check_hosted(cell: Cell) -> None:
    """Refuse what only a training in memory can do.

    Raises:
        ConfigError: it trains on a part of a set.
    """
    if cell.train.rows is not None:
        raise ConfigError(
            f"where: cluster, but the training is on a part of {cell.train.shards}; whole sets; name a set to select "
            "on by val_shards and leave shots out, or use where memory"
        )


def carry_out_hosted(
    tensors: Mapping[str, Mapping[str, torch.Tensor]], cell: Cell, key: str, host: Host, num_threads: int
) -> CellScore:
    """Train a cell on the cluster from the last checkpoint of its run, and measure the result.

    Args:
        tensors: Initial tensors by name, by the digest of the weights.
        cell: The cell; it is measured at the end only, apart from its training loss.
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
    with claimed_run(host.storage, name):
        result = train(
            config, plan, cell.train.shards, manifest, init=init, parent_run_id=host.parent_run_id, in_trial=True
        )
    final = {"train/loss": result.metrics["train/loss"]}
    with cluster() as resources:
        classifier = load_model(result.package_uri)

        def top_1(prefix: str, part: Part) -> dict[str, float]:
            assert part.rows is None
            found = evaluate_model(classifier, part.shards, read_manifest(part.shards, part.digest), resources)
            return {f"{prefix}/loss": found.metrics["cross_entropy"], f"{prefix}/top_1": found.metrics["top_1"]}

        for part_name, part in cell.parts.items():
            final |= top_1(part_name, part)
        if cell.test is not None:
            final |= top_1("test", cell.test)
    recorded = recorded_metrics(host.tracking, host.storage, name, plan.kind, "train/loss")
    steps = plan.schedule.num_steps
    return CellScore(
        identity=cell.identity,
        final=final,
        points=(Point(step=steps, values=final),),
        losses=tuple(recorded.get("train/loss", ())),
        images=steps * plan.global_batch_size,
        device_s=(time.monotonic() - started) * host.runtime.num_workers,
        decay_exposure=decay_exposure(plan),
        rate_changed_at=max((b for b in plan.schedule.boundaries if b < steps), default=0),
    )
