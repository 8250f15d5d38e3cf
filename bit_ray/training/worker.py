"""The function that runs in each Ray Train worker: the order of steps of a training run, and nothing else."""

import math
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from bit_ray import log_lines
from bit_ray.cluster.slots import num_local_cores
from bit_ray.data.images.decode_view import DECODER
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.stream.batches import StreamCounts, StreamSpec, batches, give_manifest
from bit_ray.data.stream.history import StreamPlan, uses_in_step
from bit_ray.errors import BitRayError, ModelError
from bit_ray.run_folder import RunFolder
from bit_ray.run_records import LeftOut, Start
from bit_ray.tracking.identity import check_code, code_digest
from bit_ray.tracking.system import system_metrics
from bit_ray.training.agreement import Agreement
from bit_ray.training.checkpoint.directory import write_directory
from bit_ray.training.checkpoint.sharded import Parts
from bit_ray.training.checkpoint.state import Position, Report, fetched, load_checkpoint
from bit_ray.training.checkpoint.writer import CheckpointWriter
from bit_ray.training.collectives import write_collectives
from bit_ray.training.config import Runtime
from bit_ray.training.device import keep_freed_memory, peak_flops
from bit_ray.training.estimate import training_flops
from bit_ray.training.healing import DivergedError, GoBackError, Healer, NonFiniteError
from bit_ray.training.learner import Learner
from bit_ray.training.messages import Messages, SignsOfLife
from bit_ray.training.optimizer import kernel_norm
from bit_ray.training.parts import merged
from bit_ray.training.plan import TrainPlan
from bit_ray.training.quarantine import Quarantine
from bit_ray.training.sharding import whole
from bit_ray.training.shares import share_out
from bit_ray.weights.package import ModelSpec, write_package


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """What the driver passes to every worker."""

    plan: TrainPlan
    runtime: Runtime
    spec: ModelSpec
    """Saved next to the weights."""
    shards: str
    """URI of the training shards."""
    manifest: Any
    """Ray object reference to their manifest: it comes to each node once, not from the store to each worker."""
    folder: RunFolder
    """Folder of the run's files."""
    init_weights: Any = None
    """Ray object reference to the initial tensors by name, or None to start from scratch."""
    messages: Messages
    """How driver and workers tell each other things."""
    attempt: int = 1
    """Number of this group of workers."""
    first_step: int = 0
    """Steps of the checkpoint to continue from; 0: begin."""
    left_out: tuple[LeftOut, ...] = ()
    """Batches that the run does not train on."""
    milestones: tuple[int, ...] = ()
    """Steps after which the weights are also written into the folder, for a study to measure."""


def train_worker(config: dict[str, WorkerConfig]) -> None:
    """Train from the given checkpoint until the plan's last step, or until the driver wants the workers to leave."""
    worker = config["worker"]
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    log_lines.mark_records()
    log_lines.about(run=worker.folder.name, attempt=worker.attempt, rank=rank, step=worker.first_step)
    name = f"worker {rank} on {ray.util.get_node_ip_address()}"
    check_code(name)
    # Not to sys.stdout: Ray Train passes on twice what is printed there.
    print(f"{name}: bit_ray {code_digest()}, {DECODER} decoder", file=sys.__stdout__, flush=True)
    signs = SignsOfLife(
        worker.messages,
        worker.attempt,
        rank,
        num_workers,
        worker.first_step,
        on_stall=partial(write_collectives, worker.folder.collectives(worker.attempt, rank)),
    )
    signs.start()
    try:
        _train(worker, signs)
    finally:
        signs.end()


