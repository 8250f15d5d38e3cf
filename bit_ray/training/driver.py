"""From a plan to a trained model: the driver's side of a run.

The driver owns the terminal and the MLflow run; workers only report. ``STORAGE/NAME`` has the run's files: Ray Train's
checkpoints and the files of `bit_ray.run_folder`. Starting a run again with the same name continues it, or returns the
result at once.
"""

import json
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import ray
import ray.train
from ray._raylet import PlacementGroupID
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.util.placement_group import PlacementGroup

from bit_ray import store
from bit_ray.cluster.session import cluster
from bit_ray.cluster.slots import Resources, choose_workers
from bit_ray.config import to_dict
from bit_ray.data.shards.manifest import Manifest
from bit_ray.data.stream.requests import BadExample
from bit_ray.errors import ConfigError, ModelError, root_cause
from bit_ray.evaluation.probe import ProbeTask
from bit_ray.plots.curves import curve_figure
from bit_ray.progress import TrainingProgress, console, print_table
from bit_ray.run_folder import RunFolder, RunRecord, first_difference
from bit_ray.tracking.identity import code_revision
from bit_ray.tracking.registry import RegisteredModel, register
from bit_ray.tracking.runs import TrackedRun
from bit_ray.tracking.server import probe, tracking_uri
from bit_ray.training.checkpoint.probes import CheckpointProbes, check_room
from bit_ray.training.config import FinetuneConfig, PretrainConfig
from bit_ray.training.initial_weights import InitialWeights
from bit_ray.training.plan import TrainPlan
from bit_ray.training.reports import Listener, report_queue
from bit_ray.training.shares import share_out
from bit_ray.training.worker import WorkerConfig, train_worker
from bit_ray.weights.package import DESCRIPTION_FILE, ModelSpec, parse_description

BAD_IMAGES_FILE = "bad_images.json"
_LISTED = 10


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A finished run: where its model is, and what it reported."""

    package_uri: str
    """Directory of the last checkpoint, which is a model that `bit_ray.load_model` reads."""
    sha256: str
    """Digest of its weights."""
    run_id: str
    """MLflow run."""
    plan_digest: str
    """Identity of what was learned."""
    metrics: dict[str, float]
    """Last reported metrics."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A finished run and the registered version of its model."""

    result: TrainResult
    version: RegisteredModel


Test = Callable[[TrainResult, TrackedRun, Resources], dict[str, float]]


def _finished(folder: RunFolder, plan: TrainPlan) -> TrainResult | None:
    """Return the result of the run, if it is finished already.

    Raises:
        ConfigError: The name belongs to a run with another plan.
    """
    if not store.exists(folder.plan):
        return None
    recorded = store.read_record(RunRecord, folder.plan)
    if recorded.digest != plan.digest:
        field, old, new = first_difference(recorded.plan, to_dict(plan))
        raise ConfigError.of(
            "name",
            f"the run in {folder.uri} has {field} {old}, this one has {new}",
            "the settings that the run began with",
            "choose another name, or restore the setting",
        )
    return store.read_record(TrainResult, folder.result) if store.exists(folder.result) else None


