"""From a plan to a trained model: the driver's side of a run.

The driver owns the terminal and the MLflow run; workers only report. ``STORAGE/NAME`` has the run's files:
checkpoints and the files of `bit_ray.run_folder`. Starting a run again with the same name continues it, or returns the
result at once.
"""

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import ray

from bit_ray import log_lines, store
from bit_ray.cluster.seats import keep_ray_data_here
from bit_ray.cluster.session import cluster
from bit_ray.cluster.slots import Resources, Workers, choose_workers
from bit_ray.config import to_dict
from bit_ray.data.shards.manifest import Manifest
from bit_ray.data.stream.requests import BadExample
from bit_ray.errors import BitRayError, ConfigError
from bit_ray.evaluation.probe import ProbeTask
from bit_ray.plots.curves import curve_figure
from bit_ray.progress import TrainingProgress, console, print_table
from bit_ray.run_folder import TRAINING_FILE, RunFolder, first_difference
from bit_ray.run_records import LeftOut, LeftOutRecord, RunRecord
from bit_ray.tracking.address import tracking_uri
from bit_ray.tracking.identity import code_revision
from bit_ray.tracking.registry import RegisteredModel, register
from bit_ray.tracking.runs import Input, TrackedRun, send_kept
from bit_ray.tracking.server import probe
from bit_ray.training.attempts import Attempts
from bit_ray.training.checkpoint.probes import CheckpointProbes, check_room
from bit_ray.training.checkpoint.retention import Retention
from bit_ray.training.checkpoint.state import CheckpointRecord
from bit_ray.training.config import FinetuneConfig, PretrainConfig
from bit_ray.training.goodput import Goodput, compared
from bit_ray.training.healing import STEPS_BACK
from bit_ray.training.initial_weights import InitialWeights
from bit_ray.training.memory import with_room
from bit_ray.training.messages import Messages
from bit_ray.training.plan import TrainPlan
from bit_ray.training.pulse import Pulse
from bit_ray.training.reports import Listener
from bit_ray.training.shares import share_out
from bit_ray.training.worker import WorkerConfig
from bit_ray.weights.location import DESCRIPTION_FILE
from bit_ray.weights.package import ModelSpec, parse_description

log = logging.getLogger(__name__)

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


