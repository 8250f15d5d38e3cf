"""What is said of the rule and a sweep, and which trainings of the comparison see the test sets."""

import itertools
import json

import numpy as np
import pytest
from scipy import stats
from unit.studies.study_scores import cell, outcome, score

from bit_ray.config import from_json, to_dict
from bit_ray.data.shards.scan import read_labels
from bit_ray.errors import BitRayError, ConfigError
from bit_ray.studies.compare import SMALL_SPACE, _axes, _first_jobs, _second_jobs, _task, compare_report
from bit_ray.studies.inputs import Inputs
from bit_ray.studies.outcome import CellOutcome, Outcome
from bit_ray.studies.report import render
from bit_ray.studies.study_config import CompareConfig
from bit_ray.tracking.config import TrackingConfig

SPACE = ("rule.base-lr=log:1e-4:1e-1",)
TASKS = ("1: digits, 5 per class", "2: pets")
RNG = np.random.default_rng(0)
# Top-1 of 8 trials on both halves; of 3 seeds of the rule on the part, and of the rule and the best on the test set.
HALVES = {task: np.round(RNG.uniform(0.4, 0.9, (8, 2)), 3) for task in TASKS}
ON_PART = {TASKS[0]: [0.60, 0.62, 0.67], TASKS[1]: [0.70, 0.71, 0.75]}
RULE = {TASKS[0]: [0.70, 0.71, 0.69], TASKS[1]: [0.80, 0.82, 0.81]}
BEST = {TASKS[0]: [0.75, 0.77, 0.74], TASKS[1]: [0.81, 0.80, 0.83]}


def config(**changes):
    settings = {"name": "duel", "init": "x", "tasks": ("a,b,5", "c,d"), "space": SPACE, "trials": 8, "seeds": 3}
    return CompareConfig(**settings | changes)


def cells_of(task, **changes):
    """The trainings of a task as the comparison has them; ``best`` or others can be left out or changed."""
    parts = {"on_part": ON_PART[task], "rule": RULE[task], "best": BEST[task], "halves": HALVES[task]} | changes
    prefix, cells = f"task-{task[0]}", []
    for number, (a, b) in enumerate(parts["halves"]):
        params = {"task": task, "what": "trial", "trial": number, "rule.base_lr": 0.001 * (number + 1)}
        final = {"val-a/top_1": float(a), "val-b/top_1": float(b)}
        made = score(final, [(25, final), (50, final), (100, final)], images=1000 * (number + 1), device_s=90.0)
        cells.append(cell(f"{prefix}-trial-{number:04d}", params, made))
    for seed, top_1 in enumerate(parts["on_part"]):
        params = {"task": task, "what": "rule on the part", "seed": seed}
        cells.append(cell(f"{prefix}-part-{seed}", params, score({"val-a/top_1": top_1, "val-b/top_1": top_1})))
    for what in ("rule", "best"):
        for seed, top_1 in enumerate(parts[what]):
            made = None if top_1 is None else score({"test/top_1": top_1}, images=500, device_s=10.0 * (seed + 1))
            cells.append(cell(f"{prefix}-{what}-{seed}", {"task": task, "what": what, "seed": seed}, made))
    return cells


def report(cells, missing=(), **changes):
    return compare_report(outcome("compare", config(**changes), cells, missing=missing))


def points(value):
    return f"{100 * value:.1f} points"


def test_the_regret_is_paired_by_seed_and_told_with_what_the_sweep_costs():
    cells = cells_of(TASKS[0])
    made = report([*cells[-1:], *cells[:-1]], price=3.0)  # whatever the order
    paired = stats.ttest_rel(BEST[TASKS[0]], RULE[TASKS[0]]).confidence_interval(0.95)
    assert made.findings[0] == (
        "1: digits, 5 per class: a sweep of 8 trials costs 36,000 images, 0.20 device-hours, 0.60 to pay and is 5.3 "
        f"points better than the rule on the test set (95 % interval of the difference {points(paired.low)} to "
        f"{points(paired.high)})."
    )
    rule, best = (stats.t.interval(0.95, 2, np.mean(v), stats.sem(v)) for v in (RULE[TASKS[0]], BEST[TASKS[0]]))
    assert made.tables[0].rows == (
        (
            TASKS[0],
            f"70.0 ± {100 * (rule[1] - 0.7):.1f} %",
            f"75.3 ± {100 * (best[1] - best[0]) / 2:.1f} %",
            f"5.3 points ({points(paired.low)} to {points(paired.high)})",
            *("500", "36,000", "20.0", "720"),
        ),
    )


