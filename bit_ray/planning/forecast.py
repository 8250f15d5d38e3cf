"""What a pre-training on a cluster takes: days, money, network, storage, cores, checkpoints, failures.

A model, not a measurement: each number comes from the costs and assumptions in `bit_ray.planning.costs`, or from what
`bit_ray.planning.calibrate` has measured instead, and has their interval.
"""

import math
from dataclasses import dataclass

from bit_ray.planning import costs
from bit_ray.planning.config import ClusterPlanConfig
from bit_ray.planning.failures import best_interval, slowdown
from bit_ray.planning.inputs import Inputs
from bit_ray.planning.ranges import Range, as_range
from bit_ray.recipes.schedules import epochs_to_steps

_DAY_S = 86_400.0
_GRADIENT_BYTES = 4
_STATE_BYTES = 8
"""Of a parameter in a checkpoint: weight and momentum."""
_BACKWARD_SHARE = 2 / 3
"""Of a step, during which gradients are summed as they come."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What the training takes; seconds, bytes and counts unless said otherwise."""

    inputs: Inputs
    num_nodes: int
    num_steps: int
    images_in_all: float
    device_images_per_s: Range
    """Of a GPU that never waits."""
    images_per_s: Range
    """Of the whole cluster, while nothing fails."""
    bound_by: str
    """What limits it: computing, gradients, decoding or reading."""
    step_s: Range
    gradients_s: Range
    """Seconds of a step that summing gradients takes, most of it while the backward pass goes on."""
    train_s: Range
    """All steps, while nothing fails."""
    failures: Range
    """Expected number in the whole run."""
    slowdown: Range
    """How many times as long it takes with failures and checkpoints."""
    total_s: Range
    device_h: Range
    cores_per_device: Range
    """Cores that decode as fast as a device trains."""
    read_bytes_per_s: Range
    """Of the whole cluster at the speed of training, before any cache."""
    cache_share: float
    """Of row groups that are found on their node in later epochs."""
    fetched_bytes: Range
    """From the object store in the whole run."""
    requests: Range
    requests_per_s: Range
    set_bytes: Range
    checkpoint_bytes: float
    checkpoints: Range
    best_checkpoint_s: Range
    """Seconds between checkpoints that would cost least."""
    memory_bytes: float
    """Of a GPU with its whole share of a batch at once."""
    money: dict[str, Range]
    """By what is paid for."""


