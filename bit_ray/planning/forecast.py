"""What a pre-training on a cluster takes: days, money, network, storage, cores, checkpoints, failures.

A model, not a measurement: each number comes from the costs and assumptions in `bit_ray.planning.costs`, or from what
`bit_ray.planning.calibrate` has measured in their place, and has their interval.
"""

import math
from dataclasses import dataclass, replace

from bit_ray.errors import ConfigError
from bit_ray.planning import costs
from bit_ray.planning.config import ClusterPlanConfig, NodeConfig
from bit_ray.planning.costs import GPUS, NETWORKS, NetworkCosts
from bit_ray.planning.failures import best_interval, slowdown
from bit_ray.planning.ranges import Range, as_range
from bit_ray.recipes.schedules import epochs_to_steps
from bit_ray.recipes.upstream import RECIPES

_DAY_S = 86_400.0
_GRADIENT_BYTES = 4
_STATE_BYTES = 8
"""Of a parameter in a checkpoint: weight and momentum."""
_BACKWARD_SHARE = 2 / 3
"""Of a step, during which gradients are summed as they come."""
_ROW_GROUP = 64
_SHARD_IMAGES = 4096


@dataclass(frozen=True, kw_only=True)
class Assumption:
    """One number of a plan, and where it comes from."""

    name: str
    value: Range
    unit: str
    source: str
    scale: float = 1.0
    """By which it is multiplied to be shown in the unit."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a plan is made from, all of it known or assumed."""

    network: NetworkCosts
    """At the plan's size of the view."""
    num_images: int
    num_classes: int
    epochs: float
    batch_size: int
    node: NodeConfig
    """With nothing left out."""
    row_group_size: int
    num_shards: int
    step_s: Range
    """Seconds of a device per image."""
    view_s: Range
    """Seconds of a core per view."""
    image_bytes: Range
    read_bytes_per_s: Range | None = None
    """Of a node, as measured; None: what its network gives."""
    on_cpu: bool = False
    """Whether the devices are cores, which also decode."""
    mtbf_h: Range = costs.NODE_MTBF_H
    restart_s: Range = costs.RESTART_S
    assumptions: tuple[Assumption, ...] = ()
    """All of them, for people."""


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