def test_a_difference_that_may_be_none_is_not_claimed():
    made = report(cells_of(TASKS[1]))
    paired = stats.ttest_rel(BEST[TASKS[1]], RULE[TASKS[1]]).confidence_interval(0.95)
    assert made.findings[0] == (
        "2: pets: a sweep of 8 trials costs 36,000 images, 0.20 device-hours; on the test set no difference from the "
        f"rule is seen, less than {points(max(-paired.low, paired.high))} (95 % interval)."
    )
    worse = report(cells_of(TASKS[0], best=[0.65, 0.66, 0.64])).findings[0]
    assert "and is 5.0 points worse than the rule on the test set" in worse


def expected_read(halves, n):
    """The top-1 of the best of n trials by one half, read on the other, over all choices of n trials."""
    found = []
    for chosen in itertools.combinations(range(len(halves)), n):
        some = np.array([halves[i] for i in chosen])
        found.append((some[some[:, 0].argmax(), 1] + some[some[:, 1].argmax(), 0]) / 2)
    return np.mean(found)


def test_what_a_sweep_of_n_trials_is_expected_to_gain_is_computed_by_hand():
    halves, rule = HALVES[TASKS[0]], ON_PART[TASKS[0]]
    made = report(cells_of(TASKS[0]), price=3.0)
    [table] = [table for table in made.tables if "expected gain" in table.title]
    assert [row[0] for row in table.rows] == ["1", "2"]  # up to half of 8
    for n, row in zip((1, 2), table.rows, strict=True):
        gain = expected_read(halves, n) - np.mean(rule)
        without = [expected_read(np.delete(halves, i, axis=0), n) for i in range(8)]
        jackknife = 7 / 8 * np.sum((without - np.mean(without)) ** 2)
        half = stats.t.ppf(0.975, 2) * np.sqrt(jackknife + np.var(rule, ddof=1) / 3)
        cost = f"{n * 4500:,} images, {n * 90 / 3600:.3f} device-hours, {n * 90 / 3600 * 3:.2f} to pay"
        assert row == (str(n), points(gain), f"{points(gain - half)} to {points(gain + half)}", cost)
    assert (
        f"1: digits, 5 per class: a sweep of 2 trials costs {cost} and is expected to gain {points(gain)} ± "
        f"{points(half)} over the rule on the validation part."
    ) in made.findings
    # With one trial nothing is selected: it is the mean of all, and its error is that of two means.
    gain = np.mean(halves) - np.mean(rule)
    error = np.sqrt(np.var(np.mean(halves, axis=1), ddof=1) / 8 + np.var(rule, ddof=1) / 3)
    half = stats.t.ppf(0.975, 2) * error
    assert table.rows[0][1:3] == (points(gain), f"{points(gain - half)} to {points(gain + half)}")


def test_over_tasks_the_interval_is_that_of_the_mean_of_their_regrets():
    made = report([*cells_of(TASKS[0]), *cells_of(TASKS[1])])
    regrets = [np.mean(BEST[task]) - np.mean(RULE[task]) for task in TASKS]
    low, high = stats.t.interval(0.95, 1, np.mean(regrets), stats.sem(regrets))
    assert made.findings[0] == (
        f"Over 2 tasks the best of the sweep is {points(np.mean(regrets))} above the rule on the test sets "
        f"(95 % interval over tasks {points(low)} to {points(high)})."
    )
    assert [row[0] for row in made.tables[0].rows] == list(TASKS)
    assert [plot.name for plot in made.plots] == ["gain-1", "fewer-trials-1", "gain-2", "fewer-trials-2"]
    assert made.command == (
        "bit-ray study compare --trials 8 --name duel --init x --tasks a,b,5 c,d --space rule.base-lr=log:1e-4:1e-1 "
        "--seeds 3"
    )
    assert made.missing == ()


def test_the_best_trial_is_told_with_its_border_and_early_stopping():
    halves = HALVES[TASKS[1]].copy()
    halves[0] = 0.95
    made = report(cells_of(TASKS[1], halves=halves), space=("rule.base-lr=log:1e-3:1e-1",))
    assert "2: pets: the best trial has rule.base_lr 0.001." in made.findings
    assert (
        "2: pets: The best is at the lower border of rule.base_lr: a wider space may have a better one."
        in made.findings
    )
    assert [line for line in made.findings if line.startswith("2: pets: Early stopping that keeps a third")]


