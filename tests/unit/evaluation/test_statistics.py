import itertools
import math

import numpy as np
import pytest
from scipy import stats

from bit_ray.errors import ConfigError
from bit_ray.evaluation.statistics import (
    Interval,
    difference,
    expected_best,
    expected_best_band,
    expected_choice,
    holm,
    mean_interval,
    p_value,
    paired_difference,
    pooled_spread,
    t_interval,
)

RNG = np.random.default_rng
REPEATS = 2000


def near(share, expected, repeats=REPEATS):
    """Whether a share of random repeats is within four standard errors of what it should be."""
    return abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / repeats)


def ends(interval):
    return interval.low, interval.high


def test_the_interval_of_a_mean_is_students():
    values = [0.71, 0.74, 0.69, 0.73, 0.70]
    found = mean_interval(values)
    assert found.estimate == pytest.approx(0.714)
    assert ends(found) == pytest.approx(stats.t.interval(0.95, 4, np.mean(values), stats.sem(values)))


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_the_interval_of_a_mean_covers_as_often_as_it_says(seeds):
    draws = RNG(seeds).normal(0.7, 0.02, (REPEATS, seeds))
    found = [mean_interval(values) for values in draws]
    assert near(np.mean([i.low <= 0.7 <= i.high for i in found]), 0.95)


def test_two_cells_are_compared_by_the_pooled_t_test():
    first, second = [0.81, 0.84, 0.80], [0.78, 0.79, 0.77, 0.80]
    found = difference(first, second, pooled_spread([first, second]))
    reference = stats.ttest_ind(first, second).confidence_interval(0.95)
    assert ends(found) == pytest.approx((reference.low, reference.high))
    error = (found.high - found.low) / 2 / stats.t.ppf(0.975, 5)
    assert p_value(found.estimate, error, 5) == pytest.approx(stats.ttest_ind(first, second).pvalue)


def test_the_spread_is_pooled_over_all_cells_of_a_study():
    cells = [[0.1, 0.3], [0.5, 0.5, 0.8], [0.9], []]
    squares = 2 * 0.1**2 + (0.1**2 + 0.1**2 + 0.2**2)
    assert pooled_spread(cells).degrees == 3
    assert pooled_spread(cells).sd == pytest.approx(math.sqrt(squares / 3))


@pytest.mark.parametrize("seeds", [3, 5])
def test_equal_settings_are_called_different_as_seldom_as_the_level_says(seeds):
    cells = RNG(10 + seeds).normal(0.7, 0.02, (REPEATS, 2, seeds))
    claims = [difference(a, b, pooled_spread([a, b])).excludes_zero for a, b in cells]
    assert near(np.mean(claims), 0.05)


def test_a_difference_of_three_standard_deviations_is_found_with_the_published_power():
    cells = RNG(4).normal(0.0, 1.0, (REPEATS, 2, 3)) + np.array([[3.0], [0.0]])
    found = np.mean([difference(a, b, pooled_spread([a, b])).excludes_zero for a, b in cells])
    shift, limit = 3 / math.sqrt(2 / 3), stats.t.ppf(0.975, 4)
    power = stats.nct.sf(limit, 4, shift) + stats.nct.cdf(-limit, 4, shift)
    assert near(found, power)


def test_pairs_are_compared_by_the_paired_t_test():
    first, second = [0.81, 0.84, 0.80, 0.9], [0.80, 0.81, 0.79, 0.88]
    reference = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert ends(paired_difference(first, second)) == pytest.approx((reference.low, reference.high))


def test_holm_adjusts_the_worked_example():
    # 4 tests: 4 * 0.005, 3 * 0.01, 2 * 0.03, 1 * 0.04, each at least as large as the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert holm([0.6, 0.7]) == (1.0, 1.0)
    assert holm([]) == ()


def test_of_many_equal_settings_any_is_called_different_at_most_as_often_as_the_level_says():
    p_values = RNG(5).random((REPEATS, 10))
    share = np.mean([min(holm(values)) < 0.05 for values in p_values])
    assert near(share, 1 - (1 - 0.05 / 10) ** 10)


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_the_expected_best_is_the_mean_over_all_subsets(n):
    scores = [0.3, 0.9, 0.1, 0.5, 0.5, 0.7]
    everything = [max(chosen) for chosen in itertools.combinations(scores, n)]
    assert expected_best(scores, n) == pytest.approx(np.mean(everything))


def test_the_expected_best_of_many_trials_does_not_overflow():
    scores = RNG(0).random(5000)
    assert expected_best(scores, 1) == pytest.approx(scores.mean())
    assert expected_best(scores, 5000) == scores.max()
    assert 0.99 < expected_best(scores, 500) < 1


