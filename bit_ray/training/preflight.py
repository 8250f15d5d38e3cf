"""Before a run: how many workers, what the resolved plan looks like, and what would fail later."""

import os
from contextlib import nullcontext

import torch

from bit_ray.cluster import Resources, cluster, num_local_cores
from bit_ray.data import store
from bit_ray.data.manifest import Manifest
from bit_ray.errors import ConfigError, DataError
from bit_ray.models.zoo import PUBLISHED, create_model, model_config
from bit_ray.progress import console, print_table
from bit_ray.training.config import Runtime
from bit_ray.training.plan import TrainPlan, batch_split

_MOST_SHARDS_LOOKED_AT = 1000


def choose_workers(runtime: Runtime, resources: Resources, global_batch_size: int) -> tuple[int, bool]:
    """Number of training workers, and whether each gets a GPU.

    Left to us, it is the most that divide the global batch: one per GPU, or without GPUs one per core of this machine,
    or half the CPUs of a cluster, whose other half then reads and decodes.

    Raises:
        ConfigError: CUDA is asked for and there is none, or no CPU would be left for readers on this machine.
    """
    use_gpu = runtime.device == "cuda" or (runtime.device == "auto" and resources.num_gpus > 0)
    if use_gpu and resources.num_gpus == 0 and resources.local:
        raise ConfigError("runtime.device: cuda, but this machine has no GPU; use auto or cpu")
    if runtime.num_workers:
        if resources.local and not use_gpu and runtime.num_workers >= resources.num_cpus:
            raise ConfigError(
                f"runtime.num_workers: {runtime.num_workers}; "
                f"at most {resources.num_cpus - 1} on this machine; lower it"
            )
        return runtime.num_workers, use_gpu
    if use_gpu:
        most = resources.num_gpus
    else:
        most = num_local_cores() if resources.local else resources.num_cpus // 2
    most = max(1, min(most, global_batch_size))
    return next(n for n in range(most, 0, -1) if global_batch_size % n == 0), use_gpu


def describe(plan: TrainPlan, runtime: Runtime, manifest: Manifest, num_workers: int) -> list[tuple[str, ...]]:
    """The resolved plan as rows for ``--dry-run``.

    Raises:
        ConfigError: The batch does not divide over workers and micro-batches.
    """
    micro, num_micro = batch_split(
        plan.global_batch_size, num_workers, runtime.micro_batch_size, pairs=plan.mixup_alpha > 0
    )
    schedule = plan.schedule
    table = ", ".join(f"{lr:.4g} from step {step:,}" for step, lr in schedule.table())
    saves = -(-schedule.num_steps // runtime.checkpoint_every_steps)
    passes = schedule.num_steps * plan.global_batch_size / plan.num_examples
    known = plan.model in PUBLISHED
    return [
        ("model", f"{plan.model}{'' if known else ' (own size)'}, {_num_parameters(plan):,} parameters"),
        ("weights", plan.init or f"from scratch, seed {plan.seed}"),
        (
            "shards",
            f"{manifest.name}: {manifest.num_examples:,} images of {manifest.num_classes:,} classes in "
            f"{len(manifest.shards):,} shards, {manifest.num_bytes / 1e6:,.1f} MB, digest {plan.manifest_digest[:12]}",
        ),
        (
            "view",
            f"{plan.view.crop}, {plan.view.crop_size} x {plan.view.crop_size} pixels"
            + (", flips" if plan.view.random_flip else "")
            + f"; evaluation: {plan.resize_mode}",
        ),
        ("loss", f"{plan.loss} cross-entropy" + (f", MixUp {plan.mixup_alpha:g}" if plan.mixup_alpha else "")),
        ("length", f"{schedule.num_steps:,} steps of {plan.global_batch_size:,} images, {passes:,.2f} passes"),
        ("learning rate", table),
        (
            "optimizer",
            f"SGD, momentum {plan.momentum:g}, weight decay {plan.weight_decay:g} on kernels"
            + (f", gradient norm at most {plan.clip_norm:g}" if plan.clip_norm else ""),
        ),
        ("batch split", f"{num_workers} workers x {num_micro} micro-batches x {micro} images"),
        ("precision", runtime.precision + (", torch.compile" if runtime.compile else "")),
        ("shuffle", f"{plan.shuffle.num_lanes} lanes x windows of {plan.shuffle.lane_window} images"),
        (
            "checkpoints",
            f"{saves} (every {runtime.checkpoint_every_steps:,} steps and at the end), "
            f"the last {runtime.num_checkpoints_to_keep} are kept",
        ),
        ("plan digest", plan.digest[:12]),
    ]


def _num_parameters(plan: TrainPlan) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in create_model(plan.model, plan.num_classes).parameters())


def preflight(plan: TrainPlan, shards: str, manifest: Manifest, runtime: Runtime, *, dry_run: bool) -> bool:
    """Find what would fail later, and for a dry run print the plan.

    Returns:
        Whether to go on.

    Raises:
        BitRayError: There is no such network, the batch does not divide, or more images than the run may leave out are
            in shards that are missing or cut short.
    """
    model_config(plan.model, plan.num_classes)
    num_workers = runtime.num_workers
    if dry_run:
        here = Resources(1, 2 * num_local_cores() + 1, torch.cuda.device_count(), local=True)
        with cluster() if os.environ.get("RAY_ADDRESS") else nullcontext(here) as resources:
            num_workers, _ = choose_workers(runtime, resources, plan.global_batch_size)
    if num_workers:
        batch_split(plan.global_batch_size, num_workers, runtime.micro_batch_size, pairs=plan.mixup_alpha > 0)
    # Every shard of a small set is looked at; of a very large one, enough to find a wrong place or a lost folder.
    checked = manifest.shards[:: -(-len(manifest.shards) // _MOST_SHARDS_LOOKED_AT)]
    sizes = store.file_sizes([store.join(shards, shard.path) for shard in checked])
    wrong = [(shard, size) for shard, size in zip(checked, sizes, strict=True) if size != shard.num_bytes]
    if wrong:
        shard, size = wrong[0]
        found = "is missing" if size is None else f"has {size:,} bytes, not {shard.num_bytes:,}"
        lost, allowed = sum(s.num_examples for s, _ in wrong), runtime.bad_images_allowed(manifest.num_examples)
        text = (
            f"{store.join(shards, shard.path)}: {found}, against the manifest; "
            f"run bit-ray shards verify {shards}, and write the set again or restore the shard"
        )
        if lost > allowed:
            raise DataError(text)
        console.print(f"warning: {text}; {lost:,} images are left out, runtime.max_bad_images allows {allowed:,}")
    if dry_run:
        print_table("Plan", describe(plan, runtime, manifest, num_workers))
    return not dry_run
