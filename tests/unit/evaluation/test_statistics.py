import pytest
from scipy import stats

from bit_ray.errors import ConfigError
from bit_ray.evaluation.statistics import Interval, t_interval


def test_the_interval_of_an_estimate_is_students():
    found = t_interval(0.7, 0.02, 4, level=0.9)
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.9, 4, 0.7, 0.02))
    assert found.estimate == 0.7


def test_an_interval_says_whether_it_excludes_zero():
    assert Interval(estimate=1, low=0.1, high=2).excludes_zero
    assert Interval(estimate=-1, low=-2, high=-0.1).excludes_zero
    assert not Interval(estimate=1, low=-0.1, high=2).excludes_zero


@pytest.mark.parametrize("level", [0.0, 1.0, 95])
def test_a_level_that_is_no_share_is_refused(level):
    with pytest.raises(ConfigError, match=f"^level: {level}; between 0 and 1, such as 0.95; correct it$"):
        t_interval(0.0, 1.0, 3, level)
