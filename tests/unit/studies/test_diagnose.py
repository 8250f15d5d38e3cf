import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_training import pretrain_plan

from bit_ray import store
from bit_ray.cli.main import main
from bit_ray.config import to_dict
from bit_ray.progress import console
from bit_ray.recipes.schedules import Schedule
from bit_ray.run_folder import RunFolder
from bit_ray.run_records import RunRecord
from bit_ray.studies.diagnose import judge
from bit_ray.tracking.config import TrackingConfig
from bit_ray.tracking.runs import TrackedRun

STAIRS = Schedule(base_lr=0.4, num_steps=4000, warmup_steps=100, boundaries=(1600, 3000))
COSINE = Schedule(base_lr=0.4, num_steps=4000, kind="cosine")


def curve(change=0.0, *, stop=1500, every=10, level=1.0, noise=0.001, seed=0):
    """Points about a level that changes by so much per doubling of the steps; the last value is the level."""
    steps = np.arange(every, stop + 1, every)
    values = level + change * np.log2(steps / stop) + noise * np.random.default_rng(seed).normal(size=len(steps))
    return list(zip(steps.tolist(), values.tolist(), strict=True))


def judged(loss, norm=None, schedule=STAIRS, **probes):
    """Answers by name, and the sentences as one text."""
    history = {f"probe/{name}": points for name, points in probes.items()}
    history |= {"train/loss": loss} | ({"train/weight_norm": norm} if norm else {})
    found = judge(history, schedule)
    return {curve.name: curve.answer for curve in found.curves}, " ".join(found.notes)


EARLY = "; a drop that comes too early costs accuracy in the end (paper §4.2, Figure 7)."


@pytest.mark.parametrize(
    ("loss", "schedule", "answer", "note"),
    [
        (
            curve(-0.05),
            STAIRS,
            "still learning",
            f"The loss still falls; the next drop of the rate is after step 1,600{EARLY}",
        ),
        (
            curve(-0.05, stop=3900),
            STAIRS,
            "still learning",
            "The loss still falls; no drop of the rate is left.",
        ),
        (curve(-0.05, stop=4000), STAIRS, "still learning", "The loss still falls; the run has ended."),
        (
            curve(-0.05),
            COSINE,
            "still learning",
            "The loss still falls; the rate falls at every step, which lowers a loss by itself.",
        ),
        (
            curve(0.05),
            STAIRS,
            "getting worse",
            "The loss rises, as is usual at a high rate before its drop; the next drop of the rate is after step "
            "1,600.",
        ),
        (
            curve(0.05, stop=2900),
            STAIRS,
            "getting worse",
            "The loss rises; the next drop of the rate is after step 3,000.",
        ),
        (
            curve(stop=100),
            STAIRS,
            "cannot tell yet",
            "The learning rate still rises, until step 100: judge the run after it.",
        ),
        (
            curve(stop=150),
            STAIRS,
            "cannot tell yet",
            "The loss cannot be judged yet: about 170 more steps would tell, and the run has 3,850 left.",
        ),
        (
            curve(stop=4000, every=500),
            STAIRS,
            "cannot tell yet",
            "The loss cannot be judged yet: about 12,000 more steps would tell, and the run has ended.",
        ),
    ],
)
def test_a_loss_is_judged_and_said_in_words(loss, schedule, answer, note):
    answers, notes = judged(loss, schedule=schedule)
    assert answers == {"train/loss": answer}
    assert notes == note


@pytest.mark.parametrize(
    ("norm", "answer", "note"),
    [
        (curve(3.0, level=100), "growing", "The loss is flat, but the norm of the weights is still growing: a flat "),
        (curve(-3.0, level=100), "shrinking", "The loss is flat, but the norm of the weights is still shrinking: a "),
        (curve(0.3, level=100), "flat", "Neither the loss nor the norm of the weights moves: at this rate little is "),
        (curve()[-9:], "cannot tell yet", "The loss is flat, but the norm of the weights cannot be judged yet: a flat"),
        (None, None, "The loss is flat, but the norm of the weights cannot be judged yet: a flat stretch alone is no "),
    ],
)
def test_a_flat_loss_is_judged_together_with_the_norm_of_the_weights(norm, answer, note):
    answers, notes = judged(curve(), norm)
    assert answers == {"train/loss": "flat"} | ({"train/weight_norm": answer} if answer else {})
    assert notes.startswith(note)
    assert ("(paper §4.2, Figure 7). The next drop of the rate is after step 1,600." in notes) == (answer != "flat")


def test_the_drop_of_the_rate_is_no_part_of_any_trend():
    def dropped(before, after):
        points = curve(stop=2400, noise=1e-4)
        return [(step, value if step <= 1600 else value + after - before) for step, value in points]

    loss, norm, probe = dropped(1, 0.8), dropped(1, 0.9), dropped(1, 1.1)
    history = {"train/loss": loss, "train/weight_norm": norm, "probe/knn_5_shot": probe}
    found = judge(history, STAIRS)
    assert [c.answer for c in found.curves] == ["flat"] * 3
    assert [c.trend.first_step for c in found.curves] == [1600] * 3
    assert (found.step, found.num_steps) == (2400, 4000)
    without = judge(history, replace(STAIRS, boundaries=()))
    assert all(c.answer != "flat" for c in without.curves)