def _train(worker: WorkerConfig, signs: SignsOfLife) -> None:
    plan, runtime = worker.plan, worker.runtime
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    else:
        keep_freed_memory()
    healer = Healer(runtime.heal, worker.left_out) if runtime.heal or worker.left_out else None
    # Rank 0 has the weights; the others get them from it.
    needs_init = worker.init_weights is not None and rank == 0
    learner = Learner(
        plan,
        device,
        precision=runtime.precision,
        init_weights=ray.get(worker.init_weights) if needs_init else None,
        micro_batch_size=runtime.micro_batch_size,
        rank=rank,
        num_workers=num_workers,
        healer=healer,
        sharded=runtime.sharding == "fsdp" and num_workers > 1,
    )
    saves = rank == 0 or learner.sharded
    position = Position()
    if worker.first_step:
        with fetched(worker.folder.checkpoint(worker.first_step)) as directory:
            position = load_checkpoint(directory, learner.model, learner.optimizer, plan)
    if healer is not None:
        healer.remember(position.recent)
    agreement = Agreement(num_workers)
    learner.wrap(distributed=num_workers > 1, compile=runtime.compile)
    if rank == 0:
        worker.folder.record_start(
            Start(
                first_step=position.next_step,
                device="cuda" if device.type == "cuda" else "cpu",
                precision="bf16" if learner.dtype == torch.bfloat16 else "fp32",
                num_workers=num_workers,
                micro_batch_size=share_out(
                    plan, replace(runtime, micro_batch_size=learner.micro_batch_size), num_workers
                )[1],
            )
        )

    give_manifest(worker.shards, ray.get(worker.manifest))
    stream = StreamSpec(
        shards=worker.shards,
        manifest_digest=plan.manifest_digest,
        global_batch_size=plan.global_batch_size,
        slots=learner.slots,
        start_step=position.next_step,
        stop_step=plan.schedule.num_steps,
        seed=plan.seed,
        shuffle=plan.shuffle,
        view=plan.view,
        cache=runtime.cache,
    )

    quarantine = Quarantine(position.bad_images, runtime.bad_images_allowed(plan.num_examples), worker.shards)
    counts = StreamCounts()
    writer = CheckpointWriter(
        worker.folder,
        worker.spec,
        lambda step: worker.messages.send({"checkpoint": step}) if rank == 0 else None,
        Parts(rank, num_workers) if learner.sharded else None,
    )

    def now(next_step: int) -> Position:
        return Position(
            next_step=next_step,
            train_s=position.train_s + time.perf_counter() - started,
            bad_images=quarantine.known,
            recent=healer.recent if healer is not None else (),
            unrecorded=tuple(report for report in reported if report.step > signs.recorded),
        )

    peak = peak_flops(device, learner.dtype, runtime.peak_tflops) if rank == 0 else 0.0
    flops_per_image = training_flops(plan) if peak else 0.0
    started = mark = saved_at = time.perf_counter()
    waited, steps_since, loss_since = 0.0, 0, torch.zeros((), device=device)
    owed_log = owed_save = False
    reported: list[Report] = []  # since the driver recorded something
    wait_from = started
    signs.at(position.next_step, "waiting for data")
    for step, images, rows, _, bad in batches(
        stream,
        num_readers=runtime.num_readers,
        num_threads=runtime.num_decode_threads or max(1, num_local_cores() // context.get_local_world_size()),
        pin_memory=device.type == "cuda",
        counts=counts,
    ):
        waited += time.perf_counter() - wait_from
        signs.at(step, "computing")
        quarantine.meet(bad)
        try:
            loss, grad_norm = learner.step(step, images, learner.targets(rows))
            loss_since += loss
            steps_since += 1
            done = step + 1
            last = done == plan.schedule.num_steps
            writer.check()
            overdue = rank == 0 and 0 < runtime.checkpoint_every_s <= time.perf_counter() - saved_at
            leave, save = agreement.exchange(bool(signs.leave), overdue)
            save = owed_save or save or leave or last or done % runtime.checkpoint_every_steps == 0
            is_milestone = done in worker.milestones
            log = owed_log or save or is_milestone or done % runtime.log_every_steps == 0
            if log:
                learner.check()
                # Overflowed weights make the next step fail, and must not be saved in a checkpoint before that.
                weight_norm = kernel_norm(learner.optimizer)
                broken = not math.isfinite(weight_norm)
                waits = False
                if healer is not None:
                    if last or is_milestone:
                        healer.decide()
                    else:  # whether a checkpoint would be sound is known at the next step that is applied
                        waits = broken or healer.undecided or step in healer.left_out
                if broken and not waits:
                    raise NonFiniteError(done)
                owed_log, owed_save = waits, waits and save
                if waits:
                    log = save = leave = False
        except GoBackError as error:
            agreement.finish()
            writer.finish()
            if rank == 0:
                ray.get(worker.messages.send({"left_out": _with_images(error.blamed, worker)}))
            return  # the driver starts the next attempt behind it
        except DivergedError as error:
            place = worker.folder.nonfinite(error.step)
            if saves:
                writer.save(learner, now(error.step), {}, wait=True, place=place)
            if num_workers > 1:
                dist.barrier()  # all raise at the same step, and the first to leave ends the others
            raise ModelError(
                f"{error} with bit-ray shards ids {worker.shards} --run {worker.folder.uri} --step {error.step}; "
                f"checkpoint: {place}"
            ) from None
        for entry in healer.take_news() if healer is not None else ():
            if rank == 0:
                entry = _with_images(entry, worker)
                worker.folder.leave_out(entry)
                worker.messages.send({"left_out": entry})
        if log:
            quarantine.share(device)
            if num_workers > 1:
                dist.all_reduce(loss_since)
            elapsed = time.perf_counter() - mark
            num_kept = healer.num_kept(done - steps_since, done) if healer is not None else steps_since
            metrics: dict[str, Any] = {
                "step": done,
                "num_steps": plan.schedule.num_steps,
                "train/loss": loss_since.item() / max(1, num_kept),
                "train/lr": plan.schedule.lr_at(step),
                "train/grad_norm": grad_norm.item(),
                "train/weight_norm": weight_norm,
                "train/images_seen": done * plan.global_batch_size,
                "train/epoch": done * plan.global_batch_size / plan.num_examples,
                "speed/step_s": elapsed / steps_since,
                "speed/images_per_s": steps_since * plan.global_batch_size / elapsed,
                "speed/wait_share": waited / elapsed,
            }
            if rank == 0:
                metrics |= _data_metrics(counts, len(quarantine.known)) | system_metrics()
                metrics |= {
                    "checkpoint/stall_s": writer.stall_s,
                    "checkpoint/write_s": writer.write_s,
                    "checkpoint/skipped": writer.num_skipped,
                }
                if peak:
                    used = flops_per_image * metrics["speed/images_per_s"]
                    metrics |= {
                        "speed/tflops_per_worker": used / num_workers / 1e12,
                        "speed/mfu": used / num_workers / peak,
                    }
            numbers = {name: float(value) for name, value in metrics.items() if "/" in name}
            if rank == 0:
                about = {"attempt": worker.attempt, "num_new_steps": steps_since, "seconds": elapsed}
                worker.messages.send({**metrics, **about, "bad_images": quarantine.take_unreported()})
                reported = [report for report in reported if report.step > signs.recorded]
                if all(map(math.isfinite, numbers.values())):  # as records must be
                    reported.append(Report(step=done, metrics=numbers))
            if is_milestone and saves:
                weights = {name: whole(tensor).cpu() for name, tensor in merged(learner.model).state_dict().items()}
                if rank == 0:
                    write = partial(write_package, model=weights, spec=worker.spec)
                    write_directory(worker.folder.milestone(done), write)
            if save and saves:
                signs.at(done, "saving")
                writer.save(learner, now(done), numbers, wait=last or leave)
            if save:
                saved_at = time.perf_counter()
            mark, waited, steps_since = time.perf_counter(), 0.0, 0
            loss_since.zero_()
            if leave:
                break
        signs.at(done, "waiting for data")
        wait_from = time.perf_counter()
    agreement.finish()
    writer.finish()
    if rank == 0:
        ray.get(worker.messages.send({"checkpoint": done}))  # arrives after all others
    signs.at(done, "done")


def _with_images(entry: LeftOut, worker: WorkerConfig) -> LeftOut:
    """Return the entry with the ids of its images, if all of them can be read."""
    plan = worker.plan
    stream = StreamPlan(seed=plan.seed, global_batch_size=plan.global_batch_size, view={}, shuffle=plan.shuffle)
    try:
        uses = uses_in_step(worker.shards, read_manifest(worker.shards), stream, entry.step)
    except BitRayError:
        return entry  # the run need not end for it; `bit-ray shards ids` says them later
    return replace(entry, images=tuple(use.id for use in uses))


def _data_metrics(counts: StreamCounts, num_bad: int) -> dict[str, float]:
    """Metrics of this worker's data reading so far."""
    decoded = sum(counts.decoded.values())
    metrics = {
        "data/bad_images": num_bad,
        "data/fast_decode_share": 1 - counts.decoded.get("full", 0) / max(1, decoded),
    }
    if counts.fetched_bytes:
        metrics["data/fetched_mb"] = counts.fetched_bytes / 1e6
        metrics["data/cache_hit_share"] = counts.row_groups_on_node / counts.row_groups
    return metrics
