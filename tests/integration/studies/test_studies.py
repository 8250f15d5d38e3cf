"""Studies through Ray Tune: what they leave, and that a second start repeats nothing."""

import functools
import gc
import json
import re
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
from mlflow import MlflowClient
from proxy import Proxy
from ray._private import state

from bit_ray.cli.main import main
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.embedded.digits import DigitsSource
from bit_ray.errors import ConfigError, TrackingError
from bit_ray.models.zoo import create_model
from bit_ray.recipes.hyperrule import RuleOverrides
from bit_ray.studies.compare import compare_hyperrule
from bit_ray.studies.run import run_study, write_report
from bit_ray.studies.study_config import CompareConfig, GridConfig, ReportConfig, SweepConfig
from bit_ray.studies.sweep import run_sweep
from bit_ray.tracking.config import TrackingConfig
from bit_ray.tracking.runs import TrackedRun
from bit_ray.weights.package import ModelSpec, save_package

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900), pytest.mark.usefixtures("ray_local", "tiny")]


def small(sets: Path, storage: object, tracking: TrackingConfig, **changes) -> GridConfig:
    settings = {
        "study": "tiny",
        "name": "decay",
        "set": (f"shards={sets}/train",),
        "val_shards": f"{sets}/val",
        "storage": str(storage),
        "tracking": tracking,
    }
    return GridConfig(**settings | changes)


def idle_cpus(seconds: float = 30) -> float:
    """CPUs that nothing holds; waits for what earlier tests of this process have left to end."""
    gc.collect()  # an error of an earlier test may hold Ray Data's actors in a cycle of references
    deadline = time.monotonic() + seconds
    while True:
        free = ray.available_resources().get("CPU", 0.0)
        if free == ray.cluster_resources()["CPU"] or time.monotonic() > deadline:
            return free
        time.sleep(0.2)


