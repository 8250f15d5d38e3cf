"""``bit-ray plan``: what a pre-training on a cluster takes, without a cluster."""

import math
from typing import TYPE_CHECKING

from bit_ray.planning.config import ClusterPlanConfig
from bit_ray.progress import console, print_table

if TYPE_CHECKING:
    from bit_ray.planning.forecast import Forecast


def plan(config: ClusterPlanConfig) -> None:
    """Print the forecast, and every number that it stands on."""
    from bit_ray.planning.forecast import forecast, inputs_of

    inputs = inputs_of(config)
    if config.calibrate:
        from bit_ray.planning.calibrate import calibrated

        inputs = calibrated(config, inputs)
    found = forecast(config, inputs)
    title = f"{config.model} on {config.gpus:,} {config.gpu or 'devices as here'}"
    print_table(title, _rows(config, found))
    assumed = [(a.name, a.value.shown(a.unit, a.scale), a.source) for a in inputs.assumptions]
    print_table("From", assumed, ("what", "likely (interval)", "source"))
    if config.run:
        _record(config, found)
    for note in _notes(config, found):
        console.print(note)


def _record(config: ClusterPlanConfig, found: "Forecast") -> None:
    """Leave the plan in the folder of its run.

    Raises:
        ConfigError: The run has begun.
    """
    from bit_ray import store
    from bit_ray.config import to_dict
    from bit_ray.errors import ConfigError
    from bit_ray.run_folder import PlannedTime, RunFolder

    folder = RunFolder(store.absolute(config.run))
    if store.exists(folder.plan):
        raise ConfigError.of("run", f"{config.run} has begun", "the folder of a run to come", "choose another name")
    if math.isinf(found.total_s.high):
        given = "this plan may never end: failures cost more than is trained"
        raise ConfigError.of("run", given, remedy="lower failures.checkpoint-every-s, or plan with fewer GPUs")
    measured = "--calibrate" if config.calibrate else config.gpu
    time = PlannedTime(
        seconds=found.total_s.likely,
        low=found.total_s.low,
        high=found.total_s.high,
        source=f"bit-ray plan, {measured}, {config.gpus:,} devices",
    )
    store.write_json(folder.planned_file, to_dict(time))


def _rows(config: ClusterPlanConfig, found: "Forecast") -> list[tuple[str, str]]:
    inputs, node, gpus = found.inputs, found.inputs.node, config.gpus
    days = 1 / 86_400
    rows = [
        (
            "network",
            f"{inputs.network.flops(inputs.num_classes) / 1e9:,.1f} GFLOP per image, "
            f"{inputs.network.num_parameters(inputs.num_classes) / 1e6:,.1f} million parameters",
        ),
        (
            "length",
            f"{inputs.num_images:,} images x {inputs.epochs:g} epochs: {found.num_steps:,} steps of "
            f"{inputs.batch_size:,}",
        ),
        ("nodes", f"{found.num_nodes:,} of {node.gpus} with {node.cores} cores"),
        ("a device alone", f"{found.device_images_per_s.shown('images/s')}"),
        ("all together", f"{found.images_per_s.shown('images/s')}, bound by {found.bound_by}"),
        ("a step", found.step_s.shown("s") + f", of it gradients between nodes {found.gradients_s.shown('s')}"),
        ("days, nothing failing", found.train_s.shown(scale=days)),
        (
            "failures",
            f"{found.failures.shown()} expected; with checkpoints they make it {found.slowdown.shown()} times as long",
        ),
        ("days", found.total_s.shown(scale=days)),
        ("device-hours", found.device_h.shown()),
        *((f"to pay: {name}", money.shown()) for name, money in found.money.items()),
        (
            "decoding",
            f"{found.cores_per_device.shown('cores')} for each device, "
            f"{found.cores_per_device.times(min(node.gpus, gpus)).shown()} of a node's {node.cores}",
        ),
        (
            "reading",
            f"{found.read_bytes_per_s.shown('GB/s', 1e-9)}, {found.requests_per_s.shown('requests/s')}; a node "
            f"{found.read_bytes_per_s.times(8 / found.num_nodes).shown('Gbit/s', 1e-9)}",
        ),
        (
            "in the whole run",
            f"{found.fetched_bytes.shown('TB', 1e-12)} in {found.requests.shown('million requests', 1e-6)}; of a later "
            f"epoch {found.cache_share:.0%} is on its node",
        ),
        ("shard set", f"{found.set_bytes.shown('TB', 1e-12)} in {inputs.num_shards:,} shards"),
        (
            "checkpoints",
            f"{found.checkpoints.shown()} of {found.checkpoint_bytes / 1e9:.3g} GB; an interval of "
            f"{found.best_checkpoint_s.shown('s')} would cost least",
        ),
    ]
    if config.gpu:
        from bit_ray.planning.costs import GPUS

        rows.append(
            (
                "memory",
                f"{found.memory_bytes / 1e9:,.0f} GB with {-(-inputs.batch_size // gpus):,} images at a time, "
                f"of {GPUS[config.gpu].memory_gb:g} GB",
            )
        )
    return rows


def _notes(config: ClusterPlanConfig, found: "Forecast") -> list[str]:
    inputs = found.inputs
    notes = [
        "A model, not a measurement: an interval is that of the assumptions above alone. Nodes that are lost are "
        "replaced at once; gradients inside a node cost nothing."
    ]
    if config.gpus > 8 and found.num_nodes > 1:
        notes.append(f"Set --shuffle.num-lanes {config.gpus}, or row groups are read by several nodes.")
    if config.gpu:
        from bit_ray.planning.costs import GPUS

        if found.memory_bytes > 0.9e9 * GPUS[config.gpu].memory_gb:
            notes.append("The share of a GPU does not fit at once: set --runtime.micro-batch-size.")
    if math.isinf(found.total_s.high):
        notes.append("At one end failures cost more than is trained: checkpoint more often, or take fewer nodes.")
    if found.bound_by == "gradients":
        notes.append(
            "Gradients take longer than the backward pass: take fewer GPUs, a larger batch or a faster network."
        )
    if found.bound_by == "decoding":
        notes.append("Decoding is slower than training: write --seekable shards, or take nodes with more cores.")
    if found.bound_by == "reading" and found.cache_share < 1:
        notes.append(f"Reading is slower than training: raise --runtime.cache.max-gb above {inputs.node.cache_gb:g}.")
    return notes
