"""``bit-ray plan``: what a pre-training on a cluster takes, without a cluster."""

import math
from typing import TYPE_CHECKING

from bit_ray.planning.config import ClusterPlanConfig
from bit_ray.planning.ranges import Range
from bit_ray.progress import console, print_table

if TYPE_CHECKING:
    from bit_ray.planning.forecast import Forecast

_BUSY = 0.1  # share of a core, from which a calibration is doubted


def plan(config: ClusterPlanConfig) -> None:
    """Print the forecast, and every number that it stands on."""
    from bit_ray.planning.forecast import forecast
    from bit_ray.planning.inputs import inputs_of

    if config.run:
        _check_run(config.run)
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


def _check_run(run: str) -> None:
    """Refuse a run that has begun, before anything is measured.

    Raises:
        ConfigError: It has.
    """
    from bit_ray import store
    from bit_ray.errors import ConfigError
    from bit_ray.run_folder import RunFolder

    if store.exists(RunFolder(store.absolute(run)).plan):
        raise ConfigError.of("run", f"{run} has begun", "the folder of a run to come", "choose another name")


def _record(config: ClusterPlanConfig, found: "Forecast") -> None:
    """Leave the plan in the folder of its run.

    Raises:
        ConfigError: It may never end.
    """
    from bit_ray import store
    from bit_ray.config import to_dict
    from bit_ray.errors import ConfigError
    from bit_ray.run_folder import RunFolder
    from bit_ray.run_records import PlannedTime

    if math.isinf(found.total_s.high):
        given = "this plan may never end: failures cost more than is trained"
        raise ConfigError.of("run", given, remedy="lower failures.checkpoint-every-s, or plan with fewer GPUs")
    time = PlannedTime(
        seconds=found.total_s.likely,
        low=found.total_s.low,
        high=found.total_s.high,
        source="bit-ray plan " + ("--calibrate" if config.calibrate else f"--gpu {config.gpu}"),
    )
    store.write_json(RunFolder(store.absolute(config.run)).planned_file, to_dict(time))


def _rows(config: ClusterPlanConfig, found: "Forecast") -> list[tuple[str, str]]:
    inputs, node, gpus = found.inputs, found.inputs.node, config.gpus
    flops = Range.exactly(inputs.network.flops(inputs.num_classes))
    parameters = inputs.network.num_parameters(inputs.num_classes)
    rows = [
        ("network", f"{flops.sized('FLOP')} per image, {parameters:,} parameters"),
        (
            "length",
            f"{inputs.num_images:,} images, {inputs.epochs:g} times: {found.num_steps:,} steps of "
            f"{inputs.batch_size:,}",
        ),
        ("nodes", f"{found.num_nodes:,} of {node.gpus} with {node.cores} cores"),
        ("one device", found.device_images_per_s.shown("images/s")),
        ("all of them", f"{found.images_per_s.shown('images/s')}, bound by {found.bound_by}"),
        ("a step", found.step_s.lasting()),
        ("its gradients", f"{found.gradients_s.lasting()} between nodes, most of it during the backward pass"),
        ("no failures", found.train_s.lasting()),
        (
            "failures",
            f"{found.failures.shown()} expected; with checkpoints it takes {found.slowdown.shown()} times as long",
        ),
        ("time", f"{found.total_s.lasting()}, with a start"),
        ("device-hours", found.device_h.shown()),
        *((f"to pay: {name}", money.shown()) for name, money in found.money.items()),
        (
            "decoding",
            f"{found.cores_per_device.shown('cores')} for each device, "
            f"{found.cores_per_device.times(min(node.gpus, gpus)).shown()} of a node's {node.cores}",
        ),
        ("reading", f"{found.read_bytes_per_s.sized('B/s')}, {found.requests_per_s.shown('requests/s')}"),
        ("by each node", found.read_bytes_per_s.times(8 / found.num_nodes).sized("bit/s")),
        ("read in all", f"{found.fetched_bytes.sized('B')}, {found.requests.shown('requests')}"),
        ("cache", f"{found.cache_share:.0%} of a later epoch is on its node"),
        ("shard set", f"{found.set_bytes.sized('B')} in {inputs.num_shards:,} shards"),
        ("checkpoints", f"{found.checkpoints.shown()} of {Range.exactly(found.checkpoint_bytes).sized('B')}"),
        ("best interval", f"{found.best_checkpoint_s.lasting()} between checkpoints would cost least"),
    ]
    if config.gpu:
        from bit_ray.planning.costs import GPUS

        rows.append(
            (
                "memory",
                f"{found.memory_bytes / 1e9:,.0f} of {GPUS[config.gpu].memory_gb:g} GB with "
                f"{-(-inputs.batch_size // gpus):,} images at a time",
            )
        )
    return rows


def _notes(config: ClusterPlanConfig, found: "Forecast") -> list[str]:
    inputs = found.inputs
    notes = [
        "A model, not a measurement: an interval is that of the assumptions above alone. Nodes that are lost are "
        "replaced at once; gradients inside a node cost nothing."
    ]
    if inputs.busy > _BUSY:
        notes.append(
            f"Other work took {inputs.busy:.0%} of the core while the step was measured: what is likely is with "
            "as much of it, the low end without it. Calibrate when nothing else runs."
        )
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
