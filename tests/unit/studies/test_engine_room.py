"""What a trial asks of the cluster."""

import pytest

from bit_ray.cluster.slots import Resources
from bit_ray.studies import engine

CORES = 64  # of the machine that starts the study


@pytest.mark.parametrize(
    ("resources", "trials", "threads", "asked"),
    [
        # Four nodes of two CPUs: two trials get two threads each, not four, which no node has.
        (Resources(4, 8, 0, False, cpus_of_one=2), 2, 2, {"CPU": 2}),
        (Resources(4, 64, 0, False, cpus_of_one=16), 2, 16, {"CPU": 16}),
        (Resources(4, 64, 0, False, cpus_of_one=16), 32, 2, {"CPU": 2}),
        # CPU nodes beside a GPU node: a trial gets what the GPU's own node has for it.
        (Resources(3, 520, 8, False, cpus_of_one=6), 8, 6, {"CPU": 6, "GPU": 1}),
        (Resources(1, 2, 4, False, cpus_of_one=0), 4, 1, {"CPU": 1, "GPU": 1}),
        # From no node: what the autoscaler's types have.
        (Resources(1, 0, 0, False, num_cpus_later=8, cpus_of_one=4), 1, 4, {"CPU": 4}),
        (Resources(1, 2 * CORES + 1, 0, True, cpus_of_one=2 * CORES + 1), 2, 32, {"CPU": 64}),
    ],
)
def test_a_trial_asks_for_no_more_than_one_node_has(resources, trials, threads, asked, monkeypatch):
    for module in ("bit_ray.studies.engine", "bit_ray.cluster.slots"):
        monkeypatch.setattr(f"{module}.num_local_cores", lambda: CORES)
    found = engine._room(resources, trials, 0, None)
    assert (found[1], found[2]) == (threads, asked)
