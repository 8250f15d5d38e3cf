"""What is said of a sweep, and what its trials may see."""

import json

import numpy as np
import pytest
from unit.studies.study_scores import cell, outcome, score

from bit_ray.config import from_json, to_dict
from bit_ray.errors import ConfigError
from bit_ray.evaluation.statistics import expected_best_band
from bit_ray.studies.inputs import Inputs
from bit_ray.studies.outcome import Outcome
from bit_ray.studies.report import render
from bit_ray.studies.spaces import parse_space
from bit_ray.studies.study_config import SweepConfig, swept
from bit_ray.studies.sweep import _jobs, sweep_report
from bit_ray.tracking.config import TrackingConfig

SPACE = ("rule.base-lr=log:1e-4:1e-1", "rule.mixup-alpha=0.0,0.1")


def config(**changes):
    settings = {"command": "finetune", "name": "rates", "set": ("shards=digits:train", "init=x"), "space": SPACE}
    return SweepConfig(**settings | {"trials": 6} | changes)


def trial(number, tops, *, images=1000, rungs=((0.5, 0.5), (0.5, 0.5)), lr=0.01, alpha=0.1, **changes):
    """A finished trial from its top-1 on both halves of the validation part, at a quarter, a half and the end."""
    measured = [{"val-a/top_1": a, "val-b/top_1": b} for a, b in (*rungs, tops)]
    points = list(zip((25, 50, 100), measured, strict=False))
    values = {"trial": number, "rule.base_lr": lr, "rule.mixup_alpha": alpha}
    return cell(f"trial-{number:04d}", values, score(measured[-1], points, images=images, **changes))


def unfinished(number):
    return cell(f"trial-{number:04d}", {"trial": number, "rule.base_lr": 0.01, "rule.mixup_alpha": 0.1})


def report(cells, **changes):
    return sweep_report(outcome("sweep", config(**changes), cells))


def test_the_best_trial_is_that_of_both_halves_and_of_equals_the_cheapest():
    cells = [
        trial(0, (0.9, 0.5), lr=0.02),
        trial(1, (0.7, 0.9), images=2000, lr=0.03),
        trial(2, (0.875, 0.725), images=1500, lr=0.04),
        trial(3, (0.75, 0.85), images=1500, lr=0.05),
        trial(4, (1.0, 0.5), images=100, lr=0.06, device_s=7200.0),
    ]
    made = report(cells, trials=5, price=1.5)
    assert made.findings[0] == (
        "The best of 5 trials has rule.base_lr 0.04, rule.mixup_alpha 0.1: top-1 80.0 % on the validation part it was "
        "selected by, which is optimistic."
    )
    table = made.tables[0]
    assert table.title == "The best 5 of 5 trials"
    assert table.header == ("trial", "base_lr", "mixup_alpha", "validation top-1", "images", "device s", "price")
    assert [row[0] for row in table.rows] == ["trial-0002", "trial-0003", "trial-0001", "trial-0004", "trial-0000"]
    assert table.rows[3] == ("trial-0004", "0.06", "0.1", "75.0 %", "100", "7,200.0", "3")


@pytest.mark.parametrize(("lr", "end"), [(1.2e-4, "lower"), (0.09, "upper"), (0.01, None)])
def test_a_best_trial_at_the_border_of_the_space_is_told(lr, end):
    made = report([trial(0, (0.9, 0.9), lr=lr), trial(1, (0.5, 0.5))])
    said = [line for line in made.findings if "border" in line]
    expected = f"The best is at the {end} border of rule.base_lr: a wider space may have a better one."
    assert said == ([expected] if end else [])


def stopped(cells):
    return stopped_of(report(cells))


def stopped_of(made):
    return [line for line in made.findings if "arly stopping" in line]


def rungs(first, second):
    return ((first, first), (second, second))


STOPPED = "Early stopping that keeps a third at 25 % and at 50 % of each trial's steps would have saved"