@pytest.mark.parametrize("best", [[], [None, None, None], [0.75, None, 0.74]])
def test_without_the_trainings_of_the_best_the_rest_is_reported(best):
    made = report(cells_of(TASKS[0], best=best), missing=("1: the best of the sweep on the test set",))
    assert made.missing[-1] == "1: the best of the sweep on the test set"
    assert len(made.missing) == 1 + best.count(None)
    assert not [line for line in made.findings if "on the test set" in line or "Over" in line]
    [row] = made.tables[0].rows
    assert row[1].startswith("70.0 ± ")
    assert row[2:4] == ("" if not any(best) else row[2], "")
    assert [line for line in made.findings if "is expected to gain" in line]


def test_the_rule_and_the_best_are_not_paired_while_other_seeds_are_finished_of_each():
    made = report(cells_of(TASKS[0], rule=[0.7, 0.71, None], best=[None, 0.8, 0.81]))
    assert made.tables[0].rows[0][3] == ""
    assert not [line for line in made.findings if "on the test set" in line]


def test_with_nothing_finished_there_is_a_report():
    for cells in ([], [CellOutcome(key=c.key, params=c.params, score=None) for c in cells_of(TASKS[0])]):
        made = report(cells, missing=("The rest.",))
        assert made.findings == ("Nothing can be said yet.",)
        assert len(made.missing) == min(len(cells), 10) + (len(cells) > 10) + 1
        assert "Nothing can be said yet." in render(made)["report.md"].decode()


def test_trials_of_sobol_do_not_say_what_fewer_would_gain():
    made = report(cells_of(TASKS[0]), search="sobol")
    assert made.plots == ()
    assert not [line for line in made.findings if "expected to gain" in line]


def test_the_report_can_be_made_again_from_json_byte_by_byte():
    made = outcome("compare", config(price=1 / 3), cells_of(TASKS[0], best=[0.7, None, 1 / 3]), missing=("The rest.",))
    again = from_json(Outcome, json.dumps(to_dict(made)).encode())
    assert again == made
    assert render(compare_report(again)) == render(compare_report(made))


SEEDS, TRIALS = 2, 4


@pytest.fixture(scope="module")
def jobs(storage, init):
    """All trainings of the comparison on the embedded digits, as if the trial of the number 2 were the best."""
    settings = CompareConfig(init=init, storage=storage, trials=TRIALS, seeds=SEEDS)
    inputs, axes = Inputs(storage, TrackingConfig()), _axes(settings)
    tasks = [_task(settings, text, number, inputs) for number, text in enumerate(
        ("digits:train,digits:test,5", "digits:train,digits:test,90"))]  # fmt: skip
    first = [job for task in tasks for job in _first_jobs(settings, task, axes, inputs)]
    cells = [
        cell(job.key, job.params, score({f"val-{h}/top_1": float(job.params.get("trial") == 2) for h in "ab"}))
        for job in first
    ]
    second = [job for task in tasks for job in _second_jobs(settings, task, axes, cells, inputs)]
    return tasks, first, second, inputs


def test_the_test_sets_are_read_once_by_each_training_of_the_rule_and_of_the_best(jobs):
    tasks, first, second, inputs = jobs
    test = inputs.part("digits:test")
    reads = [job for job in first + second if job.cell.test is not None]
    assert len(reads) == 2 * SEEDS * len(tasks)
    assert {job.params["what"] for job in reads} == {"rule", "best"}
    assert all(job.cell.test == test and not job.cell.parts for job in reads)
    assert all(job in reads for job in second)
    assert len(first) == len(tasks) * (TRIALS + 2 * SEEDS)
    keys = [job.key for job in first + second]
    assert len(set(keys)) == len(keys)
    # Nobody else opens the test set at all, and none of its examples are in the training set.
    others = [job.cell for job in first + second if job not in reads]
    opened = {part.shards for one in others for part in (one.train, *one.parts.values())}
    assert opened == {inputs.part("digits:train").shards}
    ids = [set(read_labels(uri, inputs.manifest(uri))[0]) for uri in (*opened, test.shards)]
    assert not ids[0] & ids[1]


def test_what_is_selected_on_is_not_learnt_from_and_the_last_trainings_have_all_examples(jobs):
    tasks, first, second, inputs = jobs
    for task in tasks:
        held = {row for half in task.halves.values() for row in half.rows}
        selected = [job for job in first if job.params["task"] == task.name and job.params["what"] != "rule"]
        assert len(selected) == TRIALS + SEEDS
        for job in selected:
            assert job.cell.parts == task.halves
            assert not held & set(job.cell.train.rows)
            assert held | set(job.cell.train.rows) == set(task.whole.rows)
            assert job.cell.plan.num_examples == len(job.cell.train.rows)
        whole = [job for job in first + second if job.params["task"] == task.name and job not in selected]
        assert len(whole) == 2 * SEEDS
        assert all(job.cell.train == task.whole for job in whole)
    assert [task.whole for task in tasks] == [inputs.draw(inputs.part("digits:train"), shots, 0) for shots in (5, 90)]
    assert [task.name for task in tasks] == ["1: digits-train, 5 per class", "2: digits-train, 90 per class"]


