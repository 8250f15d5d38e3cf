"""What one sees of a study while it runs."""

import io
import logging
import re
import sys

import pytest
from rich.console import Console
from unit.studies.study_scores import score

from bit_ray.log_lines import StderrHandler
from bit_ray.run_folder import RunFolder
from bit_ray.studies import display as module
from bit_ray.studies.display import Display, Goal
from bit_ray.studies.engine import Study
from bit_ray.studies.tuner import Trial

GOAL = Goal(measures=("val-a/top_1", "val-b/top_1"))


def trials(number):
    return [
        Trial(key=f"trial-{n}", identity="0" * 64, params={"lr": 0.1 * (n + 1)}, arguments=(), size=1000.0)
        for n in range(number)
    ]


def shown_of(display, monkeypatch, *, is_terminal):
    out = io.StringIO()
    monkeypatch.setattr(module, "console", Console(file=out, width=120, force_terminal=is_terminal, markup=False))
    monkeypatch.setattr("bit_ray.progress.console", module.console)
    display._is_table = is_terminal
    return out


@pytest.fixture
def study(tmp_path):
    return Study(RunFolder(str(tmp_path)), trials(6), lambda uri, identity: None)


def test_the_table_has_the_running_ones_the_best_and_what_is_left(study, monkeypatch):
    display = Display("rates: trials", GOAL, 3.6, study)
    out = shown_of(display, monkeypatch, is_terminal=True)
    done = [(0.4, 0.5, {}), (0.8, 0.9, {"stopped_at": 25}), (0.6, 0.7, {}), (0.0, 0.0, {"diverged": True})]
    with display.open(6):
        for trial in list(study.trials.values())[:5]:
            display.started(trial)
        for trial, (a, b, changes) in zip(study.trials.values(), done, strict=False):
            study.scores[trial.key] = score({"val-a/top_1": a, "val-b/top_1": b}, device_s=600.0, **changes)
            display.finished(trial)
        made = display.table()
        module.console.print(made)
    text = out.getvalue()
    # 2 of 6 left, 600 s each, both at a time; 3.60 an hour is 0.001 a second.
    assert "rates: trials: 4 of 6 done, 2 left, 10 min, 1.20 to pay" in text
    assert "best so far: lr 0.3: 0.65" in text
    rows = list(zip(*(column.cells for column in made.columns), strict=True))
    assert rows[0] == ("lr 0.5", "running, 0 s", "")
    assert rows[1] == ("lr 0.4", "done in 10 min (diverged)", "0")
    assert rows[3] == ("lr 0.2", "done in 10 min (stopped at step 25)", "")
    assert rows[4] == ("lr 0.1", "done in 10 min", "0.45")
    assert len(rows) == 5


def test_a_small_terminal_shows_all_that_matters_most(study, monkeypatch):
    """40 columns and 12 lines: nothing at the top is cut, and what there is no room for is what ended first."""
    for trial in study.trials.values():
        trial.params.update({"recipe.weight_decay": 1e-4, "recipe.base_lr_per_256": 0.16})
    display = Display("rates: trials", GOAL, 3.6, study)
    out = io.StringIO()
    # As `bit_ray.progress.console`, which does not wrap lines.
    small = Console(file=out, width=40, height=12, force_terminal=True, markup=False, soft_wrap=True)
    monkeypatch.setattr(module, "console", small)
    display._is_table = True
    with display.open(6):
        for trial in study.trials.values():
            display.started(trial)
        for trial in list(study.trials.values())[:5]:
            study.scores[trial.key] = score({"val-a/top_1": 0.4, "val-b/top_1": 0.5}, device_s=600.0)
            display.finished(trial)
        out.truncate(out.seek(0))
        small._live_stack[0].refresh()
        lines = [re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", line).strip() for line in out.getvalue().splitlines()]
    assert max(map(len, lines)) <= 40
    assert " ".join(lines[:4]) == (
        "rates: trials: 5 of 6 done, 1 left, 10 min, 0.60 to pay best so far: lr 0.1, weight_decay 0.0001, "
        "base_lr_per_256 0.16: 0.45"
    )
    assert any("running" in line for line in lines)


def test_elsewhere_there_is_a_line_for_each_training_and_a_count(study, monkeypatch):
    display = Display("rates: trials", GOAL, 0.0, study)
    out = shown_of(display, monkeypatch, is_terminal=False)
    [first, *_] = study.trials.values()
    with display.open(6):
        display.started(first)
        study.scores[first.key] = score({"val-a/top_1": 0.4, "val-b/top_1": 0.5}, device_s=60.0)
        display.finished(first)
    lines = out.getvalue().splitlines()
    assert lines[0] == "lr 0.1: val-a/top_1 0.4, val-b/top_1 0.5; 5 left, 5 min"
    assert lines[1].startswith("rates: trials: 1/6 trainings")


def test_a_warning_stands_above_the_table_as_a_whole(study, monkeypatch):
    display = Display("rates: trials", GOAL, 0.0, study)
    out = shown_of(display, monkeypatch, is_terminal=True)
    monkeypatch.setattr(sys, "stderr", errors := io.StringIO())
    monkeypatch.setattr(errors, "isatty", lambda: True)
    logger, handler = logging.getLogger("bit_ray"), StderrHandler()
    logger.addHandler(handler)
    try:
        with display.open(6):
            logger.warning("MLflow cannot be used")
    finally:
        logger.removeHandler(handler)
    assert "MLflow cannot be used" in out.getvalue()
    assert errors.getvalue() == ""


def test_a_failed_training_leaves_no_line_and_lower_may_be_better(study, monkeypatch):
    display = Display("decay: trainings", Goal(measures=("val/loss",), better="lower"), 0.0, study)
    out = shown_of(display, monkeypatch, is_terminal=True)
    first, second, third, *_ = study.trials.values()
    with display.open(6):
        display.started(first)
        display.finished(first)
        for trial, loss in ((second, 2.0), (third, 1.5)):
            study.scores[trial.key] = score({"val/loss": loss})
            display.finished(trial)
    assert list(display.table().columns[0].cells) == ["lr 0.3", "lr 0.2"]
    assert "best so far: lr 0.3: 1.5" in out.getvalue()
    assert "decay: trainings: 2 of 6 done" in out.getvalue()
