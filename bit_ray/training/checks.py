"""Checks before a run: print the resolved plan, and find what would fail later."""

import os
from contextlib import nullcontext

import torch

from bit_ray import store
from bit_ray.cluster.session import cluster
from bit_ray.cluster.slots import Resources, choose_workers, num_local_cores
from bit_ray.data.shards.manifest import Manifest
from bit_ray.errors import ConfigError, DataError
from bit_ray.models.zoo import model_config
from bit_ray.progress import console, print_table
from bit_ray.tracking.reference import check_package_uri
from bit_ray.tracking.registry import check_name
from bit_ray.training.config import FinetuneConfig, PretrainConfig, Runtime
from bit_ray.training.dry_run import describe, worker_speed
from bit_ray.training.memory import with_room
from bit_ray.training.plan import TrainPlan
from bit_ray.training.shares import share_out

_MOST_SHARDS_LOOKED_AT = 1000


def check_registration(config: PretrainConfig | FinetuneConfig) -> None:
    """Refuse a name, an alias or a storage with which the finished model could not be registered.

    Raises:
        ConfigError: It is refused.
    """
    try:
        check_name(config.register.name or config.name, config.register.alias)
    except ConfigError as error:
        raise error.under("register" if config.register.name or error.field == "alias" else "") from None
    check_package_uri(store.absolute(config.storage), "storage")


def check_settings(plan: TrainPlan, runtime: Runtime) -> None:
    """Find what would fail later, using only the settings.

    Raises:
        ConfigError: There is no such network, or the batch cannot be shared out.
    """
    model_config(plan.model, plan.num_classes)
    if most := runtime.workers[1]:
        share_out(plan, runtime, most)


def preflight(
    plan: TrainPlan, shards: str, manifest: Manifest, runtime: Runtime, *, dry_run: bool, subset: str = ""
) -> bool:
    """Find what would fail later, and for a dry run print the plan.

    Args:
        plan: What is to be learned.
        shards: URI of the training shards.
        manifest: Their manifest.
        runtime: How it is carried out.
        dry_run: Print the plan, and an estimate of its time from some of its steps.
        subset: For a dry run: what is drawn from the shards, if the run does not train on all of them.

    Returns:
        Whether to go on.

    Raises:
        BitRayError: There is no such network, the batch cannot be shared out, or more images than the run may leave
            out are in shards that are missing or cut short.
    """
    check_settings(plan, runtime)
    # Every shard of a small set is checked; of a very large one, enough to find a wrong path or a lost folder.
    checked = manifest.shards[:: -(-len(manifest.shards) // _MOST_SHARDS_LOOKED_AT)]
    sizes = store.file_sizes([store.join(shards, shard.path) for shard in checked])
    wrong = [(shard, size) for shard, size in zip(checked, sizes, strict=True) if size != shard.num_bytes]
    if wrong:
        shard, size = wrong[0]
        found = "missing" if size is None else f"{size:,} bytes"
        lost, allowed = sum(s.num_examples for s, _ in wrong), runtime.bad_images_allowed(manifest.num_examples)
        text = (
            f"{store.join(shards, shard.path)}: {found}; accepted: {shard.num_bytes:,} bytes, as in the manifest; "
            f"run bit-ray shards verify {shards}, and restore the shard or write the set again"
        )
        if lost > allowed:
            raise DataError(text)
        console.print(f"warning: {text}; {lost:,} images are left out, runtime.max_bad_images allows {allowed:,}")
    if dry_run:
        here = Resources(1, 2 * num_local_cores() + 1, torch.cuda.device_count(), local=True)
        with cluster() if os.environ.get("RAY_ADDRESS") else nullcontext(here) as resources:
            workers = choose_workers(
                resources, plan.global_batch_size, num_workers=runtime.workers, device=runtime.device
            )
            runtime = with_room(plan, runtime, workers, local=resources.local)
            # A node is not bought for a dry run.
            there = resources.num_gpus if workers.use_gpu else resources.num_cpus
            speed = worker_speed(plan, runtime, workers.most, workers.use_gpu, local=resources.local) if there else None
        print_table("Plan", describe(plan, runtime, manifest, workers, speed, subset))
    return not dry_run