@pytest.mark.parametrize("n", range(1, 7))
@pytest.mark.parametrize(
    "ranked",
    [[0.3, 0.9, 0.1, 0.5, 0.6, 0.7], [0.5, 0.9, 0.5, 0.5, 0.9, 0.1], [0.2] * 6],
    ids=["different", "ties", "equal"],
)
def test_the_expected_choice_is_the_mean_over_all_subsets(ranked, n):
    read = [0.1, 0.8, 0.4, 0.7, 0.2, 0.9]
    expected = []
    for chosen in itertools.combinations(range(6), n):
        most = max(ranked[i] for i in chosen)
        expected.append(np.mean([read[i] for i in chosen if ranked[i] == most]))
    assert expected_choice(ranked, read, n) == pytest.approx(np.mean(expected))


@pytest.mark.parametrize("n", [1, 2, 5, 10, 20])
def test_the_expected_choice_by_the_score_itself_is_the_expected_best(n):
    scores = RNG(9).integers(0, 12, 20) / 12
    assert expected_choice(scores, scores, n) == pytest.approx(expected_best(scores, n))


def test_the_expected_choice_by_noise_gains_nothing():
    """Ranked by what has nothing to do with the score, the choice is the mean, while the best looks much better."""
    ranked, scores = RNG(11).random((2, 2000))
    assert expected_choice(ranked, scores, 20) == pytest.approx(0.5, abs=0.06)
    assert expected_best(scores, 20) > 0.9


def test_the_band_covers_the_whole_curve_at_once():
    """Uniform scores, whose expected best of n is n / (n + 1)."""
    repeats, total = 300, 20
    covered = 0
    for scores in RNG(6).random((repeats, total)):
        bands = [expected_best_band(scores, n) for n in range(1, total + 1)]
        covered += all(band.low <= n / (n + 1) <= band.high for n, band in enumerate(bands, 1))
        assert all(band.low <= band.estimate <= band.high for band in bands)
    assert covered / repeats > 0.95 - 4 * math.sqrt(0.95 * 0.05 / repeats)


def test_a_sweep_of_which_some_diverged_is_covered_too():
    """70 % good trials, 30 % at chance: a bootstrap band covers half of the time at n = N."""
    repeats, total = 200, 40

    def draw(rng, size):
        good = rng.beta(20, 8, size)
        return np.where(rng.random(size) < 0.7, good, 0.1)

    truth = draw(RNG(7), (20_000, total)).max(1).mean()
    bands = [expected_best_band(scores, total) for scores in draw(RNG(8), (repeats, total))]
    assert np.mean([band.low <= truth <= band.high for band in bands]) > 0.95 - 4 * math.sqrt(0.95 * 0.05 / repeats)
    assert np.mean([band.high - band.low for band in bands]) < 0.35  # and it says something


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval([0.5]), "values: 1 values; accepted: at least 2; run more seeds"),
        (lambda: pooled_spread([[0.5], [0.6]]), "cells: one value each; accepted: at least one setting with two seeds"),
        (lambda: difference([], [1.0], pooled_spread([[1.0, 2.0]])), "first: 0 values; accepted: at least 1"),
        (lambda: paired_difference([1.0, 2.0], [1.0]), "second: 1 values; accepted: 2, one for each of the first"),
        (lambda: holm([0.1, 1.2]), "p_values: 1.2; accepted: 0 to 1"),
        (lambda: expected_best([0.1, 0.2], 3), "n: 3; accepted: 1 to 2, the number of trials"),
        (lambda: expected_best([0.1, 0.2], 0), "n: 0; accepted: 1 to 2, the number of trials"),
        (
            lambda: expected_choice([0.1, 0.2], [0.1], 1),
            "read: 1 scores; accepted: 2, one for each that is ranked; pair them",
        ),
        (lambda: expected_choice([0.1, 0.2], [0.1, 0.2], 3), "n: 3; accepted: 1 to 2, the number of trials"),
        (lambda: expected_best_band([10.0, 20.0], 1), "scores: 10 to 20; accepted: 0 to 1; divide percentages by 100"),
    ],
)
def test_what_cannot_be_computed_is_refused_in_one_line(call, message):
    with pytest.raises(ConfigError) as caught:
        call()
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


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
    with pytest.raises(ConfigError, match=f"^level: {level}; accepted: between 0 and 1, such as 0.95; correct it$"):
        t_interval(0.0, 1.0, 3, level)