def test_the_best_is_trained_with_the_settings_of_its_trial(jobs):
    tasks, first, second, _ = jobs
    for task in tasks:
        [trial] = [job for job in first if job.params["task"] == task.name and job.params.get("trial") == 2]
        best = [job for job in second if job.params["task"] == task.name]
        assert [job.params["seed"] for job in best] == [job.cell.plan.seed for job in best] == list(range(SEEDS))
        for job in best:
            assert job.cell.plan.schedule.base_lr == trial.cell.plan.schedule.base_lr == trial.params["rule.base_lr"]
            assert job.cell.plan.dropout == trial.params["rule.dropout"]
            assert job.cell.plan.weight_decay == trial.params["rule.weight_decay"]
            assert job.cell.plan.decay_to_init
    others = [job for job in first if job.params["what"] != "trial"]
    assert {job.cell.plan.weight_decay for job in others} == {0.0}
    assert len({repr(job.params) for job in first if job.params["what"] == "trial"}) == 2 * TRIALS


def plans(storage, init, tasks, **changes):
    settings = CompareConfig(init=init, storage=storage, trials=6, search="sobol", tasks=tasks, **changes)
    inputs = Inputs(storage, TrackingConfig())
    task = _task(settings, tasks[0], 0, inputs)
    jobs = _first_jobs(settings, task, _axes(settings), inputs)
    return [job.cell.plan for job in jobs if job.params["what"] == "trial"]


def test_a_resolution_keeps_the_share_that_the_crop_has_of_the_square(storage, init):
    made = plans(storage, init, ("digits:train,digits:test",), space=("resolution=64,128",))
    assert {(plan.view.resize_size, plan.view.crop_size) for plan in made} == {(73, 64), (146, 128)}
    with pytest.raises(ConfigError, match="^space: resolution 'large'; accepted: whole numbers of pixels; correct it$"):
        plans(storage, init, ("digits:train,digits:test",), space=("resolution=large",))


def test_a_sweep_may_have_no_weight_decay_among_its_values(storage, init):
    made = plans(storage, init, ("digits:train,digits:test",), space=("rule.weight-decay=0,1e-3",))
    assert {(plan.weight_decay, plan.decay_to_init) for plan in made} == {(0.0, False), (1e-3, True)}


def test_the_papers_space_is_that_of_ones_own_tasks(storage, init):
    names = [axis.name for axis in _axes(CompareConfig(init=init, tasks=("a,b",)))]
    assert names == [
        "rule.base_lr",
        "rule.num_steps",
        "rule.dropout",
        "rule.weight_decay",
        "rule.mixup_alpha",
        "resolution",
    ]
    assert len(_axes(CompareConfig())) == len(SMALL_SPACE)
    made = plans(storage, init, ("digits:train,digits:test,3",))
    assert len({plan.view.crop_size for plan in made}) > 1


def test_each_task_has_trials_of_its_own(storage, init):
    settings = CompareConfig(init=init, storage=storage, trials=3, tasks=("digits:train,digits:test",), seeds=2)
    inputs = Inputs(storage, TrackingConfig())
    drawn = [
        [job.params["rule.base_lr"] for job in _first_jobs(settings, _task(settings, settings.tasks[0], number, inputs),
         _axes(settings), inputs) if job.params["what"] == "trial"] for number in (0, 1)
    ]  # fmt: skip
    assert not set(drawn[0]) & set(drawn[1])


@pytest.mark.parametrize(
    ("task", "space", "message"),
    [
        ("digits:train,digits:test,1", (), "^val_share: class '0' of .* has one example"),
        ("digits:train,digits:test,500", (), "^shots: 500; accepted: at most 99, the number of examples of class"),
        ("digits:train,glyphs:s", (), "^tasks: .*glyphs-s has 50 classes that are not those of the training shards"),
        (
            "digits:train,digits:test",
            ("rule.base-lt=log:1e-4:1",),
            r"^space: rule\.base_lt: .*did you mean rule\.base_lr\?$",
        ),
    ],
)
def test_a_task_or_a_space_that_cannot_be_is_refused(storage, init, task, space, message):
    with pytest.raises(BitRayError, match=message) as caught:
        plans(storage, init, (task,), space=space)
    assert "\n" not in str(caught.value)
