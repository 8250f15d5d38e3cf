"""Whether a job would run on this cluster, found out in seconds: by its nodes, store and tracker, and by a step.

It runs on the cluster, as a job of its own or as any other driver, with the code that would train. It leaves nothing
behind: no file in the store, no run at the tracker, no actor.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray

from bit_ray import store
from bit_ray.cluster.session import cluster
from bit_ray.cluster.slots import Resources, Workers, choose_workers
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.errors import BitRayError, ConfigError, DataError
from bit_ray.submission.all_reduce import bandwidth
from bit_ray.submission.first_step import FirstStep, first_step
from bit_ray.submission.node_checks import Finding, check_nodes
from bit_ray.submission.nodes import Node
from bit_ray.tracking.address import tracking_uri
from bit_ray.training.checks import check_registration, check_settings, preflight
from bit_ray.training.config import FinetuneConfig, PretrainConfig, Runtime
from bit_ray.training.finetune import check_start, finetune_plan
from bit_ray.training.initial_weights import InitialWeights, read_init
from bit_ray.training.memory import with_room
from bit_ray.training.parts import count_parameters
from bit_ray.training.plan import TrainPlan
from bit_ray.training.pretrain import pretrain_plan
from bit_ray.training.shares import share_out

_LEAST_SHARED_MEMORY = 2**30


@dataclass(frozen=True)
class _Training:
    """A job that trains."""

    plan: TrainPlan
    runtime: Runtime
    shards: str
    init: InitialWeights | None


def check_job(config: Any) -> Iterator[Finding]:
    """Yield what the checks of a job find, one after the other, on the cluster of ``RAY_ADDRESS``.

    Args:
        config: The job's settings.
    """
    training: _Training | None = None
    if isinstance(config, PretrainConfig | FinetuneConfig):
        try:
            training, text = _settings(config)
            yield Finding("settings", "ok", text)
        except BitRayError as error:
            yield Finding("settings", "failed", error)
    with cluster() as resources:
        nodes, findings = check_nodes(config)
        yield from findings
        if training is None:
            return
        runtime = training.runtime
        try:
            workers = _workers(training, resources)
            runtime = with_room(training.plan, runtime, workers, local=resources.local)
            _, micro = share_out(training.plan, runtime, workers.most)
        except BitRayError as error:
            yield Finding("workers", "failed", error)
            return
        number = f"{workers.most}" if workers.least == workers.most else f"{workers.least} to {workers.most}"
        device = "a GPU" if workers.use_gpu else "a CPU"
        yield Finding("workers", "ok", f"{number}, each with {device}; at most {micro} images at a time")
        yield from _room(training, workers, nodes)
        trainers = [node for node in nodes if (node.num_gpus if workers.use_gpu else node.num_cpus) >= 1]
        yield _all_reduce(training.plan, trainers, workers)
        if not trainers:
            yield Finding("first step", "warning", "not tried: no node is there yet, an autoscaler will add it")
            return
        yield from _first_step(training, runtime, workers, nodes)


def _settings(config: PretrainConfig | FinetuneConfig) -> tuple[_Training, str]:
    check_registration(config)
    manifest = read_manifest(config.shards)
    init = None
    if isinstance(config, PretrainConfig):
        plan = pretrain_plan(config, manifest)
    else:
        if config.init:
            init = read_init(config.init, tracking_uri(config.tracking.uri, config.storage))
        check_start(config, init)
        number = config.shots * manifest.num_classes if config.shots else manifest.num_examples
        plan = finetune_plan(config, manifest, init, number)
    check_settings(plan, config.runtime)
    preflight(plan, config.shards, manifest, config.runtime, dry_run=False)
    text = (
        f"{plan.model}, {plan.schedule.num_steps:,} steps of {plan.global_batch_size:,} images; {manifest.name}: "
        f"{manifest.num_examples:,} images in {len(manifest.shards):,} shards"
    )
    return _Training(plan, config.runtime, config.shards, init), text


def _workers(training: _Training, resources: Resources) -> Workers:
    """Return the workers that the run would have.

    Raises:
        ConfigError: There will never be room for the least number of them.
    """
    runtime = training.runtime
    workers = choose_workers(
        resources, training.plan.global_batch_size, num_workers=runtime.workers, device=runtime.device
    )
    kind, now, later = (
        ("GPU", resources.num_gpus, resources.num_gpus_later)
        if workers.use_gpu
        else ("CPU", resources.num_cpus, resources.num_cpus_later)
    )
    most = max(now, later)
    grows = "and no autoscaler that adds any" if not later else f"and at most {later} with all nodes that it may add"
    if most == 0:
        given = f"{runtime.device}, but the cluster has no {kind} {grows}"
        raise ConfigError.of("runtime.device", given, "cpu, or nodes with GPUs", f"add {kind} nodes")
    if workers.least > most:
        given = f"{runtime.num_workers}, but the cluster has {now} {kind}s {grows}"
        raise ConfigError.of("runtime.num_workers", given, f"at most {most}", "lower it, or add nodes")
    return workers


def _room(training: _Training, workers: Workers, nodes: Sequence[Node]) -> Iterator[Finding]:
    """Yield what is said of lanes, disks and shared memory."""
    lanes = training.plan.shuffle.num_lanes
    if workers.most > lanes:
        advice = 1 << math.ceil(math.log2(2 * workers.most))
        text = (
            f"{lanes} for {workers.most} workers: each row group is read up to {-(-workers.most // lanes)} times; "
            f"start with --shuffle.num-lanes {advice}, as it cannot change later"
        )
        yield Finding("lanes", "warning", text)
    else:
        yield Finding("lanes", "ok", f"{lanes} for at most {workers.most} workers")
    wanted = training.runtime.cache.max_gb * 1e9
    if store.is_local(training.shards):
        wanted = 0.0
    else:
        wanted = min(wanted, read_manifest(training.shards).num_bytes)
    small = [node for node in nodes if node.free_disk < wanted]
    least = min((node.free_disk for node in nodes), default=0)
    if small:
        text = (
            f"{least / 1e9:,.1f} GB free on {small[0].address}, less than the {wanted / 1e9:,.1f} GB to keep; "
            "name a larger disk with --runtime.cache.directory, or lower --runtime.cache.max-gb"
        )
        yield Finding("disk", "warning", text)
    else:
        yield Finding("disk", "ok", f"{least / 1e9:,.1f} GB free, {wanted / 1e9:,.1f} GB wanted")
    shared = min(nodes, key=lambda node: node.shared_memory, default=None)
    if shared is not None:
        text = f"{shared.shared_memory / 1e9:,.1f} GB"
        if shared.shared_memory < _LEAST_SHARED_MEMORY:
            text += f" on {shared.address}: Ray and NCCL need more; run the container with --shm-size=8g"
        state: Literal["ok", "warning"] = "warning" if shared.shared_memory < _LEAST_SHARED_MEMORY else "ok"
        yield Finding("/dev/shm", state, text)


def _all_reduce(plan: TrainPlan, nodes: Sequence[Node], workers: Workers) -> Finding:
    if len(nodes) < 2 or workers.most < 2:
        return Finding(
            "all-reduce", "ok", f"not needed: {len(nodes)} nodes can train now, {workers.most} workers at most"
        )
    try:
        speed = bandwidth(nodes, use_gpu=workers.use_gpu)
    except BitRayError as error:
        return Finding("all-reduce", "failed", error)
    gradients = 4 * count_parameters(plan.model, plan.num_classes, plan.train)[0]
    seconds = 2 * (len(nodes) - 1) / len(nodes) * gradients / speed
    backend = "NCCL" if workers.use_gpu else "gloo"
    text = (
        f"{speed / 1e9:,.2f} GB/s between {len(nodes)} nodes by {backend}; the gradients of a step, "
        f"{gradients / 1e6:,.1f} MB, take {1e3 * seconds:,.3g} ms"
    )
    return Finding("all-reduce", "ok", text)


def _first_step(training: _Training, runtime: Runtime, workers: Workers, nodes: Sequence[Node]) -> Iterator[Finding]:
    weights = ray.put(dict(training.init.tensors)) if training.init is not None else None
    try:
        found = first_step(
            training.plan,
            runtime,
            training.shards,
            num_workers=workers.most,
            use_gpu=workers.use_gpu,
            init_weights=weights,
        )
    except BitRayError as error:
        yield Finding("first step", "failed", error)
        return
    text = (
        f"loss {found.loss:.4g} of {found.num_images} images, read in {found.read_s:.1f} s; then "
        f"{found.images_per_s:,.3g} images/s on {found.device}"
    )
    yield Finding("first step", "ok" if math.isfinite(found.loss) else "failed", _finite(found, text))
    yield _cores(found, workers, nodes)


def _finite(found: FirstStep, text: str) -> str | BitRayError:
    if math.isfinite(found.loss):
        return text
    return DataError(f"the loss is {found.loss}; lower the learning rate, or look at the images")


def _cores(found: FirstStep, workers: Workers, nodes: Sequence[Node]) -> Finding:
    """Compare a node's cores with what its workers need to decode as fast as they train."""
    each = found.images_per_s / found.decoded_per_s
    short = None
    for node in nodes:
        cores = min(node.num_cores, int(node.num_cpus))  # a container sees the cores of its machine, Ray its limit
        if workers.use_gpu:
            number = int(node.num_gpus)
        else:
            number = min(int(node.num_cpus), -(-workers.most // max(1, len(nodes))))
        needed = number * (each if workers.use_gpu else 1 + each)
        if needed > cores and (short is None or needed > short[1]):
            short = node, needed, number, cores
    rates = f"a core decodes {found.decoded_per_s:,.3g} images/s, a worker trains {found.images_per_s:,.3g}"
    if short is None:
        return Finding("CPUs", "ok", rates)
    node, needed, number, cores = short
    text = (
        f"{rates}: for {number} of them {node.address} needs {math.ceil(needed)} cores, it has {cores}; they "
        "will wait for images; take nodes with more cores, or write the shards with --shorter-side and --seekable"
    )
    return Finding("CPUs", "warning", text)