def test_probes_are_better_the_higher_and_in_order():
    points = {
        "ridge_10_shot": curve(0.01, level=0.5),
        "ridge_5_shot": curve(-0.01, level=0.5),
        "knn_5_shot": curve(0.0, level=0.5, noise=1e-4),
        "knn_10_shot": curve(0.01, level=0.5, every=100),
        "seconds": curve(),
    }
    history = {f"probe/{name}": values for name, values in points.items()}
    found = judge(history | {"train/weight_norm": curve(), "train/loss": curve()}, STAIRS)
    assert [(c.name, c.kind, c.answer) for c in found.curves] == [
        ("train/loss", "loss", "flat"),
        ("probe/knn_5_shot", "accuracy", "flat"),
        ("probe/knn_10_shot", "accuracy", "cannot tell yet"),
        ("probe/ridge_5_shot", "accuracy", "getting worse"),
        ("probe/ridge_10_shot", "accuracy", "still learning"),
        ("train/weight_norm", "norm", "flat"),
    ]
    assert found.curves[4].trend.slope.estimate == pytest.approx(0.01, abs=0.003)  # in fractions of 1, not of 0.5
    assert found.curves[2].trend.more_steps == 1700  # 16 points after half of 3,200


def test_values_that_are_not_finite_are_left_out():
    points = curve(-0.05)
    broken = [(step, math.nan if step % 70 == 0 else value) for step, value in points]
    assert judged(broken)[0] == {"train/loss": "still learning"}
    assert judged([(1, math.inf)])[0] == {"train/loss": "cannot tell yet"}


def record(storage, name, history):
    """Leave what a run leaves: its plan in its folder, and its metrics in MLflow."""
    plan = pretrain_plan(schedule=STAIRS)
    content = RunRecord(digest=plan.digest, shards="shards", plan=to_dict(plan))
    store.write_json(RunFolder.of(storage, name).plan, to_dict(content))
    config = TrackingConfig(uri=f"sqlite:///{storage}/mlflow.db")
    with TrackedRun.open(config, run_name=name, storage=storage, params={}, tags={}, kind="pretrain") as run:
        for metric, points in history.items():
            for step, value in points:
                run.log_metrics({metric: value}, step=step)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The records of a run at step 1,500 of 4,000, and of one that has not logged yet."""
    storage = str(tmp_path_factory.mktemp("runs"))
    history = {
        "train/loss": curve(-0.03, noise=0),
        "train/weight_norm": curve(3.0, level=100),
        "train/lr": curve(),
        "probe/ridge_5_shot": curve(every=500),
        "probe/seconds": curve(every=500),
    }
    record(storage, "glyphs-m", history)
    record(storage, "young", {})
    return storage


@pytest.fixture(autouse=True)
def no_tracking_uri(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_a_recorded_run_is_shown_as_one_table_and_sentences(storage, monkeypatch, capsys):
    monkeypatch.setattr(console, "_width", 80)
    assert main(["runs", "diagnose", "glyphs-m", "--storage", storage]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].strip() == "glyphs-m: step 1,500 of 4,000"
    cells = {
        row[0]: row[1:] for row in ([c.strip() for c in line.split("│")[1:-1]] for line in out.splitlines()) if row
    }
    assert cells["loss"] == ["still learning", "-3.0 % (-3.0 to -3.0)", "750", ""]
    assert cells["weight_norm"][0] == "growing"
    assert cells["weight_norm"][1].startswith("+3.0 % (+3.")
    assert cells["ridge_5_shot"] == ["cannot tell yet", "", "750", "14,000"]
    assert len(cells) == 3
    assert "flat: within 1 % of the loss, 0.2 points of accuracy, 1 % of the norm\n" in out
    assert out.rstrip().endswith(f"The loss still falls; the next drop of the rate is after step 1,600{EARLY}")


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            "glyphs",
            "run: glyphs; accepted: the name of a run in STORAGE, such as glyphs-m; correct it, or give the folder of "
            "the runs by --storage",
        ),
        (
            "mlruns",
            "run: mlruns; accepted: the name of a run in STORAGE; correct it, or give the folder of the runs by "
            "--storage",
        ),
        (
            "young",
            "run: young; accepted: a run with a recorded loss; try again after its first runtime.log_every_steps steps",
        ),
        ("runs/young", "run: runs/young; accepted: the name of a run; give its folder by --storage"),
        ("", "name: given ''; accepted: text that can name a folder"),
    ],
)
def test_a_run_that_cannot_be_judged_is_one_line(storage, capsys, run, message):
    before = set(Path(storage).iterdir())
    assert main(["runs", "diagnose", run, "--storage", storage]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1
    assert re.sub(re.escape(storage), "STORAGE", error).startswith(f"error: {message.replace('run: ', 'RUN: ', 1)}")
    assert set(Path(storage).iterdir()) == before