def train(
    config: PretrainConfig | FinetuneConfig,
    plan: TrainPlan,
    shards: str,
    manifest: Manifest,
    *,
    init: InitialWeights | None = None,
    test: Test | None = None,
    probe_task: ProbeTask | None = None,
    parent_run_id: str | None = None,
    in_trial: bool = False,
    milestones: tuple[int, ...] = (),
) -> TrainResult:
    """Carry out a plan on the cluster, from the last step of the run of this name.

    Args:
        config: The user's settings: the run's name and storage, how to carry it out, where to record it.
        plan: What to learn.
        shards: URI of the training shards.
        manifest: Their manifest.
        init: Weights to start from; the head's are ignored. None: from scratch.
        test: Evaluates the result while cluster and MLflow run are open; its metrics become ``test/...``.
        probe_task: Scores every checkpoint meanwhile, as ``probe/...``.
        parent_run_id: MLflow run of the study that it belongs to.
        in_trial: Whether this process is a trial of a study: the cluster goes on after it if it dies, and then still
            holds its workers.
        milestones: Steps after which the weights are also kept, as `RunFolder.milestone`.

    Raises:
        BitRayError: Anything the user can fix.
    """
    shards = store.absolute(shards)  # workers have other current directories
    name, runtime, folder = config.name, config.runtime, RunFolder.of(config.storage, config.name)
    done = _finished(folder, plan)
    if done is not None:
        console.print(f"{name}: already finished, {done.package_uri}")
        return done
    probe(tracking_uri(config.tracking.uri, store.absolute(config.storage)))  # before Ray starts, which takes longer
    with cluster() as resources:
        if in_trial:
            _free_group_of_dead_attempt(folder)
        num_workers, use_gpu = choose_workers(
            resources, plan.global_batch_size, num_workers=runtime.num_workers, device=runtime.device
        )
        share_out(plan, runtime, num_workers)
        if probe_task is not None:
            check_room(probe_task, resources, num_workers)
        described = f"{manifest.name}: {manifest.num_examples:,} images of {manifest.num_classes:,} classes"
        identity = {
            "manifest_digest": plan.manifest_digest,
            "config_digest": plan.digest,
            "code_revision": code_revision(),
        }
        if init is not None:
            identity |= {"parent": init.parent, "parent_digest": init.digest}
        with TrackedRun.open(
            config.tracking,
            run_name=name,
            storage=store.absolute(config.storage),
            params=to_dict(replace(config, dry_run=False)),
            tags={f"bit_ray.{k}": v for k, v in identity.items()},
            kind=plan.kind,
            parent_run_id=parent_run_id,
        ) as run:
            # From now on the name belongs to this plan.
            store.write_json(folder.plan, to_dict(RunRecord(digest=plan.digest, shards=shards, plan=to_dict(plan))))
            spec = ModelSpec(
                model=plan.model,
                num_classes=plan.num_classes,
                class_names=manifest.class_names,
                multi_label=manifest.multi_label,
                resize_mode=plan.resize_mode,
                resize_size=plan.resize_size,
                crop_size=plan.view.crop_size,
                recipe={**plan.recipe, "train": plan.train} if plan.kind == "finetune" else plan.recipe,
                provenance={**identity, "data": described, "run_id": run.run_id, "run_name": name},
            )
            worker = WorkerConfig(
                plan=plan,
                runtime=runtime,
                spec=spec,
                shards=shards,
                folder=folder,
                init_weights=ray.put(dict(init.tensors)) if init is not None else None,
                reports=report_queue(),
                milestones=milestones,
            )
            with ExitStack() as background:
                probes = None
                if probe_task is not None:
                    probes = CheckpointProbes(probe_task, run, name, resources, num_workers)
                    background.callback(probes.cancel)  # nothing is left of it unless the training failed
                result = _fit(worker, config, num_workers, use_gpu, run, probes)
            if test is not None:
                scores = {f"test/{key}": value for key, value in test(result, run, resources).items()}
                result = replace(result, metrics={**result.metrics, **scores})
            run.set_tags({"bit_ray.weights_sha256": result.sha256, "bit_ray.weights_uri": result.package_uri})
            store.write_json(folder.result, to_dict(result))
            return result


def _free_group_of_dead_attempt(folder: RunFolder) -> None:
    """Free the workers of an attempt whose driver was killed inside a cluster that goes on.

    A placement group belongs to Ray's job, which is the whole study, and Ray's own cleaner asks the dashboard, which a
    local cluster does not have. The claim of the run says that no other attempt is alive.
    """
    if not store.exists(folder.group):
        return
    group_id = store.read_bytes(folder.group, 100).decode()
    if re.fullmatch("[0-9a-f]{36}", group_id):
        known = ray.util.placement_group_table().get(group_id, {})
        if known.get("state") == "CREATED":
            ray.util.remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group_id)))


