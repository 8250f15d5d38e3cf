"""The engine of all studies, with trials that take no training."""

import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient

from bit_ray import store
from bit_ray.cluster.seats import Seats
from bit_ray.cluster.slots import Resources
from bit_ray.errors import DataError, ModelError, StoreError
from bit_ray.run_folder import RunFolder
from bit_ray.studies import engine, tuner
from bit_ray.studies.engine import Bar, Study
from bit_ray.studies.tuner import Trial
from bit_ray.tracking.config import TrackingConfig
from bit_ray.tracking.runs import TrackedRun

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_local")]


@dataclass(frozen=True, kw_only=True)
class Score:
    identity: str
    top_1: float
    neighbours: int


def count(folder: str, identity: str, value: float, num_threads: int) -> Score:
    """Tell how many trials run at this moment, this one among them."""
    assert num_threads >= 1
    mine = Path(folder, f"{identity}.running")
    mine.touch()
    with Path(folder, f"{identity}.begun").open("a") as file:
        file.write("x")
    time.sleep(0.3)
    running = len(list(Path(folder).glob("*.running")))
    mine.unlink()
    begun = Path(folder, f"{identity}.begun").read_text()
    if value == 7 or (value == 6 and begun == "x"):
        os.kill(os.getpid(), signal.SIGKILL)
    if value == 5:  # its score cannot be written
        Path(folder).with_name("study").joinpath("scores", f"{identity.removesuffix('-5.0')}.json").mkdir(parents=True)
    if value < 0:
        raise DataError(f"{identity}: {value}; accepted: 0 or more; correct it")
    return Score(identity=identity, top_1=value, neighbours=running)


def load(uri: str, identity: str) -> Score | None:
    if not store.exists(uri):
        return None
    score = store.read_record(Score, uri)
    return score if score.identity == identity else None


def study(
    folder: Path, tracking: TrackingConfig, values: dict[str, float], *, side_by_side: int = 1, keep_going: bool = False
) -> tuple:
    """Scores, mistakes, marks of all processes that began a trial, and the MLflow run."""
    marks = folder / "marks"
    marks.mkdir(exist_ok=True)
    trials = [
        Trial(
            key=key,
            identity=f"{key}-{value}",
            params={"value": value},
            arguments=(f"{key}-{value}", value),
            size=abs(value),
        )
        for key, value in values.items()
    ]
    found = Study(RunFolder.of(str(folder), "study"), trials, load)
    with TrackedRun.open(tracking, run_name="study", storage=str(folder), params={}, tags={}, kind="fewshot") as run:
        problems = found.run(
            count, str(marks), run, Bar("t", "trials"), side_by_side=side_by_side, keep_going=keep_going
        )
    begun = {mark.stem: mark.read_text() for mark in marks.glob("*.begun")}
    return found.scores, problems, begun, run


def test_no_more_trials_run_at_a_time_than_asked_for_and_only_what_is_new_changed_or_killed_runs_again(
    tmp_path: Path, tracking: TrackingConfig, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Resources, "num_slots", 3)
    values = {f"t{i}": i / 10 for i in range(5)}
    scores, problems, begun, run = study(tmp_path, tracking, values, side_by_side=2)
    assert {key: score.top_1 for key, score in scores.items()} == values
    assert problems == {}
    assert begun == {f"{key}-{value}": "x" for key, value in values.items()}
    assert max(score.neighbours for score in scores.values()) <= 2
    # Each is a run below the study.
    client = MlflowClient(tracking_uri=run.tracking_uri)
    below = client.search_runs([run.experiment_id], f'tags.`mlflow.parentRunId` = "{run.run_id}"')
    assert {child.info.run_name: child.data.metrics for child in below} == {
        key: {"top_1": value} for key, value in values.items()
    }
    assert client.get_run(run.run_id).info.status == "FINISHED"

    changed = {**values, "t1": 0.8, "t5": 0.5, "killed": 6.0}
    scores, problems, again, _ = study(tmp_path, tracking, changed, side_by_side=2)
    assert {key: score.top_1 for key, score in scores.items()} == changed
    assert problems == {}
    assert again == {**begun, "t1-0.8": "x", "t5-0.5": "x", "killed-6.0": "xx"}
    kept = json.loads((tmp_path / "study" / "scores" / "t1.json").read_text())
    assert kept["identity"] == "t1-0.8"


def test_a_mistake_or_a_full_disk_ends_the_study_or_its_trial_alone(tmp_path: Path, tracking: TrackingConfig):
    values = {"a": -1.0, "b": 0.2}
    scores, problems, _, _ = study(tmp_path, tracking, values, keep_going=True)
    assert set(scores) == {"b"}
    assert str(problems["a"]) == "a--1.0: -1.0; accepted: 0 or more; correct it"
    with pytest.raises(DataError, match=r"^a--1.0: -1.0; accepted"):
        study(tmp_path, tracking, values)
    assert not (tmp_path / "study" / "scores" / "a.json").exists()
    client = MlflowClient(tracking_uri=tracking.uri)
    experiment = client.get_experiment_by_name(tracking.experiment).experiment_id
    [run] = client.search_runs([experiment], 'tags.`bit_ray.kind` = "fewshot"')
    assert run.info.status == "FAILED"
    # Nor is a trial run again whose score cannot be written.
    with pytest.raises(StoreError, match=r"^/.*/scores/blocked.json: cannot be read or written \(.*Is a directory"):
        study(tmp_path, tracking, {"blocked": 5.0, "later": 0.3})
    marks = {path.stem: path.read_text() for path in (tmp_path / "marks").glob("*.begun")}
    assert marks == {"a--1.0": "xx", "b-0.2": "x", "blocked-5.0": "x"}


def test_a_trial_whose_process_always_dies_ends_the_study(
    tmp_path: Path, tracking: TrackingConfig, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tuner, "_MAX_FAILURES", 1)  # each start of a process takes seconds
    with pytest.raises(
        ModelError, match=r"^trials: the process of one ended 2 times .*; lower side_by_side, and start"
    ):
        study(tmp_path, tracking, {"c": 7.0, "d": 0.3})
    assert (tmp_path / "marks" / "c-7.0.begun").read_text() == "xx"
    assert not (tmp_path / "marks" / "d-0.3.begun").exists()
    assert not (tmp_path / "study" / "scores" / "c.json").exists()


def test_a_study_says_that_it_waits_for_room_and_begins_when_there_is(
    tmp_path: Path, tracking: TrackingConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    line = "trials: waiting for room for one, with 6 CPU; add nodes, or end what takes them\n"
    monkeypatch.setattr(tuner, "_SECONDS_TO_FIRST_LINE", 1)
    taken, said = Seats({"CPU": 1}, 1), ""

    class Heard(tuner.Collect):
        def on_step_begin(self, iteration: int, trials: list, **info) -> None:
            super().on_step_begin(iteration, trials, **info)
            nonlocal said
            said += capsys.readouterr().out
            if line in said:
                taken.release()

    monkeypatch.setattr(engine, "Collect", Heard)
    try:
        while not taken.ready():
            time.sleep(0.05)
        scores, _, _, _ = study(tmp_path, tracking, {"a": 0.1})
    finally:
        taken.release()
    assert scores["a"].top_1 == 0.1
    assert said.startswith(line)
    assert said.count("waiting") == 1
