"""What a plan is made from: what the user gave, and what is published or assumed instead of what was left out."""

import math
from dataclasses import dataclass, replace

from bit_ray.errors import ConfigError
from bit_ray.planning import costs
from bit_ray.planning.config import ClusterPlanConfig, NodeConfig
from bit_ray.planning.costs import GPUS, NETWORKS, NetworkCosts
from bit_ray.planning.ranges import Range, as_range
from bit_ray.recipes.upstream import RECIPES

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
    busy: float = 0.0
    """Share of a core that other work took while the step was measured."""
    mtbf_h: Range = costs.NODE_MTBF_H
    restart_s: Range = costs.RESTART_S
    assumptions: tuple[Assumption, ...] = ()
    """All of them, for people."""


def inputs_of(config: ClusterPlanConfig) -> Inputs:
    """Resolve what the user left out.

    Raises:
        ConfigError: There is no such network, nothing says how many images there are, or there are fewer images in a
            batch than GPUs.
        DataError: There is no such shard set.
    """
    recipe = RECIPES[config.recipe]()
    batch, epochs = config.global_batch_size or recipe.global_batch_size, config.epochs or recipe.epochs
    images, classes = config.num_images or recipe.reference_num_examples, config.num_classes
    if not 1 <= images < 1e13 or images != int(images):
        raise ConfigError.of("num_images", f"{images:g}", "a whole number of images, such as 300e6")
    if config.gpus > batch:
        remedy = "lower gpus, or raise batch_size, which changes what is learned"
        raise ConfigError.of("gpus", config.gpus, f"at most the images of a batch, {batch:,}", remedy)
    row_group_size, image_bytes = _ROW_GROUP, costs.IMAGE_BYTES
    num_shards, image_source = math.ceil(images / _SHARD_IMAGES), "assumed: files of ImageNet's size"
    if config.shards:
        from bit_ray.data.shards.manifest import read_manifest

        manifest = read_manifest(config.shards)
        images = config.num_images or manifest.num_examples
        classes = classes or manifest.num_classes
        row_group_size = manifest.row_group_size
        num_shards = len(manifest.shards)
        image_bytes = Range.exactly(manifest.num_bytes / manifest.num_examples)
        image_source = "the shard set's manifest"
    if images * epochs < batch:
        raise ConfigError.of("num_images", f"{images:g}", f"at least one batch, {batch:,}, in all epochs", "raise it")
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
            name="start, and restart",
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


def _network(model: str) -> NetworkCosts:
    known = NETWORKS.get(model)
    if known is None:  # of another size: counted, which needs PyTorch
        from bit_ray.planning.count import count

        return count(model)
    return known