def test_early_stopping_by_hand():
    # 2 of 6 go on at a quarter: 4 save 3/4 of their images. 1 of these 2 goes on at half: the other saves 1/2.
    cells = [
        trial(0, (0.9, 0.9), rungs=rungs(0.6, 0.7)),
        trial(1, (0.8, 0.8), rungs=rungs(0.5, 0.6), images=3000),
        *(trial(n, (0.7, 0.7), rungs=rungs(0.1 * n, 0.9)) for n in (2, 3, 4)),
        trial(5, (0.2, 0.2), rungs=rungs(0.1, 0.1)),
    ]
    saved = (4 * 1000 * 3 / 4 + 3000 / 2) / 8000
    assert stopped(cells) == [f"{STOPPED} {100 * saved:.0f} % of the images and would have kept the best trial."]
    # The slow starter ends best, and is gone; of the two that went on, the one with 0.8 is left.
    cells[5] = trial(5, (1.0, 0.9), rungs=rungs(0.1, 0.1))
    cells[0] = trial(0, (0.9, 0.9), rungs=rungs(0.6, 0.5))
    saved = (4 * 1000 * 3 / 4 + 1000 / 2) / 8000
    assert stopped(cells) == [
        f"{STOPPED} {100 * saved:.0f} % of the images and would have thrown away the best trial, and its own best is "
        "15.0 points below."
    ]


def test_early_stopping_keeps_a_third_rounded_up():
    # 3 of 7 go on, of which the third is the best; then 1 of these 3.
    cells = [trial(n, (0.5 + 0.1 * (n == 4), 0.5), rungs=rungs(0.1 * n, 0.9 - 0.1 * n * (n != 4))) for n in range(7)]
    saved = (4 * 3 / 4 + 2 / 2) / 7
    assert stopped(cells) == [f"{STOPPED} {100 * saved:.0f} % of the images and would have kept the best trial."]


def test_early_stopping_is_not_judged_from_few_trials_or_such_that_were_not_measured():
    whole = [trial(number, (0.5, 0.5)) for number in range(6)]
    assert stopped(whole[:5]) == []
    broken = score({"val-a/top_1": 0.0, "val-b/top_1": 0.0}, diverged=True)
    cells = [*whole[:5], cell("trial-0005", whole[5].params, broken)]
    assert stopped(cells) == [
        "What early stopping would have saved cannot be said: some trials diverged or are too short."
    ]
    assert report(cells).tables[0].rows[-1][3] == "0.0 % (diverged)"


def test_trials_that_were_stopped_are_never_the_best_and_are_counted():
    cells = [
        trial(0, (0.5, 0.5)),
        trial(1, (0.9, 0.9), stopped_at=25, images=250),
        trial(2, (0.6, 0.6), lr=0.02),
        *(trial(number, (0.4, 0.4), stopped_at=50, images=500) for number in (3, 4, 5)),
    ]
    made = report(cells, stop_early=True)
    assert made.findings[0].startswith("The best of 6 trials has rule.base_lr 0.02, rule.mixup_alpha 0.1: top-1 60.0 %")
    assert stopped_of(made) == [
        "Early stopping ended 4 of 6 trials at 25 % or 50 % of their steps. What they would have reached is not known; "
        "run the sweep without it, under another name, to see."
    ]
    assert "What fewer trials would reach is not said: stop_early ends trials before they can be compared." in (
        made.findings
    )
    [table] = made.tables
    assert [row[0] for row in table.rows[:3]] == ["trial-0002", "trial-0000", "trial-0001"]
    assert table.rows[2][3] == "90.0 % (stopped at 25)"
    [line] = made.plots[0].lines
    assert line.y == (0.5, 0.5, 0.6, 0.6, 0.6, 0.6)
    assert line.x[1] == 1250


