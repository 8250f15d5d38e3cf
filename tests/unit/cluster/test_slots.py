import pytest

from bit_ray.cluster.slots import Resources, choose_workers, cpus_of_one, num_local_cores
from bit_ray.errors import ConfigError

CORES = num_local_cores()
HERE, GPUS, CLUSTER = Resources(1, 2 * CORES + 1, 0, True), Resources(2, 64, 8, False), Resources(4, 64, 0, False)
EMPTY = Resources(1, 0, 0, False, num_cpus_later=48, num_gpus_later=16)


def test_a_slot_is_a_gpu_or_else_a_core_here_or_a_cpu_of_a_cluster():
    assert [resources.num_slots for resources in (HERE, GPUS, CLUSTER)] == [CORES, 8, 64]
    assert Resources(1, 0, 0, False).num_slots == 1


@pytest.mark.parametrize(
    ("resources", "batch", "given", "chosen"),
    [
        (GPUS, 4096, {}, (8, 8, True)),
        (GPUS, 8, {}, (4, 4, True)),  # a pair of images for each
        (GPUS, 4096, {"device": "cpu"}, (32, 32, False)),
        (GPUS, 4096, {"num_workers": (3, 3)}, (3, 3, True)),
        (CLUSTER, 4096, {}, (32, 32, False)),
        (CLUSTER, 4096, {"num_workers": (2, 5)}, (2, 5, False)),
        # An autoscaler may bring GPUs: they are waited for, and not replaced by one CPU.
        (EMPTY, 4096, {}, (1, 16, True)),
        (EMPTY, 8, {}, (1, 4, True)),
        (EMPTY, 4096, {"device": "cpu"}, (1, 24, False)),
        (EMPTY, 4096, {"num_workers": (4, 4)}, (4, 4, True)),
        (CLUSTER, 4096, {"num_workers": (100, 100)}, (100, 100, False)),  # nodes that are on their way
        (EMPTY, 4096, {"num_workers": (4, 40)}, (4, 16, True)),  # no more than may come
        (HERE, 4096, {}, (CORES, CORES, False)),
        (HERE, 1, {}, (1, 1, False)),
    ],
)
def test_workers_are_as_many_as_compute_side_by_side(resources, batch, given, chosen):
    assert choose_workers(resources, batch, **given) == chosen


def test_a_machine_that_has_too_little_is_told_what_to_change():
    with pytest.raises(
        ConfigError, match="^runtime.device: cuda, but this machine has no GPU; accepted: auto or cpu; choose one$"
    ):
        choose_workers(HERE, 64, device="cuda")
    with pytest.raises(
        ConfigError, match=f"^runtime.num_workers: 99999; accepted: at most {2 * CORES} on this machine; lower"
    ):
        choose_workers(HERE, 64, num_workers=(99999, 99999))


@pytest.mark.parametrize(
    ("resources", "given", "error"),
    [
        (CLUSTER, {"device": "cuda"}, "runtime.device: cuda, but the cluster has no GPU; accepted: auto or cpu; "),
        (
            Resources(1, 0, 0, False, num_cpus_later=48),
            {"device": "cuda", "num_workers": (2, 4)},
            "runtime.device: cuda, but the cluster, as large as its autoscaler may make it, has no GPU; ",
        ),
        (
            EMPTY,
            {"num_workers": (17, 20)},
            "runtime.num_workers: 17; accepted: at most 16, the GPUs that there may be; lower it, or raise max_workers",
        ),
        (
            EMPTY,
            {"num_workers": (49, 49), "device": "cpu"},
            "runtime.num_workers: 49; accepted: at most 48, the CPUs that there may be; lower it, or raise max_workers",
        ),
    ],
)
def test_what_the_cluster_can_never_have_is_not_waited_for(resources, given, error):
    with pytest.raises(ConfigError) as refused:
        choose_workers(resources, 4096, **given)
    assert str(refused.value).startswith(error)


def test_an_autoscaler_brings_a_slot_for_work_that_keeps_it_busy():
    cpus = Resources(1, 0, 0, False, num_cpus_later=48)
    assert [cpus.slots_for(parts) for parts in (1, 64, 640, 64_000)] == [1, 1, 10, 48]
    assert [EMPTY.slots_for(parts) for parts in (1, 640, 64_000)] == [1, 10, 16]
    assert EMPTY.slots_for(64_000, use_gpu=False) == 48
    assert [resources.slots_for(1) for resources in (HERE, GPUS, CLUSTER)] == [CORES, 8, 64]


@pytest.mark.parametrize(
    ("nodes", "cpus"),
    [
        ([{"CPU": 2}, {"CPU": 16}, {"memory": 5}], 16),
        ([{"CPU": 64}, {"CPU": 32, "GPU": 4}, {"CPU": 48, "GPU": 8}], 6),
        ([{"CPU": 2, "GPU": 4}], 0),
        ([], 0),
    ],
)
def test_one_computation_has_the_cpus_of_one_node(nodes, cpus):
    assert cpus_of_one(nodes) == cpus
