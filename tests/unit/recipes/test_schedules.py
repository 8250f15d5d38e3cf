import dataclasses
import math

import pytest

from bit_ray.config import from_dict, to_dict
from bit_ray.errors import ConfigError
from bit_ray.recipes.schedules import Schedule, epochs_to_steps


def hyperrule_schedule(**changes):
    settings = {"base_lr": 0.003, "num_steps": 500, "warmup_steps": 100, "boundaries": (200, 300, 400)}
    return Schedule(**{**settings, "boundary_rule": "hyperrule", **changes})


def upstream_schedule(**changes):
    return Schedule(**{"base_lr": 0.48, "num_steps": 90, "warmup_steps": 5, "boundaries": (30, 60, 80), **changes})


def test_hyperrule_keeps_the_rate_at_the_boundary_and_lowers_it_after():
    schedule = hyperrule_schedule()
    expected = {0: 0.0, 1: 3e-5, 50: 1.5e-3, 99: 2.97e-3, 100: 3e-3, 200: 3e-3, 201: 3e-4, 300: 3e-4, 301: 3e-5}
    expected |= {400: 3e-5, 401: 3e-6, 499: 3e-6}
    assert {step: schedule.lr_at(step) for step in expected} == pytest.approx(expected, rel=1e-12, abs=0)


def test_hyperrule_does_not_decay_during_warmup():
    schedule = hyperrule_schedule(boundaries=(50, 300, 400))
    assert schedule.lr_at(99) == 0.003 * 99 / 100
    assert schedule.lr_at(100) == pytest.approx(3e-4)
    assert schedule.table() == [(0, 0.0), (100, 0.003 / 10), (301, 0.003 / 10 / 10), (401, 0.003 / 10 / 10 / 10)]


def test_upstream_lowers_the_rate_from_the_boundary_on():
    schedule = upstream_schedule()
    expected = {
        0: 0.0,
        1: 0.096,
        4: 0.384,
        5: 0.48,
        29: 0.48,
        30: 0.048,
        59: 0.048,
        60: 0.0048,
        79: 0.0048,
        80: 0.00048,
    }
    assert {step: schedule.lr_at(step) for step in expected} == pytest.approx(expected, rel=1e-12, abs=0)
    assert sum(schedule.lr_at(step) > 0.048 for step in range(5, 90)) == 25  # exactly 30 steps before the first decay


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # Steps done: that many, the last of them at the rate of step - 1, counted from 0.
        (upstream_schedule(), {0: 0, 3: 0, 5: 0, 6: 5, 30: 5, 31: 30, 60: 30, 61: 60, 90: 80}),
        (hyperrule_schedule(), {100: 0, 101: 100, 201: 100, 202: 201, 500: 401}),
        (hyperrule_schedule(boundaries=(50, 300)), {60: 0, 101: 100, 301: 100, 302: 301}),
        (upstream_schedule(kind="cosine"), {1: 0, 31: 0, 90: 0}),
        (upstream_schedule(warmup_steps=0, boundaries=()), {0: 0, 1: 0, 90: 0}),
    ],
)
def test_the_last_change_of_the_rate_is_known(schedule, expected):
    assert {done: schedule.last_change(done) for done in expected} == expected
    if schedule.kind == "staircase":
        for done, since in expected.items():
            if since:
                assert schedule.lr_at(done - 1) == schedule.lr_at(since) != schedule.lr_at(since - 1)


def test_upstream_warmup_multiplies_the_staircase():
    schedule = upstream_schedule(warmup_steps=40)
    assert schedule.lr_at(29) == pytest.approx(0.48 * 29 / 40)
    assert schedule.lr_at(30) == pytest.approx(0.048 * 30 / 40)


def test_cosine_falls_from_the_end_of_warmup():
    schedule = upstream_schedule(kind="cosine", warmup_steps=10)
    assert schedule.lr_at(5) == pytest.approx(0.24)
    assert schedule.lr_at(10) == pytest.approx(0.48)
    assert schedule.lr_at(50) == pytest.approx(0.24)
    assert schedule.lr_at(89) == pytest.approx(0.24 * (1 + math.cos(math.pi * 79 / 80)))
    assert [step for step, _ in schedule.table()] == [0, 10, 29, 49, 69, 89]


@pytest.mark.parametrize("schedule", [hyperrule_schedule(), upstream_schedule(), upstream_schedule(warmup_steps=0)])
def test_table_has_every_step_at_which_the_rate_changes_after_warmup(schedule):
    steps = range(schedule.warmup_steps + 1, schedule.num_steps)
    changes = {step for step in steps if schedule.lr_at(step) != schedule.lr_at(step - 1)}
    assert schedule.table() == [(s, schedule.lr_at(s)) for s in sorted({0, schedule.warmup_steps} | changes)]


def test_other_decay_factor():
    assert upstream_schedule(decay=0.5).lr_at(60) == pytest.approx(0.12)


def test_config_round_trip():
    schedule = hyperrule_schedule()
    assert from_dict(Schedule, to_dict(schedule)) == schedule


@pytest.mark.parametrize("step", [-1, 500])
def test_a_step_outside_the_run_is_refused(step):
    with pytest.raises(ConfigError, match="step: .*0 to 499"):
        hyperrule_schedule().lr_at(step)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_lr": 0.0}, "base_lr: 0.0; accepted: a number above 0"),
        ({"base_lr": math.nan}, "base_lr: nan"),
        ({"num_steps": 0}, "num_steps: 0; accepted: at least 1"),
        ({"warmup_steps": 500}, "warmup_steps: 500; accepted: 0 to 499"),
        ({"warmup_steps": -1}, "warmup_steps: -1"),
        ({"boundaries": (300, 200)}, "boundaries: .*ascending"),
        ({"boundaries": (200, 501)}, "boundaries: .*0 to 500"),
        ({"boundaries": (-1,)}, "boundaries: .*0 to 500"),
        ({"decay": 0.0}, "decay: 0.0"),
        ({"decay": 1.5}, "decay: 1.5"),
    ],
)
def test_bad_settings_are_refused_in_one_line(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        dataclasses.replace(hyperrule_schedule(), **changes)
    assert "\n" not in str(caught.value)


def test_ilsvrc_epochs_become_the_known_steps():
    assert [epochs_to_steps(epochs, 1_281_167, 4096) for epochs in (90, 30, 60, 80)] == [28_151, 9_384, 18_767, 25_023]


def test_epochs_round_half_up_and_may_be_fractions():
    assert epochs_to_steps(1, 5, 2) == 3
    assert epochs_to_steps(0.5, 100, 10) == 5
