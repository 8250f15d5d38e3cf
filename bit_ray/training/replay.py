"""Train some steps of a recorded run again, from its checkpoint, to see whether they give the recorded loss."""

from dataclasses import dataclass

import numpy as np
import torch

from bit_ray.cluster.session import cluster
from bit_ray.cluster.slots import num_local_cores
from bit_ray.data.stream.batches import StreamSpec, batches
from bit_ray.data.stream.history import recorded_shards
from bit_ray.errors import ConfigError, ModelError
from bit_ray.run_folder import TRAINING_FILE, RunFolder
from bit_ray.tracking.recorded import recorded_metrics
from bit_ray.training.checkpoint.state import fetched, load_checkpoint
from bit_ray.training.config import Precision, ReplayConfig
from bit_ray.training.device import resolve_precision, worker_threads
from bit_ray.training.learner import Learner
from bit_ray.training.plan import TrainPlan
from bit_ray.training.run import recorded_plan


@dataclass(frozen=True)
class Replayed:
    """Losses of steps that were trained again, and the recorded loss."""

    start_step: int
    """Step of the checkpoint that the replay started from; 0 is the fresh network."""
    losses: dict[int, float]
    """Mean loss of each step that was trained again; the run's left-out steps are not."""
    first_step: int
    """First step of the recorded mean."""
    last_step: int
    """Its last step."""
    recorded: float
    """The mean loss recorded in MLflow."""
    replayed: float
    """The mean loss now."""


def replay(config: ReplayConfig) -> Replayed:
    """Train the steps up to the recorded mean loss that includes a step, in this process.

    The same number of workers and micro-batches gives the same bits on a CPU; any other the same up to rounding.

    Raises:
        ModelError: There is no such run or step, or no checkpoint before it is left.
    """
    plan, shards = recorded_plan(config.run)
    storage, _, name = config.run.rstrip("/").rpartition("/")
    recorded = recorded_metrics(config.tracking, storage or ".", name, plan.kind, "train/loss")
    history = recorded.get("train/loss", [])
    done = [step for step, _ in history if step > config.step]
    if config.step < 0 or not done:
        last = history[-1][0] - 1 if history else -1
        raise ModelError.of("step", config.step, f"0 to {last}, the steps with a recorded loss")
    stop = done[0]
    begin = max((step for step, _ in history if step < stop), default=0)
    folder = RunFolder(config.run)
    start, checkpoint = _checkpoint_before(folder, begin, plan)

    left_out = {batch.step for batch in folder.left_out()}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = precision_of(folder, begin, device)
    learner = Learner(plan, device, precision=precision, micro_batch_size=config.runtime.micro_batch_size)
    if checkpoint:
        with fetched(checkpoint) as directory:
            load_checkpoint(directory, learner.model, learner.optimizer, plan)
    spec = StreamSpec(
        shards=config.shards or recorded_shards(config.run, shards),
        manifest_digest=plan.manifest_digest,
        global_batch_size=plan.global_batch_size,
        slots=learner.slots,
        start_step=start,
        stop_step=stop,
        seed=plan.seed,
        shuffle=plan.shuffle,
        view=plan.view,
    )
    losses = {}
    with cluster(), worker_threads(device.type):
        for batch in batches(spec, num_threads=num_local_cores()):
            if batch.step in left_out:
                continue
            loss, _ = learner.step(batch.step, batch.images, learner.targets(batch.rows))
            losses[batch.step] = loss.item()
    return Replayed(
        start_step=start,
        losses=losses,
        first_step=begin,
        last_step=stop - 1,
        recorded=dict(history)[stop],
        # Summed in float32, as in the run.
        replayed=float(np.mean([losses[step] for step in range(begin, stop) if step in losses], dtype=np.float32)),
    )


def precision_of(folder: RunFolder, step: int, device: torch.device) -> Precision:
    """Return the precision of a step; ``auto`` for a run that did not record it.

    Raises:
        ModelError: This device cannot compute in it.
    """
    starts = [start for start in folder.starts() if start.first_step <= step]
    precision: Precision = starts[-1].precision if starts else "auto"
    try:
        resolve_precision(precision, device)
    except ConfigError:
        raise ModelError(
            f"{folder.uri}: trained in {precision} on {starts[-1].device}; accepted: a device that is fast in "
            f"{precision}, unlike this {device.type} device; replay it there"
        ) from None
    return precision


def _checkpoint_before(folder: RunFolder, step: int, plan: TrainPlan) -> tuple[int, str]:
    """Return the step and the URI of the latest checkpoint at or before ``step``; no URI for the fresh network."""
    kept = folder.checkpoints(TRAINING_FILE)
    before = [number for number in kept if number <= step]
    if before:
        return before[-1], folder.checkpoint(before[-1])
    if plan.init:
        raise ModelError(
            f"{folder.uri}: no checkpoint at or before step {step} is left (kept: "
            f"{', '.join(map(str, kept)) or 'none'}); choose a later step, or keep more with "
            "runtime.num_checkpoints_to_keep"
        )
    return 0, ""