def forecast(config: ClusterPlanConfig, inputs: Inputs) -> Forecast:
    """Work out what the training takes."""
    node, gpus = inputs.node, config.gpus
    num_nodes = math.ceil(gpus / node.gpus)
    num_steps = epochs_to_steps(inputs.epochs, inputs.num_images, inputs.batch_size)
    images_in_all = float(num_steps * inputs.batch_size)
    parameters = inputs.network.num_parameters(inputs.num_classes)

    # A step waits for the GPU with most images, and for its gradients; both in seconds.
    share = math.ceil(inputs.batch_size / gpus)
    compute_s = inputs.step_s.times(share)
    gradients_s = _gradients_s(parameters * _GRADIENT_BYTES, num_nodes, node.network_gbits)
    hidden = compute_s.times(_BACKWARD_SHARE)
    network_step_s = Range(
        max(compute_s.low, gradients_s.low),
        compute_s.likely - hidden.likely + max(hidden.likely, gradients_s.likely),
        compute_s.high + gradients_s.high,
    )

    # What the machines bring to the GPUs, in images per second.
    computing = Range.exactly(inputs.batch_size).over(network_step_s)
    if inputs.on_cpu:  # training and decoding share the cores
        decoding = Range.exactly(node.cores * num_nodes).over(inputs.step_s.plus(inputs.view_s))
    else:
        decoding = Range.exactly(node.cores * num_nodes).over(inputs.view_s)
    link = inputs.read_bytes_per_s or as_range(node.storage_gbits / 8 * 1e9)
    set_bytes = inputs.image_bytes.times(inputs.num_images)
    cache_share = min(1.0, node.cache_gb * 1e9 / set_bytes.likely)
    fetched_share = (1 + (inputs.epochs - 1) * (1 - cache_share)) / inputs.epochs if inputs.epochs > 1 else 1.0
    reading = link.times(num_nodes).over(inputs.image_bytes.times(fetched_share))
    images_per_s = computing.least(decoding).least(reading)
    slowest = min(computing.likely, decoding.likely, reading.likely)
    bound_by = (
        ("gradients" if gradients_s.likely > hidden.likely else "computing")
        if slowest == computing.likely
        else "decoding"
        if slowest == decoding.likely
        else "reading"
    )
    train_s = Range.exactly(images_in_all).over(images_per_s)

    checkpoint_bytes = float(parameters * _STATE_BYTES)
    save_s = Range.exactly(checkpoint_bytes / 1e9).over(costs.COPY_GB_PER_S)
    upload_s = Range.exactly(checkpoint_bytes / 1e9).over(costs.UPLOAD_GB_PER_S)
    interval_s = as_range(config.failures.checkpoint_every_s).most(upload_s)  # one is written at a time
    per_s = Range(
        *(num_nodes / (hours * 3600) for hours in (inputs.mtbf_h.high, inputs.mtbf_h.likely, inputs.mtbf_h.low))
    )
    preempted = config.failures.preemptions_per_day * num_nodes / _DAY_S
    slow = Range(
        *(
            slowdown(
                interval_s=interval_s[i],
                save_s=save_s[i],
                failures_per_s=per_s[i],
                restart_s=inputs.restart_s[i],
                preemptions_per_s=preempted,
            )
            for i in range(3)
        )
    )
    total_s = inputs.restart_s.plus(train_s.times(slow))  # the start takes as long as one more
    device_h = total_s.times(gpus / 3600)

    groups = math.ceil(inputs.num_images / inputs.row_group_size)
    fetches = inputs.epochs * groups * fetched_share
    requests = Range(fetches, 3 * fetches, 3 * fetches) if inputs.num_shards > num_nodes else Range.exactly(fetches)
    fetched = inputs.image_bytes.times(images_in_all * fetched_share)
    money = {}
    if config.price:
        money["devices"] = device_h.times(config.price)
    if config.prices.storage:
        money["storage"] = set_bytes.times(total_s).times(config.prices.storage / 1e9 / (30 * _DAY_S))
    if config.prices.requests:
        money["requests"] = requests.times(config.prices.requests / 1000)
    if config.prices.transfer:
        money["transfer"] = fetched.times(config.prices.transfer / 1e9)
    if len(money) > 1:
        money["in all"] = Range(*(sum(part[i] for part in money.values()) for i in range(3)))
    return Forecast(
        inputs=inputs,
        num_nodes=num_nodes,
        num_steps=num_steps,
        images_in_all=images_in_all,
        device_images_per_s=Range.exactly(1).over(inputs.step_s),
        images_per_s=images_per_s,
        bound_by=bound_by,
        step_s=Range.exactly(inputs.batch_size).over(images_per_s),
        gradients_s=gradients_s,
        train_s=train_s,
        failures=per_s.plus(preempted).times(total_s),
        slowdown=slow,
        total_s=total_s,
        device_h=device_h,
        cores_per_device=inputs.view_s.times(images_per_s).times(1 / gpus),
        read_bytes_per_s=inputs.image_bytes.times(images_per_s),
        cache_share=cache_share,
        fetched_bytes=fetched,
        requests=requests,
        requests_per_s=Range(1, 3, 3).times(images_per_s).times(1 / inputs.row_group_size),
        set_bytes=set_bytes,
        checkpoint_bytes=checkpoint_bytes,
        checkpoints=train_s.over(interval_s),
        best_checkpoint_s=Range(*map(best_interval, save_s, inputs.mtbf_h.times(3600 / num_nodes))),
        memory_bytes=parameters * 12 + share * inputs.network.kept * 1e6 * costs.BYTES * 1.6,
        money=money,
    )


def _gradients_s(num_bytes: float, num_nodes: int, gbits: float) -> Range:
    """Seconds in which nodes sum gradients: each sends and receives nearly twice their bytes (a ring)."""
    if num_nodes == 1:
        return Range.exactly(0.0)
    sent = 2 * (num_nodes - 1) / num_nodes * num_bytes
    return Range.exactly(sent).over(costs.NETWORK_SHARE.times(gbits / 8 * 1e9))