def test_what_fewer_trials_would_have_reached_is_said_of_random_trials():
    rng = np.random.default_rng(0)
    tops = [tuple(rng.random(2).tolist()) for _ in range(10)]
    made = report([trial(number, top, images=100 * (number + 1)) for number, top in enumerate(tops)], trials=10)
    [table] = [table for table in made.tables if table.title == "What fewer trials would have reached"]
    mark = " (as measured: no more than this sample)"
    assert [row[0] for row in table.rows] == ["1", "2", "5", f"10{mark}"]
    means = [np.mean(top) for top in tops]
    band = expected_best_band(means, 1)
    # One trial, whatever it is chosen by, has the mean of all.
    assert table.rows[0] == ("1", f"{100 * np.mean(means):.1f} %", f"{100 * band.low:.1f} to {100 * band.high:.1f} %",
                             f"{100 * np.mean(means):.1f} %", "550")  # fmt: skip
    # Of all ten, the best of one half is read on the other.
    first, second = np.array(tops).T
    read = (second[first.argmax()] + first[second.argmax()]) / 2
    assert table.rows[3][1] == f"{100 * max(means):.1f} %"
    assert table.rows[3][3:] == (f"{100 * read:.1f} %", "5,500")
    [plot] = [plot for plot in made.plots if plot.name == "fewer-trials"]
    assert plot.lines[0].y == pytest.approx([expected_best_band(means, n).estimate for n in (1, 2, 5, 10)])
    assert plot.lines[1].y[0] == pytest.approx(np.mean(means))
    assert not [line for line in made.findings if "independent" in line]


def test_what_fewer_trials_would_have_reached_can_be_left_out():
    made = report([trial(number, (0.5, 0.6)) for number in range(10)], fewer="never")
    assert [plot.name for plot in made.plots] == ["progress"]
    assert not [line for line in made.findings if "fewer" in line]


@pytest.mark.parametrize("search", ["tpe", "gp", "sobol"])
def test_trials_that_depend_on_each_other_do_not_say_what_fewer_would_have_reached(search):
    made = report([trial(number, (0.5, 0.6)) for number in range(10)], search=search, trials=10)
    assert [table.title for table in made.tables] == ["The best 10 of 10 trials"]
    assert [plot.name for plot in made.plots] == ["progress"]
    assert (
        f"What fewer trials would reach is not said: the trials of search {search} are not independent."
        in made.findings
    )
    assert f"--search {search}" in made.command


def test_the_progress_is_the_best_so_far_against_all_images():
    cells = [trial(0, (0.5, 0.5), images=100), unfinished(1), trial(2, (0.4, 0.4), images=50), trial(3, (0.9, 0.7))]
    [line] = report(cells).plots[0].lines
    assert (line.x, line.y) == ((100.0, 150.0, 1150.0), (0.5, 0.5, 0.8))


def test_a_sweep_in_part_reports_what_is_finished_and_lists_the_rest():
    made = report([trial(0, (0.5, 0.7)), unfinished(1)], trials=5, search="tpe")
    assert made.missing == ("trial-0001: not finished", "3 trials are not proposed yet")
    assert made.findings[0].startswith("The best of 1 trials has ")
    made = report([unfinished(0)], trials=1, search="sobol")
    assert made.findings == ("No trial is finished.",)
    assert made.missing == ("trial-0000: not finished",)
    assert "no data yet" not in render(made)["report.md"].decode()
    assert render(report([]))["report.html"]


def test_trials_on_a_cluster_have_one_validation_part():
    cells = [
        cell(f"trial-{n:04d}", {"trial": n, "rule.base_lr": 0.01, "rule.mixup_alpha": 0.1},
             score({"val/top_1": 0.1 * n, "val/loss": 1.0}, [(100, {})])) for n in range(7)
    ]  # fmt: skip
    made = report(cells, where="cluster", val_shards="s3://bucket/val", trials=7)
    assert "top-1 60.0 % on the validation part" in made.findings[0]
    assert len(made.tables) == 1


def test_the_report_can_be_made_again_from_json_byte_by_byte():
    cells = [trial(number, (0.1 + number / 9, 0.7), images=1000 + number, lr=1 / (3 + number)) for number in range(7)]
    made = outcome("sweep", config(trials=9, price=1 / 3), [*cells, unfinished(7)], missing=("The rest.",))
    again = from_json(Outcome, json.dumps(to_dict(made)).encode())
    assert again == made
    assert render(sweep_report(again)) == render(sweep_report(made))