def finished(config: PretrainConfig | FinetuneConfig, plan: TrainPlan) -> TrainResult | None:
    """Return the result of the run of this name, if it is finished already.

    Raises:
        ConfigError: The name belongs to a run with another plan.
    """
    folder = RunFolder.of(config.storage, config.name)
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
    milestones: tuple[int, ...] = (),
    inputs: Sequence[Input] = (),
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
        milestones: Steps after which the weights are also kept, as `RunFolder.milestone`.
        inputs: Sets that it reads besides the training shards, to be recorded.

    Raises:
        BitRayError: Anything the user can fix.
    """
    shards = store.absolute(shards)  # workers have other current directories
    name, runtime, folder = config.name, config.runtime, RunFolder.of(config.storage, config.name)
    done = finished(config, plan)
    if done is not None:
        send_kept(config.tracking, config.storage, done.run_id)
        console.print(f"{name}: already finished, {done.package_uri}")
        return done
    probe(tracking_uri(config.tracking.uri, store.absolute(config.storage)))  # before Ray starts, which takes longer
    with cluster() as resources:
        workers = choose_workers(resources, plan.global_batch_size, num_workers=runtime.workers, device=runtime.device)
        runtime = with_room(plan, runtime, workers, local=resources.local)
        share_out(plan, runtime, workers.most)
        if probe_task is not None:
            check_room(probe_task, resources, workers.most)
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
            inputs=[Input("training", manifest.name, manifest.digest, shards), *inputs],
            resolved=plan.recipe if plan.kind == "finetune" else {},
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
                convert_images=manifest.convert_images,
                upright=manifest.upright,
                recipe={**plan.recipe, "train": plan.train} if plan.kind == "finetune" else plan.recipe,
                provenance={**identity, "data": described, "run_id": run.run_id, "run_name": name},
            )
            worker = WorkerConfig(
                plan=plan,
                runtime=runtime,
                spec=spec,
                shards=shards,
                manifest=ray.put(manifest),
                folder=folder,
                init_weights=ray.put(dict(init.tensors)) if init is not None else None,
                messages=Messages(),
                milestones=milestones,
            )
            retention = Retention(
                folder,
                runtime.num_checkpoints_to_keep,
                run,
                best_by=f"probe/{config.keep_best}" if isinstance(config, PretrainConfig) and config.keep_best else "",
                steps_back=STEPS_BACK if runtime.heal else 0,
            )
            with ExitStack() as background:
                probes = None
                if probe_task is not None:
                    probes = CheckpointProbes(probe_task, run, name, resources, workers.most, retention.scored)
                    background.callback(probes.cancel)  # nothing is left of it unless the training failed
                result = _fit(worker, config, workers, run, probes, retention)
            if (best := retention.best()) is not None:
                best_uri = folder.checkpoint(best.step)
                console.print(f"{name}: best by {best.metric}: step {best.step}, {best.value:.1%}: {best_uri}")
                run.set_tags({"bit_ray.best_checkpoint": best_uri})
            if test is not None:
                scores = {f"test/{key}": value for key, value in test(result, run, resources).items()}
                result = replace(result, metrics={**result.metrics, **scores})
            run.set_tags({"bit_ray.weights_sha256": result.sha256, "bit_ray.weights_uri": result.package_uri})
            store.write_json(folder.result, to_dict(result))
            return result


def _fit(
    worker: WorkerConfig,
    config: PretrainConfig | FinetuneConfig,
    workers: Workers,
    run: TrackedRun,
    probes: CheckpointProbes | None,
    retention: Retention,
) -> TrainResult:
    name, folder = config.name, worker.folder

    def on_checkpoint(step: int) -> None:
        if probes is not None:
            probes.offer(step, folder.checkpoint(step))
        attempts.saved()
        tidy()

    def tidy() -> None:
        try:
            attempts.write()
            retention.delete_others(probes.needed if probes is not None else ())
        except BitRayError as error:  # the next checkpoint tries again
            log.warning("%s: %s; training continues", name, error)

    def on_left_out(entry: LeftOut) -> None:
        console.print(
            f"{name}: step {entry.step} is left out: {entry.why}; its images: "
            f"bit-ray shards ids {worker.shards} --run {folder.uri} --step {entry.step}"
        )
        record = LeftOutRecord(batches=folder.left_out())
        run.log_text(json.dumps(to_dict(record), indent=1), "left_out.json")
        run.set_tags({"bit_ray.left_out": " ".join(str(batch.step) for batch in record.batches)})

    progress = TrainingProgress(name)
    listener = Listener(worker.messages, run, progress, worker.plan.schedule, on_checkpoint, on_left_out)
    storage = store.absolute(config.storage)
    attempts = Attempts(name, worker, workers, storage, listener, run.furthest_step)
    keep_ray_data_here()
    log_lines.mark_records()
    log_lines.about(run=name)
    pulse = Pulse(name, worker.plan.kind, folder, attempts.now)
    listener.start()
    pulse.start()
    try:
        spent = attempts.run()
    finally:
        listener.finish()
        pulse.end()
        listener.progress.close()
        worker.messages.end()
        run.log_text(json.dumps(attempts.record(), indent=1), "attempts.json")
        if listener.bad_images:
            _report_bad_images(listener.bad_images, run)
    if spent.num_attempts:
        console.print(f"{name}: {spent}")
        run.log_metrics(spent.metrics(), step=worker.plan.schedule.num_steps)
        _compare_with_plan(name, folder, spent, run, worker.plan.schedule.num_steps)
    if probes is not None:
        probes.finish()
        tidy()
    if listener.history:
        steps, losses, rates = zip(
            *((m["step"], m["train/loss"], m["train/lr"]) for m in listener.history), strict=True
        )
        evaluations = _probed(probes) if probes is not None else []
        run.log_figure(curve_figure(steps, losses, rates, evaluations, title=name), "plots/training.png")
    package_uri = folder.checkpoint(worker.plan.schedule.num_steps)
    description = store.join(package_uri, DESCRIPTION_FILE)
    _, weights = parse_description(store.read_bytes(description), description)
    record = store.read_record(CheckpointRecord, store.join(package_uri, TRAINING_FILE))
    return TrainResult(
        package_uri=package_uri,
        sha256=weights.sha256,
        run_id=run.run_id,
        plan_digest=worker.plan.digest,
        metrics=record.metrics,
    )


def _compare_with_plan(name: str, folder: RunFolder, spent: Goodput, run: TrackedRun, step: int) -> None:
    """Print and record how far the time that the run took is from what was planned."""
    try:
        planned = folder.planned()
    except BitRayError as error:  # the run is done all the same
        log.warning("%s: %s", name, error)
        return
    if planned is None:  # too short a run
        return
    taken_s = spent.wall_s - spent.waited_s
    console.print(f"{name}: {compared(planned, taken_s)}")
    run.log_metrics({"run/planned_s": planned.seconds, "run/plan_error": taken_s / planned.seconds - 1}, step=step)


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
