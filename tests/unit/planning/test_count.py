import pytest

from bit_ray.planning.costs import NETWORKS
from bit_ray.planning.count import count


def test_the_table_is_what_is_counted() -> None:
    found, stated = count("R26x1"), NETWORKS["R26x1"]
    assert found.gflops == pytest.approx(stated.gflops, abs=5e-4)
    assert found.kept == pytest.approx(stated.kept, abs=5e-4)
    assert (found.parameters, found.num_features) == (stated.parameters, stated.num_features)


def test_twice_the_side_costs_four_times_as_much() -> None:
    twice = NETWORKS["R50x1"].at(448)
    assert twice.gflops == 4 * NETWORKS["R50x1"].gflops
    assert twice.flops(1000) - twice.flops(0) == 6 * 2048 * 1000
