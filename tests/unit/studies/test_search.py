import json

import numpy as np
import pytest
from scipy.stats import kstest, qmc

from bit_ray.studies.search import Adaptive, draw
from bit_ray.studies.spaces import parse_space

SPACE = parse_space(
    [
        "rate=log:1e-4:1e-1",
        "drop=uniform:0:0.7",
        "steps=int:1:9",
        "long=logint:10:1000",
        "alpha=0,0.1,false,1,true,[1,2]",
    ]
)
SQUARE = parse_space(["x=uniform:0:1", "y=uniform:0:1"])


def points(method, count, seed=0, axes=SQUARE):
    return np.array([list(draw(axes, method, seed, i).values()) for i in range(count)])


@pytest.mark.parametrize("method", ["random", "sobol"])
def test_a_trial_is_a_function_of_the_seed_and_its_number_alone(method):
    trials = [draw(SPACE, method, 3, i) for i in range(12)]
    assert [draw(SPACE, method, 3, i) for i in reversed(range(12))] == trials[::-1]
    assert draw(SPACE, method, 3, 7) == trials[7]
    assert len({repr(trial) for trial in trials}) == 12
    assert [draw(SPACE, method, 4, i) for i in range(12)] != trials


@pytest.mark.parametrize("method", ["random", "sobol"])
def test_a_trial_has_a_value_of_each_axis_that_json_keeps(method):
    for number in range(8):
        values = draw(SPACE, method, 0, number)
        assert list(values) == ["rate", "drop", "steps", "long", "alpha"]
        assert [type(value) for value in list(values.values())[:4]] == [float, float, int, int]
        assert repr(json.loads(json.dumps(values))) == repr(values)


@pytest.mark.parametrize("method", ["random", "sobol"])
def test_trials_are_uniform_in_each_axis(method):
    for column in points(method, 512).T:
        assert kstest(column, "uniform").pvalue > 1e-4


def test_sixteen_points_of_sobol_are_spread_more_evenly_than_random_ones():
    sobol = [qmc.discrepancy(points("sobol", 16, seed)) for seed in range(10)]
    random = [qmc.discrepancy(points("random", 16, seed)) for seed in range(10)]
    assert max(sobol) < min(random)
    # One in each of 16 columns and rows: what a net of 16 points promises.
    for column in points("sobol", 16).T:
        assert sorted((16 * column).astype(int)) == list(range(16))


def loss(values):
    return (np.log10(values["rate"]) + 2) ** 2 + (values["drop"] - 0.2) ** 2 + 0.1 * (values["alpha"] != 0.1)


def run(search, first, count):
    """Propose and score some trials, one at a time."""
    trials = []
    for number in range(first, first + count):
        values = search.propose(number)
        search.tell(values, loss(values))
        trials.append(values)
    return trials


@pytest.mark.parametrize("method", ["tpe", "gp"])
def test_a_new_start_that_is_told_the_earlier_trials_goes_on_as_if_it_had_not_stopped(method):
    whole = run(Adaptive(SPACE, method, 5, "lower"), 0, 12)
    assert len({repr(trial) for trial in whole}) == 12
    # Both draw their first 10 trials at random: one start ends before that, the other after.
    for first, end in ((4, 10), (11, 12)):
        search = Adaptive(SPACE, method, 5, "lower")
        for values in whole[:first]:
            search.tell(json.loads(json.dumps(values)), loss(values))
        assert run(search, first, end - first) == whole[first:end]
    for values in whole:
        assert 1e-4 <= values["rate"] <= 1e-1
        assert 0 <= values["drop"] <= 0.7
        assert values["steps"] in range(1, 10)
        assert values["long"] in range(10, 1001)
        assert repr(values["alpha"]) in map(repr, SPACE[4].values)
        assert [type(value) for value in list(values.values())[:4]] == [float, float, int, int]


def test_trials_of_equal_values_that_run_at_a_time_are_both_told():
    search = Adaptive(parse_space(["a=1,2"]), "tpe", 0, "higher")
    values = [search.propose(number) for number in range(6)]
    assert len({repr(one) for one in values}) == 2
    for one in values:
        search.tell(one, one["a"])
    assert search.propose(6)["a"] in (1, 2)


def test_a_value_that_equals_another_of_another_type_is_told_as_itself():
    space = parse_space(["a=0,false,1,true"])
    told = []
    for chosen in space[0].values:
        search = Adaptive(space, "tpe", 1, "higher")
        for _ in range(10):
            search.tell({"a": chosen}, 1.0)
            for other in space[0].values:
                search.tell({"a": other}, 0.0)
        proposed = [repr(search.propose(50 + i)["a"]) for i in range(20)]
        told.append(max(set(proposed), key=proposed.count))
    assert told == ["0", "False", "1", "True"]


def bowl(method, seed, better, count):
    """Depths that a search finds one after the other."""
    search = Adaptive(SQUARE, method, seed, better)
    found = []
    for number in range(count):
        values = search.propose(number)
        found.append((values["x"] - 0.3) ** 2 + (values["y"] - 0.8) ** 2)
        search.tell(values, found[-1] if better == "lower" else -found[-1])
    return found


@pytest.mark.parametrize("better", ["lower", "higher"])
def test_tpe_finds_the_bottom_of_a_bowl_better_than_random_trials(better):
    random = [min(((points("random", 30, seed) - [0.3, 0.8]) ** 2).sum(axis=1)) for seed in range(6)]
    assert np.mean([min(bowl("tpe", seed, better, 30)) for seed in range(6)]) < np.mean(random)


def test_gp_finds_the_bottom_of_a_bowl_in_a_few_trials():
    found = bowl("gp", 0, "higher", 15)
    assert min(found[10:]) < min(found[:10])
    # Of 5 random points the nearest is at 0.06, on average.
    assert min(found[10:]) < 0.005