class _Trainer(TorchTrainer):
    """Ray's trainer without the two actors of each start that a run of ours has no use for.

    One hands out data sets, and workers have their own stream. The other frees placement groups, which the run does by
    their recorded id: Ray's asks the dashboard, which a local cluster does not have.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [c for c in callbacks if not isinstance(c, DatasetsCallback | PlacementGroupCleanerCallback)]


def _fit(
    worker: WorkerConfig,
    config: PretrainConfig | FinetuneConfig,
    num_workers: int,
    use_gpu: bool,
    run: TrackedRun,
    probes: CheckpointProbes | None,
) -> TrainResult:
    name, runtime = config.name, worker.runtime

    def offer(step: int) -> None:
        if probes is not None:
            probes.offer(step, worker.folder.checkpoint(step))

    listener = Listener(worker.reports, run, TrainingProgress(name), worker.plan.schedule, offer)
    listener.start()
    filesystem, path = store.filesystem(store.absolute(config.storage))
    trainer_config = ray.train.RunConfig(
        name=name,
        storage_path=path,
        storage_filesystem=filesystem,
        checkpoint_config=ray.train.CheckpointConfig(num_to_keep=runtime.num_checkpoints_to_keep),
        logging_config=ray.train.LoggingConfig(log_level="WARNING"),  # our own lines say the same in fewer words
    )
    scaling = ray.train.ScalingConfig(
        num_workers=num_workers,
        use_gpu=use_gpu,
        resources_per_worker={"CPU": 1, **({"GPU": 1} if use_gpu else {})},
        # Without GPUs a worker's readers need its node's cores; with GPUs, workers should be on few nodes.
        placement_strategy="PACK" if use_gpu else "SPREAD",
    )
    try:
        for attempt in range(runtime.max_failures + 1):
            if attempt:
                _free_group_of_dead_attempt(worker.folder)
            try:
                trainer = _Trainer(
                    train_worker,
                    train_loop_config={"worker": worker},
                    scaling_config=scaling,
                    run_config=trainer_config,
                )
                with _interruptible():
                    result = trainer.fit()
                break
            except ray.train.TrainingFailedError as error:
                # What the user must fix would only fail again; Ray Train's own retries cannot tell the two apart.
                cause = root_cause(error)
                if cause is not None:
                    raise cause from None
                if attempt == runtime.max_failures:
                    reason = str(error).strip().splitlines()
                    raise ModelError(
                        f"{name}: workers failed {attempt + 1} times (last: {reason[-1] if reason else 'unknown'}); "
                        "read the worker logs; start the run again to continue from its last checkpoint"
                    ) from error
                console.print(f"{name}: workers failed; starting them again from the last checkpoint")
    finally:
        listener.finish()
        listener.progress.close()
        worker.reports.shutdown()
        if listener.bad_images:
            _report_bad_images(listener.bad_images, run)
    if probes is not None:
        probes.finish()
    if listener.history:
        steps, losses, rates = zip(
            *((m["step"], m["train/loss"], m["train/lr"]) for m in listener.history), strict=True
        )
        evaluations = _probed(probes) if probes is not None else []
        run.log_figure(curve_figure(steps, losses, rates, evaluations, title=name), "plots/training.png")
    assert result.checkpoint is not None, "the last step always has a checkpoint"
    last = result.metrics or {}
    package_uri = worker.folder.checkpoint(worker.plan.schedule.num_steps)
    description = store.join(package_uri, DESCRIPTION_FILE)
    _, weights = parse_description(store.read_bytes(description), description)
    return TrainResult(
        package_uri=package_uri,
        sha256=weights.sha256,
        run_id=run.run_id,
        plan_digest=worker.plan.digest,
        metrics={key: float(value) for key, value in last.items() if "/" in key},
    )


def _probed(probes: CheckpointProbes) -> list[tuple[int, float]]:
    """Step and score of each probe, by ridge regression with the most examples per class."""
    most = max(probes.task.config.shots)
    return sorted((step, metrics[f"probe/ridge_{most}_shot"]) for step, metrics in probes.history)


def _report_bad_images(bad_images: list[BadExample], run: TrackedRun) -> None:
    """Show and record the images a run has left out; a restarted worker group reports its known ones again."""
    unique = list({(bad.shard, bad.row): bad for bad in bad_images}.values())
    run.log_text(json.dumps([to_dict(bad) for bad in unique], indent=1), BAD_IMAGES_FILE)
    rows = [(bad.id or "(unknown)", bad.shard, str(bad.row), bad.reason) for bad in unique[:_LISTED]]
    more = f", the first {_LISTED} of them" if len(unique) > _LISTED else ""
    print_table(f"Left out: {len(unique):,} images that cannot be read{more}", rows, ("id", "shard", "row", "reason"))


@contextmanager
def _interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt on Ctrl-C, which Ray Train turns into an exit with status 0."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)  # Ray Train leaves its own behind


def register_result(config: PretrainConfig | FinetuneConfig, result: TrainResult) -> Trained:
    """Register the model of a finished run by reference."""
    version = register(
        result.package_uri,
        name=config.register.name or config.name,
        alias=config.register.alias,
        tracking_uri=tracking_uri(config.tracking.uri, config.storage),
        run_id=result.run_id,
    )
    return Trained(result=result, version=version)