def test_the_command_has_every_setting_that_is_not_the_default():
    made = report([], search_seed=3, val_share=0.1, set=("shards=a b", "recipe.decay-epochs=[1,2]"), storage="s3://b/c")
    assert made.command == (
        "bit-ray sweep finetune --storage s3://b/c --trials 6 --search-seed 3 --name rates --set 'shards=a b' "
        "'recipe.decay-epochs=[1,2]' --space rule.base-lr=log:1e-4:1e-1 rule.mixup-alpha=0.0,0.1 --val-share 0.1"
    )


def maker(storage, init, **changes):
    settings = config(**{"set": ("shards=digits:train", f"init={init}", "rule.crop=32", "rule.resize=36")} | changes)
    inputs = Inputs(storage, TrackingConfig())
    return _jobs(settings, swept(settings), inputs, parse_space(settings.space)), inputs


@pytest.mark.parametrize("shots", [0, 20])
def test_no_trial_learns_from_the_examples_it_is_selected_on(storage, init, shots):
    make, inputs = maker(storage, init, set=(
        "shards=digits:train", f"init={init}", "rule.crop=32", "rule.resize=36", f"shots={shots}"))  # fmt: skip
    jobs = [make(number, {"rule.base_lr": 0.01 * (number + 1), "rule.mixup_alpha": 0.0}) for number in range(3)]
    whole = inputs.part("digits:train")
    everything = inputs.draw(whole, shots, 0).rows if shots else range(inputs.num_examples("digits:train"))
    for job in jobs:
        learnt = set(job.cell.train.rows)
        first, second = (set(job.cell.parts[name].rows) for name in ("val-a", "val-b"))
        assert not learnt & (first | second)
        assert not first & second
        assert learnt | first | second == set(everything)
        assert len(first | second) == round(0.2 * len(everything))
        # No test set is opened: all that it reads is the training set.
        assert (job.cell.test, job.cell.probe) == (None, None)
        assert {part.shards for part in (job.cell.train, *job.cell.parts.values())} == {whole.shards}
        assert job.cell.at_steps == (125, 250)
        assert job.cell.plan.num_examples == len(learnt)
    assert [job.cell.plan.seed for job in jobs] == [0, 1, 2]
    assert [job.cell.plan.schedule.base_lr for job in jobs] == [0.01, 0.02, 0.03]
    assert jobs[1].params == {"trial": 1, "rule.base_lr": 0.02, "rule.mixup_alpha": 0.0}
    assert len({job.cell.identity for job in jobs}) == 3


def test_a_set_to_select_on_is_used_as_a_whole_and_the_training_set_too(storage, init):
    make, inputs = maker(storage, init, val_shards="digits:test")
    cell = make(0, {"rule.base_lr": 0.01}).cell
    assert cell.train == inputs.part("digits:train")
    assert sorted([*cell.parts["val-a"].rows, *cell.parts["val-b"].rows]) == list(range(800))
    assert {part.shards for part in cell.parts.values()} == {inputs.part("digits:test").shards}
    with pytest.raises(ConfigError, match="^val_shards: .* classes that are not those of the training shards"):
        maker(storage, init, val_shards="glyphs:s:val")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rule.base_lt": 0.1}, r"^space: rule\.base_lt: unknown setting; .*; did you mean rule\.base_lr\?$"),
        ({"rule.base_lr": -1}, r"^space: rule.base_lr: -1\.0; accepted: a number above 0"),
        ({"rule.base_lr": "high"}, r"^space: rule\.base_lr: given 'high' \(str\); accepted: "),
        ({"model": "R50x1"}, r"^model: R50x1, but .* R1-1-1-1x0\.5; leave it out$"),
    ],
)
def test_a_value_that_a_training_refuses_is_refused_in_one_line(storage, init, values, message):
    make, _ = maker(storage, init)
    with pytest.raises(ConfigError, match=message) as caught:
        make(0, values)
    assert "\n" not in str(caught.value)
