import math

import numpy as np
import pytest

from bit_ray.errors import ConfigError
from bit_ray.evaluation.trend import loss_line, loss_trend, relative_trend, trend
from bit_ray.recipes.schedules import Schedule

CURVES, POINTS, NOISE = 400, 100, 0.02


def noise(rng, size, correlation):
    """Noise of standard deviation 1, each point correlated with the one before."""
    found = rng.normal(size=size)
    for i in range(1, size):
        found[i] = correlation * found[i - 1] + math.sqrt(1 - correlation**2) * found[i]
    return found


def answers(change, correlation, seed, better="lower"):
    """How often each answer is given to curves about 1 that change by so much per doubling of the steps."""
    rng, counts = np.random.default_rng(seed), {}
    steps = np.unique(np.geomspace(1001, 2000, POINTS).astype(int))
    for _ in range(CURVES):
        values = 1 + change * np.log2(steps / 1000) + NOISE * noise(rng, len(steps), correlation)
        answer = trend(steps, values, margin=0.01, better=better).answer
        counts[answer] = counts.get(answer, 0) + 1 / CURVES
    return counts


def within(share, expected):
    return abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / CURVES)


@pytest.mark.parametrize(("correlation", "expected"), [(0.0, 0.05), (0.5, 0.055)])
def test_a_flat_curve_is_called_falling_as_seldom_as_the_level_says(correlation, expected):
    assert within(answers(0.0, correlation, 1).get("still learning", 0), expected)


def test_strong_correlation_is_met_by_wider_blocks():
    assert answers(0.0, 0.9, 2).get("still learning", 0) < 0.13  # a trend test on the points: 35 %


@pytest.mark.parametrize(("change", "least"), [(-0.02, 0.75), (-0.05, 0.99)])
def test_a_falling_curve_is_found(change, least):
    assert answers(change, 0.0, 3)["still learning"] > least


def test_a_rising_accuracy_is_learning_and_a_rising_loss_is_not():
    assert answers(0.05, 0.0, 4, better="higher")["still learning"] > 0.99
    assert answers(0.05, 0.0, 4)["getting worse"] > 0.99


def test_the_slope_of_a_curve_without_noise_is_exact():
    steps = range(1, 1001)
    found = trend(steps, [3 - 0.1 * math.log2(step) for step in steps], margin=0.01)
    assert (found.answer, found.first_step) == ("still learning", 500)
    assert found.slope.estimate == pytest.approx(-0.1)
    assert found.slope.high == pytest.approx(-0.1)


def test_a_drop_of_the_rate_is_no_trend():
    steps = np.arange(1, 2001)
    values = np.where(steps <= 1600, 1.0, 0.8) + 1e-4 * np.random.default_rng(0).normal(size=2000)
    assert trend(steps, values, margin=0.01).answer == "still learning"
    found = trend(steps, values, margin=0.01, since=1600)
    assert (found.answer, found.first_step) == ("flat", 1600)


def test_what_cannot_be_told_says_how_many_more_steps_would_tell():
    rng = np.random.default_rng(5)
    steps = np.arange(1, 201)
    found = trend(steps, 1 - 0.05 * np.log2(steps) + 0.2 * rng.normal(size=200), margin=0.01)
    assert found.answer == "cannot tell yet"
    assert found.slope.low < 0 < found.slope.high
    assert found.more_steps is None or found.more_steps > 0
    short = trend([1, 2, 3], [1.0, 0.9, 0.8], margin=0.01)
    assert (short.answer, short.slope, short.first_step) == ("cannot tell yet", None, 2)
    for steps in ([], [7]):
        alone = trend(steps, [1.0] * len(steps), margin=0.01)
        assert (alone.answer, alone.more_steps) == ("cannot tell yet", None)


@pytest.mark.parametrize(("gap", "since", "start"), [(1, 0, 3), (50, 0, 9), (50, 1000, 23), (20, 990, 52)])
def test_with_too_few_points_it_says_when_there_are_enough(gap, since, start):
    """At this step there is an answer, and two points earlier there is none."""

    def at(count):
        return trend([gap * i for i in range(1, count + 1)], [1.0] * count, margin=0.01, since=since)

    few = at(start)
    assert (few.answer, few.slope) == ("cannot tell yet", None)
    enough = -(-(gap * start + few.more_steps) // gap)
    assert at(enough).answer == "flat"
    assert at(enough - 2).slope is None


def test_a_relative_trend_does_not_depend_on_the_unit():
    steps = np.arange(1, 201)
    values = 2 - 0.04 * np.log2(steps / 200) + 0.001 * np.random.default_rng(6).normal(size=200)
    found = [relative_trend(steps, unit * values) for unit in (1.0, 1000.0)]
    assert found[0].slope.estimate == pytest.approx(found[1].slope.estimate)
    # 0.04 of a mean of 2.018, within four standard errors.
    assert found[0].slope.estimate == pytest.approx(-0.0198, abs=7e-4)
    assert [each.answer for each in found] == ["still learning"] * 2
    assert relative_trend(steps, np.zeros(200)).answer == "flat"
    assert relative_trend([], []).answer == "cannot tell yet"


STAIRS = Schedule(base_lr=0.4, num_steps=4000, warmup_steps=100, boundaries=(1605, 3000))


def test_a_loss_is_judged_since_the_drop_of_the_rate_without_the_mean_of_both_rates():
    """Means over 10 steps; the drop lies in the middle of one."""
    steps = np.arange(10, 2001, 10)
    losses = np.where(steps <= 1600, 1.0, 0.8) + 1e-4 * np.random.default_rng(0).normal(size=200)
    losses[160] = 0.9  # steps 1601 to 1610
    found = loss_trend(steps.tolist(), losses.tolist(), STAIRS)
    assert (found.answer, found.first_step) == ("flat", 1610)
    cosine = Schedule(base_lr=0.4, num_steps=4000, kind="cosine")
    assert loss_trend(steps.tolist(), losses.tolist(), cosine).first_step == 1000


def test_a_loss_in_words_has_its_numbers_or_there_are_no_words():
    steps = list(range(10, 1501, 10))
    # At step 1500 the loss is 1.5, and the mean of what is looked at is close to 1.52.
    losses = [1.5 - 0.045 * math.log2(step / 1500) for step in steps]
    line = "loss 1.5, still learning (-3.0 % per doubling, 90 % interval -3.0 to -3.0)"
    assert loss_line(steps, losses, STAIRS) == line
    assert loss_line(steps[:10], losses[:10], STAIRS) == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2], [1.0], 0.1), "values: 1; accepted: 2, one for each step"),
        (([2, 1], [1.0, 1.0], 0.1), "steps: not ascending from 1"),
        (([0, 1], [1.0, 1.0], 0.1), "steps: not ascending from 1"),
        (([1, 2], [1.0, math.nan], 0.1), "values: not all finite"),
        (([1, 2], [1.0, 1.0], 0.0), "margin: 0.0; accepted: above 0"),
    ],
)
def test_what_is_no_curve_is_refused_in_one_line(arguments, message):
    steps, values, margin = arguments
    with pytest.raises(ConfigError) as caught:
        trend(steps, values, margin=margin)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