def nothing_is_left(before: float) -> None:
    """As many CPUs are free as before the study, no placement group stands, and so no actor of the study lives."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        free = ray.available_resources().get("CPU", 0.0)
        groups = [g for g in ray.util.placement_group_table().values() if g["state"] == "CREATED"]
        if free >= before and not groups:
            return
        time.sleep(0.2)
    alive = [
        {name: actor.get(name) for name in ("ActorClassName", "Name", "JobID", "Pid", "RequiredResources")}
        for actor in state.actors().values()
        if actor.get("State") != "DEAD"
    ]
    raise AssertionError(f"{free} CPUs are free, {before} before; placement groups: {groups}, actors: {alive}")


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_study_outlives_mlflow_is_recorded_and_its_report_comes_again_from_mlflow_alone(
    sets, tmp_path, mlflow_server, capsys, caplog, monkeypatch
):
    """MLflow is away from the first score on, also at the end, and comes back for the third start."""
    proxy = Proxy(mlflow_server.port)
    tracking = TrackingConfig(uri=f"http://127.0.0.1:{proxy.port}", experiment=tmp_path.name)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    close = TrackedRun.close
    monkeypatch.setattr(TrackedRun, "close", functools.partialmethod(close, timeout_s=1.0))
    before = idle_cpus()

    def lose_mlflow() -> None:
        while not any((tmp_path / "decay" / "scores").glob("*.json")):
            time.sleep(0.05)
        proxy.cut(down=True)

    watch = threading.Thread(target=lose_mlflow, daemon=True)
    watch.start()
    report = run_study(small(sets, tmp_path, tracking))
    watch.join()
    assert report is not None
    assert report.missing == ()
    said = [record.getMessage() for record in caplog.records if record.name == TrackedRun.__module__]
    assert len(said) == 2
    assert any("cannot be used since" in line for line in said)
    assert any(
        re.match(r"\d+ entries for MLflow are not sent yet and kept in .*; start the run again", s) for s in said
    )
    assert any("weight_decay 0.01 against 0" in line for line in report.findings)
    nothing_is_left(before)
    folder = tmp_path / "decay"
    written = files_below(folder / "report")
    assert {"report.html", "report.md", "plots/train-loss.png", "plots/train-loss.csv"} <= written.keys()
    scores = {path.stem: json.loads(path.read_text()) for path in (folder / "scores").iterdir()}
    assert len(scores) == 4
    assert not (folder / "cells").exists() or not any(path.is_file() for path in (folder / "cells").rglob("*"))

    earlier = files_below(folder / "scores")
    with pytest.raises(TrackingError, match=r"^tracking.uri: http://.*: cannot be reached \("):
        run_study(small(sets, tmp_path, tracking))
    proxy.cut(down=False)
    monkeypatch.setattr(TrackedRun, "close", close)
    assert run_study(small(sets, tmp_path, tracking)) == report
    assert files_below(folder / "scores") == earlier
    assert files_below(folder / "report") == written

    client = MlflowClient(tracking_uri=tracking.uri)
    experiment = client.get_experiment_by_name(tracking.experiment).experiment_id
    [parent] = client.search_runs([experiment], 'tags.`bit_ray.kind` = "study"')
    below = client.search_runs([experiment], f'tags.`mlflow.parentRunId` = "{parent.info.run_id}"')
    assert {run.info.run_name for run in below} == scores.keys()
    for run in below:
        assert run.data.metrics["final/val/loss"] == scores[run.info.run_name]["final"]["val/loss"]
        assert run.data.params["recipe.weight_decay"] in ("0.0", "0.01"), run.data.params

    for path in sorted((folder / "report").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    again, where = write_report(
        ReportConfig(name="decay", storage=str(tmp_path), output=str(tmp_path / "again"), tracking=tracking)
    )
    assert again == report
    assert files_below(Path(where)) == written

    for changes, differ in (
        ({"axes": ("recipe.weight-decay=0,1e-3",)}, "the training weight_decay-0.01-seed-0, this one has not"),
        ({"set": (f"shards={sets}/train", "recipe.momentum=0.8")}, "recipe.momentum 0.9, this one has 0.8"),
        ({"val_shards": f"{sets}/train"}, "other settings, data or measures for weight_decay-0-seed-0"),
    ):
        refused = rf"^name: the study in .* has {differ}; accepted: .*; choose another name, or restore the setting$"
        with pytest.raises(ConfigError, match=refused):
            run_study(small(sets, tmp_path, tracking, **changes))
    capsys.readouterr()
    asked = ["--storage", str(tmp_path), "--tracking.uri", tracking.uri, "--tracking.experiment", tracking.experiment]
    status = main(["study", "report", "dekay", *asked])
    assert status == 2
    assert "has no study 'dekay'" in capsys.readouterr().err
    proxy.close()


def test_an_adaptive_sweep_goes_on_with_the_trials_it_has_written(sets, tmp_path, tracking, two_trials_at_a_time):
    def sweep(trials: int) -> SweepConfig:
        return SweepConfig(
            command="pretrain",
            name="search",
            set=(
                f"shards={sets}/train",
                "model=R1-1-1-1x0.5",
                "recipe.crop_size=32",
                "recipe.epochs=1.0",
                "recipe.decay_epochs=[0.6]",
                "recipe.warmup_steps=2",
                "recipe.global_batch_size=8",
            ),
            space=("recipe.base-lr-per-256=log:0.01:1", "recipe.weight-decay=0.0,1e-3"),
            trials=trials,
            search="tpe",
            storage=str(tmp_path),
            tracking=tracking,
        )

    before = idle_cpus()
    run_sweep(sweep(1))
    first = files_below(tmp_path / "search" / "scores")
    assert len(first) == 1
    report = run_sweep(sweep(3))
    assert report is not None
    scores = files_below(tmp_path / "search" / "scores")
    assert len(scores) == 3
    assert {name: scores[name] for name in first} == first
    assert any("not independent" in line for line in report.findings)
    assert len(set(files_below(tmp_path / "search" / "proposed").values())) == 3
    # Of other settings the first that differs is named.
    longer = (*(text for text in sweep(3).set if "recipe.epochs" not in text), "recipe.epochs=2.0")
    for changes, differ in (
        ({"set": longer}, r"set.recipe.epochs 1.0, this one has 2.0"),
        ({"space": ("recipe.weight-decay=0.0,1e-3",)}, r"space.recipe.base_lr_per_256 .*, this one has None"),
        ({"search": "gp"}, "search tpe, this one has gp"),
    ):
        with pytest.raises(ConfigError, match=rf"^name: the study in .* has {differ}; accepted: the settings that"):
            run_sweep(replace(sweep(3), **changes))
    nothing_is_left(before)


def test_the_rule_and_a_sweep_are_compared_on_a_task_of_ones_own(tmp_path, tracking, capsys):
    for split, first in (("train", 0), ("test", 400)):
        source = DigitsSource("train")
        part = source.part(np.arange(first, first + 100))
        write_shards(iter(part), tmp_path / split, name=split, class_names=source.class_names)
    spec = ModelSpec(
        model="R1-1-1-1x0.5", num_classes=3, class_names=("a", "b", "c"), multi_label=False, resize_mode="square",
        resize_size=32, crop_size=32,
    )  # fmt: skip
    save_package(tmp_path / "model", create_model("R1-1-1-1x0.5", 3), spec)
    config = CompareConfig(
        init=str(tmp_path / "model"),
        tasks=(f"{tmp_path}/train,{tmp_path}/test",),
        space=("rule.base-lr=log:1e-3:1e-1", "resolution=32,40"),
        trials=4,
        seeds=2,
        random_flip=False,
        rule=RuleOverrides(num_steps=4, batch_size=8, crop=32, resize=36),
        storage=str(tmp_path / "runs"),
        price=1.0,
        tracking=tracking,
    )
    assert compare_hyperrule(replace(config, dry_run=True)) is None
    assert "hyperrule-or-sweep: 8 trainings" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    report = compare_hyperrule(config)
    assert report is not None
    assert report.missing == ()
    scores = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*/scores/*.json")}
    assert len(scores) == 4 + 2 * 2 + 2
    tested = {key for key, score in scores.items() if "test/top_1" in score["final"]}
    assert tested == {f"task-1-{what}-seed-{seed}" for what in ("rule", "best") for seed in range(2)}
    assert any(line.startswith("1: train: a sweep of 4 trials costs") for line in report.findings)
    assert compare_hyperrule(config) == report
    with pytest.raises(ConfigError, match=r"^name: the study in .* has rule.num_steps 4, this one has 5; accepted: "):
        compare_hyperrule(replace(config, rule=replace(config.rule, num_steps=5)))


def test_what_cannot_fit_is_refused_at_once_with_both_numbers(sets, tmp_path, tracking):
    config = small(sets, tmp_path, tracking, where="cluster", set=(f"shards={sets}/train", "runtime.num_workers=4"))
    with pytest.raises(ConfigError, match=r"a trial takes 8 CPUs and 0 GPUs; accepted: at most 6 and 0, all of"):
        run_study(config)
    with pytest.raises(ConfigError, match=r"^runtime.num_workers: 0, with where cluster"):
        run_study(small(sets, tmp_path, tracking, where="cluster"))
    on_a_part = SweepConfig(
        command="pretrain",
        name="decay",
        where="cluster",
        set=(f"shards={sets}/train", "model=R1-1-1-1x0.5", "recipe.global_batch_size=8", "recipe.warmup_steps=2"),
        space=("recipe.weight-decay=0.0,1e-3",),
        storage=str(tmp_path),
        tracking=tracking,
    )
    with pytest.raises(
        ConfigError, match=r"^where: cluster, but the training is on a part of .*; name a set to select"
    ):
        run_sweep(on_a_part)
    # The name is still free, for a study whose settings are others.
    assert files_below(tmp_path / "decay").keys() <= {".lock"}
