"""What the preflight says of a cluster's cores, without a cluster."""

import pytest

from bit_ray.cluster.slots import Workers
from bit_ray.submission.first_step import FirstStep
from bit_ray.submission.machine import Machine
from bit_ray.submission.nodes import Node
from bit_ray.submission.preflight import _cores

MACHINE = Machine(python="3.11", ray="2.60", torch="2.14", system="Linux", code="ab", decoder="compiled")
# A worker trains on 600 images while a core decodes 100.
STEP = FirstStep(num_images=64, read_s=1, images_per_s=600, decoded_per_s=100, loss=1, device="x")


def node(num_cores: int, num_cpus: float, num_gpus: float = 0.0) -> Node:
    return Node(
        id="a",
        address="10.0.0.1",
        machine=MACHINE,
        num_cores=num_cores,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        shared_memory=0,
        free_disk=0,
        free_port=1,
    )


@pytest.mark.parametrize(
    ("found", "workers", "wanted"),
    [
        (node(96, 96, 8), Workers(8, 8, use_gpu=True), ""),
        (
            node(32, 32, 8),
            Workers(8, 8, use_gpu=True),
            "for 8 of them 10.0.0.1 needs 48 cores, it has 32; they will wait",
        ),
        # A container that may use less than its machine has.
        (
            node(96, 8, 4),
            Workers(4, 4, use_gpu=True),
            "for 4 of them 10.0.0.1 needs 24 cores, it has 8; they will wait",
        ),
        (node(96, 1), Workers(1, 1, use_gpu=False), "for 1 of them 10.0.0.1 needs 7 cores, it has 1; they will wait"),
        # A Ray that counts more CPUs than there are.
        (node(2, 8), Workers(4, 4, use_gpu=False), "for 4 of them 10.0.0.1 needs 28 cores, it has 2; they will wait"),
        (node(8, 8), Workers(1, 1, use_gpu=False), ""),
        (node(8, 0), Workers(1, 1, use_gpu=False), ""),  # a head without CPUs
    ],
)
def test_a_node_with_fewer_cpus_than_its_workers_need_is_warned_of_with_both_numbers(
    found: Node, workers: Workers, wanted: str
) -> None:
    check, state, text = _cores(STEP, workers, [found])
    assert check == "CPUs"
    assert str(text).startswith("a core decodes 100 images/s, a worker trains 600")
    assert (state, wanted) == (("warning", wanted) if wanted else ("ok", ""))
    assert wanted in str(text)
