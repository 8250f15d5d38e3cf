"""Measures what a plan would otherwise assume, on the machine at hand and through the project's own step and reader."""

import math
import os
import statistics
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bit_ray.planning import costs
from bit_ray.planning.config import ClusterPlanConfig
from bit_ray.planning.inputs import Assumption, Inputs
from bit_ray.planning.ranges import Range

if TYPE_CHECKING:
    from bit_ray.training.plan import TrainPlan

_ROUNDS = 3
_SECONDS = 2.0
# A machine's other work comes and goes.
_SECONDS_OF_STEPS = 6.0
_NICENESS = 15  # of Ray's workers, by default


@dataclass(frozen=True)
class _Measured:
    range: Range
    source: str


def calibrated(config: ClusterPlanConfig, inputs: Inputs) -> Inputs:
    """Return the inputs with measured numbers instead of assumed ones.

    A step is measured unless the configuration names a GPU, reading and decoding if it names shards. The interval of a
    step is that of the steps measured, and of what they would take without the CPU's other work; the others' that of
    three rounds.

    Raises:
        BitRayError: The shard set cannot be read, or no image of it decoded.
    """
    new: dict[str, Assumption] = {}
    if not config.gpu:
        inputs, step = _step(config, inputs)
        new["step, per image"] = Assumption(
            name="step, per image", value=step.range, unit="ms", scale=1e3, source=step.source
        )
        inputs = replace(inputs, step_s=step.range)
        if not config.failures.restart_s:
            inputs = replace(inputs, restart_s=costs.RESTART_HERE_S)
            new["start, and restart"] = Assumption(
                name="start, and restart",
                value=costs.RESTART_HERE_S,
                unit="s",
                source="benchmarks/elastic.py, two cores",
            )
        new |= {
            name: Assumption(name=name, value=Range.exactly(value), unit=unit, source=source)
            for name, value, unit, source in (
                ("cores of a node", inputs.node.cores, "", "this machine" if not config.node.cores else "given"),
                (
                    "network of a node",
                    inputs.node.network_gbits,
                    "Gbit/s",
                    "given" if config.node.network_gbits else "assumed",
                ),
            )
        }
    if config.shards:
        view, read = _data(config)
        new["CPU time of a view"] = Assumption(
            name="CPU time of a view", value=view.range, unit="ms", scale=1e3, source=view.source
        )
        link = Range.exactly(inputs.node.storage_gbits / 8 * 1e9)
        inputs = replace(inputs, view_s=view.range, read_bytes_per_s=read.range.times(inputs.node.gpus).least(link))
        new["a reader"] = Assumption(
            name="a reader", value=read.range, unit="MB/s", scale=1e-6, source=f"{read.source}; one for each device"
        )
    kept = [new.pop(known.name, known) for known in inputs.assumptions]
    return replace(inputs, assumptions=(*new.values(), *kept))


def _step(config: ClusterPlanConfig, inputs: Inputs) -> tuple[Inputs, _Measured]:
    """Train some steps; return the inputs with this machine as the node, and the seconds of an image."""
    import torch

    from bit_ray.cluster.slots import num_local_cores
    from bit_ray.training.device import keep_freed_memory
    from bit_ray.training.estimate import measure_speed

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        keep_freed_memory()  # as a worker does
    found = torch.cuda.device_count() if device == "cuda" else max(1, num_local_cores())
    node = replace(
        inputs.node,
        gpus=min(config.node.gpus or found, config.gpus),
        cores=config.node.cores or num_local_cores(),
    )
    share = math.ceil(inputs.batch_size / config.gpus)
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        room = 0.8 * free - 12 * inputs.network.num_parameters(inputs.num_classes)
        share = max(1, min(share, int(room / (inputs.network.kept * 1e6 * 2 * 1.6))))
    plan = _train_plan(config, inputs)
    with ThreadPoolExecutor(1, initializer=_yield_as_workers_do) as thread:
        speed = thread.submit(measure_speed, plan, "auto", device, share, seconds=_SECONDS_OF_STEPS).result()
    likely = 1 / speed.images_per_s
    seconds = Range(min(1 / speed.fastest, likely * (1 - speed.busy)), likely, 1 / speed.slowest)
    return replace(inputs, node=node, on_cpu=device == "cpu", busy=speed.busy), _Measured(seconds, speed.how)


def _yield_as_workers_do() -> None:
    """Give this thread the priority of Ray's workers, which get a small share of the cores when there is other work."""
    with suppress(OSError, AttributeError):  # not on every system
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


def _train_plan(config: ClusterPlanConfig, inputs: Inputs) -> "TrainPlan":
    from bit_ray.data.images.views import TrainView
    from bit_ray.recipes.schedules import Schedule
    from bit_ray.recipes.upstream import RECIPES
    from bit_ray.training.plan import TrainPlan

    recipe = RECIPES[config.recipe]()
    return TrainPlan(
        kind="pretrain",
        model=config.model,
        num_classes=inputs.num_classes,
        manifest_digest="",
        num_examples=inputs.num_images,
        view=TrainView(crop="inception", crop_size=config.crop_size),
        resize_mode="shorter_side",
        resize_size=config.crop_size,
        loss="softmax" if recipe.loss == "softmax" else "sigmoid",
        schedule=Schedule(base_lr=1e-3, num_steps=1000),
        global_batch_size=inputs.batch_size,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )


def _data(config: ClusterPlanConfig) -> tuple[_Measured, _Measured]:
    """Seconds of a core per view, and bytes a second of one reader."""
    from bit_ray.data.images.views import TrainView
    from bit_ray.data.shards.manifest import read_manifest
    from bit_ray.data.stream.bench import measure_decoding, measure_reading
    from bit_ray.data.stream.settings import CacheConfig
    from bit_ray.locks import scratch_directory

    manifest = read_manifest(config.shards)
    view = TrainView(crop="inception", crop_size=config.crop_size)
    rates, costs = [], []
    with scratch_directory() as directory:
        for seed in range(_ROUNDS):
            cache = CacheConfig(directory=f"{directory}/{seed}")
            _, num_bytes, seconds, sample = measure_reading(config.shards, manifest, cache, _SECONDS / _ROUNDS, seed)
            rates.append(num_bytes / seconds)
            paths, _, _, cpu = measure_decoding(sample, view, manifest.convert_images, _SECONDS / _ROUNDS, seed)
            costs.append(cpu / sum(paths.values()))
    return (
        _Measured(_spread(costs), "measured: one thread, from memory"),
        _Measured(_spread(rates), "measured: new row groups"),
    )


def _spread(values: list[float]) -> Range:
    return Range(min(values), statistics.median(values), max(values))
