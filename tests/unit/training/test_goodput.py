import pytest

from bit_ray.errors import ConfigError
from bit_ray.run_records import Attempt, PlannedTime
from bit_ray.training.goodput import (
    StepTime,
    compared,
    furthest_and_last,
    goodput,
    lost_steps,
    pays,
    planned_time,
    with_report,
)


def attempt(**values):
    about = {"number": 1, "why": "", "num_workers": 1, "shares": (8,), "micro_batch_size": 8, "first_step": 0}
    return Attempt(**{**about, **values})


def test_steps_that_were_taken_before_do_not_count_as_productive():
    first = with_report(attempt(), 0, 20, 20, 10.0)
    assert (first.productive_s, first.replayed_s, first.last_step) == (10.0, 0.0, 20)
    # It had come to step 50, and the next attempt begins at 40: 10 of its first 30 steps are taken again.
    again = with_report(attempt(first_step=40), 50, 70, 30, 15.0)
    assert (again.productive_s, again.replayed_s, again.last_step) == (pytest.approx(10.0), pytest.approx(5.0), 70)
    behind = with_report(attempt(first_step=40), 100, 60, 20, 4.0)
    assert (behind.productive_s, behind.replayed_s) == (0.0, 4.0)


def test_all_seconds_of_all_attempts_are_accounted_for():
    spent = goodput(
        [
            attempt(productive_s=60.0, wall_s=90.0, waited_s=10.0, ended="left"),
            attempt(productive_s=30.0, replayed_s=20.0, wall_s=110.0, steps_lost=7),
        ]
    )
    assert spent.share == pytest.approx(0.45)
    assert spent.other_s == pytest.approx(200 - 90 - 20 - 10)
    metrics = spent.metrics()
    assert metrics["run/goodput"] == pytest.approx(0.45)
    assert (metrics["run/attempts"], metrics["run/steps_lost"]) == (2, 7)
    parts = sum(metrics[f"run/{part}_s"] for part in ("productive", "replayed", "waited", "other"))
    assert parts == pytest.approx(metrics["run/wall_s"])
    assert str(spent).startswith("goodput 45%: 90 s of new steps in 200 s; 2 attempts, 7 steps lost (20 s again)")
    assert goodput([]).share == 0


def test_how_far_a_run_came_is_the_most_that_the_folder_or_the_tracker_knows():
    assert furthest_and_last([], 0) == (0, 0)
    assert furthest_and_last([], 8) == (8, 8)  # of an earlier version, which recorded no attempts
    killed = [attempt(last_step=50, ended="running")]
    assert furthest_and_last(killed, 40) == (50, 50)
    assert furthest_and_last(killed, 57) == (57, 57)
    # The second attempt began at 40 and came to 45: what was lost of the first is not lost again.
    assert furthest_and_last([attempt(last_step=50), attempt(first_step=40, last_step=45)], 50) == (50, 45)


def test_what_is_lost_with_workers_or_a_program_that_died_is_said_to_be_at_least_what_was_recorded():
    left, failed, killed = (attempt(ended=ended) for ended in ("left", "failed", "running"))
    assert [lost_steps(0, before) for before in (None, left)] == ["no step lost"] * 2
    assert [lost_steps(0, before) for before in (failed, killed)] == ["no recorded step lost"] * 2
    assert lost_steps(1, left) == "1 step lost"
    assert lost_steps(1234, left) == "1,234 steps lost"
    for before in (failed, killed):
        assert lost_steps(7, before) == "at least 7 steps lost"
        assert "; 2 attempts, at least 7 steps lost (" in str(goodput([before, attempt(steps_lost=7)]))


def test_growth_must_save_twice_what_a_start_costs():
    # 1,000 steps of 1 s on 2 workers take 500 s on 4: 500 s are saved.
    assert pays(2, 2, 1000, 1.0, 250.0)
    assert not pays(2, 2, 1000, 1.0, 251.0)
    # From 8 to 9 workers only a ninth is saved.
    assert not pays(8, 1, 1000, 1.0, 60.0)
    assert pays(8, 1, 1000, 1.0, 55.0)


def test_the_time_of_a_run_is_planned_from_its_first_steps_without_the_first_report():
    # 1,000 steps, 20 a report; the first report took 30 s, later steps 0.5 s each, one report 0.6 s.
    times = [StepTime(20, 20, 30.0), StepTime(40, 20, 10.0), StepTime(60, 20, 12.0), StepTime(80, 20, 8.0)]
    assert planned_time(times[:1], 1000, 45.0) is None
    assert planned_time(times[:3], 1000, 70.0) is None  # 40 steps of 50
    planned = planned_time(times, 1000, 80.0)
    assert planned is not None
    assert (planned.seconds, planned.low, planned.high) == pytest.approx((80 + 460, 80 + 368, 80 + 552))
    assert planned.source == "its first 80 steps"
    # Of a long run after a minute.
    assert planned_time([times[0], StepTime(40, 20, 61.0)], 10**6, 95.0) is not None


def test_planned_and_taken_are_compared_in_one_line():
    planned = PlannedTime(seconds=3600.0, low=3300.0, high=3900.0, source="its first 40 steps")
    assert compared(planned, 3780.0) == (
        "planned 60 min (55 min to 65 min; from its first 40 steps), took 63 min (+5%)"
    )
    short = PlannedTime(seconds=100.0, low=90.0, high=110.0, source="a plan")
    assert compared(short, 89.0) == "planned 100 s (90 s to 110 s; from a plan), took 89 s (-11%)"


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan"), 10.0])
def test_a_record_of_a_time_that_cannot_be_is_refused(seconds):
    with pytest.raises(ConfigError):
        PlannedTime(seconds=seconds, low=1.0, high=5.0, source="")
