import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bit_ray.planning.failures import best_interval, slowdown


def test_the_best_interval_is_youngs_with_dalys_terms() -> None:
    # Young: sqrt(2 x 50 x 10,000) = 1,000; Daly: x (1 + sqrt(50 / 20,000) / 3 + 50 / 20,000 / 9) - 50.
    assert best_interval(50, 10_000) == pytest.approx(1000 * (1 + 0.05 / 3 + 0.0025 / 9) - 50)
    assert best_interval(30, 10) == 10  # a failure comes before the copy is made


@given(st.floats(0.1, 10), st.floats(1e4, 1e7))
def test_no_interval_near_the_best_costs_less(save_s: float, mtbf_s: float) -> None:
    def cost(interval_s: float) -> float:
        return slowdown(interval_s=interval_s, save_s=save_s, failures_per_s=1 / mtbf_s, restart_s=0)

    best = best_interval(save_s, mtbf_s)
    # The slowdown is of first order in the rate of failures, and the minimum flat.
    assert cost(best) <= 1.001 * min(cost(best / 2), cost(best * 2))


def test_a_failure_costs_half_an_interval_and_a_restart_and_a_notice_the_restart_alone() -> None:
    # One failure in 10,000 s: 300 + 100 s of them are lost; the rest trains.
    assert slowdown(interval_s=600, save_s=0, failures_per_s=1e-4, restart_s=100) == pytest.approx(1 / 0.96)
    noticed = slowdown(interval_s=600, save_s=0, failures_per_s=0, restart_s=100, preemptions_per_s=1e-4)
    assert noticed == pytest.approx(1 / 0.99)
    assert slowdown(interval_s=600, save_s=6, failures_per_s=0, restart_s=100) == pytest.approx(1.01)
    assert slowdown(interval_s=600, save_s=0, failures_per_s=1 / 300, restart_s=100) == math.inf


def test_the_slowdown_is_that_of_a_simulated_run() -> None:
    draw, work, interval_s, restart_s, mtbf_s = random.Random(0), 2_000_000.0, 600.0, 120.0, 20_000.0
    done = clock = 0.0
    while done < work:
        until = draw.expovariate(1 / mtbf_s)
        clock += until + restart_s
        done += until // interval_s * interval_s  # what was saved
    expected = slowdown(interval_s=interval_s, save_s=0, failures_per_s=1 / mtbf_s, restart_s=restart_s)
    assert clock / done == pytest.approx(expected, rel=0.01)
