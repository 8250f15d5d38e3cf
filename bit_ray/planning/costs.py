"""What an image costs a network, and what a GPU and its node offer: numbers that were measured or published.

The costs of the published sizes stand here, so that a plan needs no PyTorch; those of other sizes are counted by
`bit_ray.planning.count`, whose ``python -m bit_ray.planning.count`` also prints the table.
"""

from dataclasses import dataclass

from bit_ray.planning.ranges import Range

CROP = 224
"""Side of the view that the table's costs are for, pixels."""


@dataclass(frozen=True)
class NetworkCosts:
    """What a trunk without its classifier costs."""

    gflops: float
    """10^9 FLOPs of one image's forward and backward pass, a multiply-add as two, by PyTorch's `FlopCounterMode`."""
    kept: float
    """Millions of activations that the backward pass needs of one image."""
    parameters: int
    num_features: int

    def at(self, crop_size: int) -> "NetworkCosts":
        """For another size of the view: all but the parameters grow with its area."""
        area = (crop_size / CROP) ** 2
        return NetworkCosts(self.gflops * area, self.kept * area, self.parameters, self.num_features)

    def flops(self, num_classes: int) -> float:
        """FLOPs of one image, with a classifier."""
        return self.gflops * 1e9 + 6 * self.num_features * num_classes

    def num_parameters(self, num_classes: int) -> int:
        """Parameters with a classifier."""
        return self.parameters + (self.num_features + 1) * num_classes


# python -m bit_ray.planning.count R26x1 R50x1 R101x1 R152x1 R50x3 R152x2 R101x3 R152x4
NETWORKS = {
    "R26x1": NetworkCosts(13.805, 11.874, 13_938_496, 2048),
    "R50x1": NetworkCosts(24.287, 19.402, 23_500_352, 2048),
    "R101x1": NetworkCosts(46.560, 29.641, 42_492_480, 2048),
    "R152x1": NetworkCosts(68.833, 42.289, 58_136_128, 2048),
    "R50x3": NetworkCosts(215.749, 57.899, 211_174_080, 6144),
    "R152x2": NetworkCosts(274.390, 84.417, 232_238_208, 4096),
    "R101x3": NetworkCosts(416.209, 88.610, 381_789_888, 6144),
    "R152x4": NetworkCosts(1095.670, 168.675, 928_340_224, 8192),
}


@dataclass(frozen=True)
class Gpu:
    """A GPU and the node that clouds sell it in."""

    tflops: float
    """10^12 dense bfloat16 FLOPs a second."""
    memory_tb_per_s: float
    """Bandwidth of its memory."""
    memory_gb: float
    node: str
    """What the node's numbers are of."""
    node_gpus: int
    node_cores: int
    """Physical cores: half of the vCPUs."""
    node_gbits: float
    """Network between nodes, Gbit/s."""


# GPUs: NVIDIA's documents as named at the end of each line, halved where they state it with sparsity; what could be
# looked up stands in docs/scaling.md. Nodes: AWS's instance types; the last two are assumed.
GPUS = {
    "a10g": Gpu(70, 0.600, 24, "g5.48xlarge", 8, 96, 100),  # no data sheet is public
    "a100": Gpu(312, 2.039, 80, "p4de.24xlarge", 8, 48, 400),  # data sheet, 80 GB SXM
    "h100": Gpu(989, 3.350, 80, "p5.48xlarge", 8, 96, 3200),  # data sheet, SXM
    "h200": Gpu(989, 4.800, 141, "p5en.48xlarge", 8, 96, 3200),  # data sheet
    "b200": Gpu(2250, 8.000, 180, "p6-b200.48xlarge", 8, 96, 3200),  # Blackwell brief, HGX at 1,000 W
    "l4": Gpu(121, 0.300, 24, "g6.48xlarge", 8, 96, 100),  # data sheet
    "l40s": Gpu(362, 0.864, 48, "g6e.48xlarge", 8, 96, 400),  # data sheet
    "rtx3090": Gpu(71, 0.936, 24, "a machine of one's own, assumed", 4, 16, 10),  # not confirmed
    "rtx4090": Gpu(165, 1.008, 24, "a machine of one's own, assumed", 4, 16, 10),  # not confirmed
}

BYTES = 2
"""Of an activation in bfloat16."""
# From eight rows of timm's results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv, of BiT's own networks at widths 1
# to 3: by these two numbers they are met to within -5 and +10 %. The ninth, R152x4 with 2 images a pass, took 1.4 times
# as long. An ideal program would move an activation about 8 times.
SHARE_OF_PEAK = 0.75
TIMES_MOVED = 31
# TPUv3 (123 TFLOP/s, 0.9 TB/s) took 0.67 times as long for R50x1 (32 minutes on 128 cores: big_vision's
# configs/bit_i1k.py) and 1.5 times for R152x4 (9,900 core-days: arXiv 2010.11929, Table 2). Compiled or fused GroupNorm
# may halve the time.
SPREAD = Range(0.5, 1.0, 1.5)

DECODE_S = Range(0.0011, 0.0012, 0.0020)
"""Seconds of a core per view of an ImageNet-like JPEG file: benchmarks/decode.py on Xeons, up to half as fast again on
busy or slower cores."""
DECODE_SEEKABLE_S = Range(0.00086, 0.00094, 0.0016)
"""The same for ``--seekable`` shards."""
IMAGE_BYTES = Range(100e3, 110e3, 120e3)
"""Of a file of ImageNet; JFT's size is not published."""

NODE_MTBF_H = Range(3_690.0, 6_340.0, 10_260.0)
"""Hours between two failures of a node of 8 GPUs. Likely: 419 interruptions in 54 days of 2,048 nodes (Llama 3, arXiv
2407.21783, Table 5); the ends: 6.50 and 2.34 failures in 1,000 node-days (arXiv 2410.21680)."""
RESTART_S = Range(30.0, 120.0, 600.0)
"""Seconds from a failure to the next new step, without the steps that are repeated: 13 to 26 measured on one machine
(benchmarks/elastic.py), not on a large cluster."""
RESTART_HERE_S = Range(13.0, 18.0, 26.0)
"""The same, and the start of a run, on one machine: benchmarks/elastic.py, two cores of a Xeon."""
COPY_GB_PER_S = Range(2.0, 8.0, 20.0)
"""At which a checkpoint is copied from the GPU, while training waits; assumed."""
UPLOAD_GB_PER_S = Range(0.1, 0.3, 1.0)
"""At which one process writes a checkpoint to an object store, while training goes on; assumed."""
NETWORK_SHARE = Range(0.5, 0.7, 0.9)
"""Of the network's bandwidth that summing gradients gets; assumed."""


def seconds_per_image(costs: NetworkCosts, gpu: Gpu, num_classes: int) -> Range:
    """Seconds a GPU trains on one image: arithmetic, and moving activations through its memory."""
    arithmetic = costs.flops(num_classes) / (SHARE_OF_PEAK * gpu.tflops * 1e12)
    memory = TIMES_MOVED * BYTES * costs.kept * 1e6 / (gpu.memory_tb_per_s * 1e12)
    return SPREAD.times(arithmetic + memory)