def inputs_of(config: ClusterPlanConfig) -> Inputs:
    """Resolve what the user left out.

    Raises:
        ConfigError: There is no such network, nothing says how many images there are, or there are fewer images in a
            batch than GPUs.
        DataError: There is no such shard set.
    """
    recipe = RECIPES[config.recipe]()
    batch, epochs = config.batch_size or recipe.global_batch_size, config.epochs or recipe.epochs
    images, classes = config.images or recipe.reference_num_examples, config.num_classes
    if not 1 <= images < 1e13 or images != int(images):
        raise ConfigError.of("images", f"{images:g}", "a whole number of images, such as 300e6")
    if config.gpus > batch:
        remedy = "lower gpus, or raise batch_size, which changes what is learned"
        raise ConfigError.of("gpus", config.gpus, f"at most the images of a batch, {batch:,}", remedy)
    row_group_size, image_bytes = _ROW_GROUP, costs.IMAGE_BYTES
    num_shards, image_source = math.ceil(images / _SHARD_IMAGES), "assumed: files of ImageNet's size"
    if config.shards:
        from bit_ray.data.shards.manifest import read_manifest

        manifest = read_manifest(config.shards)
        images = config.images or manifest.num_examples
        classes = classes or manifest.num_classes
        row_group_size = manifest.row_group_size
        num_shards = len(manifest.shards)
        image_bytes = Range.exactly(manifest.num_bytes / manifest.num_examples)
        image_source = "the shard set's manifest"
    if images * epochs < batch:
        raise ConfigError.of("images", f"{images:g}", f"at least one batch, {batch:,}, in all epochs", "raise it")
    network = _network(config.model).at(config.crop_size)
    classes = classes or recipe.reference_num_classes
    gpu = GPUS.get(config.gpu)
    node = config.node
    network_source, cores_source = "given", "given"
    if gpu is not None:
        network_source = network_source if node.network_gbits else f"assumed: {gpu.node}"
        cores_source = cores_source if node.cores else f"assumed: {gpu.node}"
        node = replace(
            node,
            gpus=node.gpus or gpu.node_gpus,
            cores=node.cores or gpu.node_cores,
            network_gbits=node.network_gbits or gpu.node_gbits,
        )
    node = replace(
        node, gpus=min(node.gpus or 1, config.gpus), cores=node.cores or 1, network_gbits=node.network_gbits or 10.0
    )
    node = replace(node, storage_gbits=node.storage_gbits or min(100.0, node.network_gbits))
    step_s = costs.seconds_per_image(network, gpu, classes) if gpu else Range.exactly(math.inf)
    view_s = costs.DECODE_SEEKABLE_S if config.seekable else costs.DECODE_S
    mtbf = as_range(config.failures.mtbf_hours) if config.failures.mtbf_hours else costs.NODE_MTBF_H
    restart = as_range(config.failures.restart_s) if config.failures.restart_s else costs.RESTART_S
    given = "given"
    assumptions = [
        Assumption(name="CPU time of a view", value=view_s, unit="ms", scale=1e3, source="benchmarks/decode.py, Xeon"),
        Assumption(name="an image", value=image_bytes, unit="kB", scale=1e-3, source=image_source),
        Assumption(name="cores of a node", value=as_range(node.cores), unit="", source=cores_source),
        Assumption(name="network of a node", value=as_range(node.network_gbits), unit="Gbit/s", source=network_source),
        Assumption(
            name="a node to the store",
            value=as_range(node.storage_gbits),
            unit="Gbit/s",
            source=given if config.node.storage_gbits else "assumed: that network, at most 100",
        ),
        Assumption(
            name="a node fails once in",
            value=mtbf,
            unit="hours",
            source=given if config.failures.mtbf_hours else "arXiv 2407.21783, 2410.21680",
        ),
        Assumption(
            name="restart",
            value=restart,
            unit="s",
            source=given if config.failures.restart_s else "assumed; 13 to 26 on one machine, benchmarks/elastic.py",
        ),
        Assumption(name="copy of a checkpoint", value=costs.COPY_GB_PER_S, unit="GB/s", source="assumed"),
        Assumption(name="its upload", value=costs.UPLOAD_GB_PER_S, unit="GB/s", source="assumed"),
    ]
    if gpu is not None:
        step = Assumption(
            name="step, per image",
            value=step_s,
            unit="ms",
            scale=1e3,
            source=f"{gpu.tflops:g} TFLOP/s and {gpu.memory_tb_per_s:g} TB/s, and what timm measured on an RTX 3090",
        )
        assumptions.insert(0, step)
    return Inputs(
        network=network,
        num_images=int(images),
        num_classes=classes,
        epochs=epochs,
        batch_size=batch,
        node=node,
        row_group_size=row_group_size,
        num_shards=num_shards,
        step_s=step_s,
        view_s=view_s,
        image_bytes=image_bytes,
        mtbf_h=mtbf,
        restart_s=restart,
        assumptions=tuple(assumptions),
    )


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
    total_s = train_s.times(slow)
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


def _network(model: str) -> NetworkCosts:
    known = NETWORKS.get(model)
    if known is None:  # of another size: counted, which needs PyTorch
        from bit_ray.planning.count import count

        return count(model)
    return known


def _gradients_s(num_bytes: float, num_nodes: int, gbits: float) -> Range:
    """Seconds in which nodes sum gradients: each sends and receives nearly twice their bytes (a ring)."""
    if num_nodes == 1:
        return Range.exactly(0.0)
    sent = 2 * (num_nodes - 1) / num_nodes * num_bytes
    return Range.exactly(sent).over(costs.NETWORK_SHARE.times(gbits / 8 * 1e9))
