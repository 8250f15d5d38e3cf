"""Studies through Ray Tune: what they leave, that a second start repeats nothing, and that they outlive killings."""

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
from mlflow import MlflowClient
from ray._private import state
from ray.cluster_utils import Cluster

from bit_ray import store
from bit_ray.cli.main import main
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.embedded.digits import DigitsSource
from bit_ray.data.sources.embedded.glyphs import GlyphSource
from bit_ray.errors import ConfigError
from bit_ray.models.zoo import create_model
from bit_ray.recipes.hyperrule import RuleOverrides
from bit_ray.studies.catalog import STUDIES
from bit_ray.studies.compare import compare_hyperrule
from bit_ray.studies.run import run_study, write_report
from bit_ray.studies.study_config import CompareConfig, GridConfig, ReportConfig, SweepConfig
from bit_ray.studies.sweep import run_sweep
from bit_ray.weights.package import ModelSpec, save_package

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

# A study of one's own, as docs/extending.md has it; also run as a script, for a process that can be killed.
_STUDY = """
import sys
from bit_ray.cli.main import main
from bit_ray.recipes.embedded import EMBEDDED_MODEL
from bit_ray.recipes.upstream import UpstreamRecipe
from bit_ray.studies.catalog import STUDIES
from bit_ray.studies.grid import GridStudy
from bit_ray.training.config import PretrainConfig

STUDIES["tiny"] = GridStudy(
    title="Does a tiny network learn?",
    base=PretrainConfig(
        name="tiny",
        shards="?",
        model=EMBEDDED_MODEL,
        recipe=UpstreamRecipe(
            name="tiny", epochs=1, decay_epochs=(0.6,), warmup_steps=2, global_batch_size=8, crop_size=32
        ),
    ),
    axes={"recipe.weight_decay": (0.0, 1e-2)},
    val="?",
    seeds=2,
    at=(0.5,),
)
if __name__ == "__main__":
    sys.exit(main())
"""


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    exec(_STUDY, {"__name__": "study"})
    yield
    del STUDIES["tiny"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """120 glyphs of 6 classes to train on, and 30 others to measure on."""
    folder = tmp_path_factory.mktemp("sets")
    for split, count in (("train", 20), ("val", 5)):
        source = GlyphSource("s", split=split, examples_per_class=count)
        write_shards(
            iter(source.part(range(6 * count))), folder / split, name=split, class_names=source.class_names[:6]
        )
    return folder


def small(sets: Path, storage: object, **changes) -> GridConfig:
    settings = {
        "study": "tiny",
        "name": "decay",
        "set": (f"shards={sets}/train",),
        "val_shards": f"{sets}/val",
        "storage": str(storage),
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


def test_a_study_is_recorded_and_its_report_comes_again_from_mlflow_alone(sets, tmp_path, ray_local, capsys):
    before = idle_cpus()
    report = run_study(small(sets, tmp_path))
    assert report is not None
    assert report.missing == ()
    assert any("weight_decay 0.01 against 0" in line for line in report.findings)
    nothing_is_left(before)
    folder = tmp_path / "decay"
    written = files_below(folder / "report")
    assert {"report.html", "report.md", "plots/train-loss.png", "plots/train-loss.csv"} <= written.keys()
    scores = {path.stem: json.loads(path.read_text()) for path in (folder / "scores").iterdir()}
    assert len(scores) == 4
    assert not (folder / "cells").exists() or not any(path.is_file() for path in (folder / "cells").rglob("*"))

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("bit_ray").experiment_id
    [parent] = client.search_runs([experiment], 'tags.`bit_ray.kind` = "study"')
    below = client.search_runs([experiment], f'tags.`mlflow.parentRunId` = "{parent.info.run_id}"')
    assert {run.info.run_name for run in below} == scores.keys()
    for run in below:
        assert run.data.metrics["final/val/loss"] == scores[run.info.run_name]["final"]["val/loss"]
        assert run.data.params["recipe.weight_decay"] in ("0.0", "0.01"), run.data.params

    for path in sorted((folder / "report").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    again, where = write_report(ReportConfig(name="decay", storage=str(tmp_path), output=str(tmp_path / "again")))
    assert again == report
    assert files_below(Path(where)) == written

    earlier = files_below(folder / "scores")
    assert run_study(small(sets, tmp_path)) == report
    assert files_below(folder / "scores") == earlier
    with pytest.raises(
        ConfigError, match=r"^name: the study in .* has .* choose another name, or restore the setting$"
    ):
        run_study(small(sets, tmp_path, axes=("recipe.weight-decay=0,1e-3",)))
    capsys.readouterr()
    status = main(["study", "report", "dekay", "--storage", str(tmp_path)])
    assert status == 2
    assert "has no study 'dekay'" in capsys.readouterr().err


def test_an_adaptive_sweep_goes_on_with_the_trials_it_has_written(sets, tmp_path, ray_local):
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
        )

    before = idle_cpus()
    run_sweep(sweep(2))
    first = files_below(tmp_path / "search" / "scores")
    assert len(first) == 2
    report = run_sweep(sweep(4))
    assert report is not None
    scores = files_below(tmp_path / "search" / "scores")
    assert len(scores) == 4
    assert {name: scores[name] for name in first} == first
    assert any("not independent" in line for line in report.findings)
    assert len(set(files_below(tmp_path / "search" / "proposed").values())) == 4
    nothing_is_left(before)


def test_a_study_on_an_object_store_goes_on_after_its_driver_was_killed(sets, s3, tmp_path):
    """SIGKILL of the driver with its whole Ray, while one training is finished and another one is saved half-way."""
    storage = f"s3://{s3.bucket}/runs"
    args = ["study", "run", "tiny", "--name", "decay", "--val-shards", f"{sets}/val", "--side-by-side", "1"]
    args += [
        "--set",
        f"shards={sets}/train",
        "recipe.epochs=4",
        "recipe.decay_epochs=[3]",
        "--storage",
        storage,
        "--save-every-s",
        "0.5",
    ]
    args += ["--tracking.uri", f"sqlite:///{tmp_path}/mlflow.db", "--seeds", "1"]
    first = subprocess.Popen(
        [sys.executable, "-c", _STUDY, *args],
        cwd=tmp_path,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    root = f"{storage}/decay"
    finished, half_way = {}, []
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (finished and half_way):
        assert first.poll() is None
        finished = {name: store.read_bytes(f"{root}/scores/{name}") for name in _list(f"{root}/scores")}
        half_way = [n for n in _list(f"{root}/cells") if n.endswith("training.json") and "step-0000000" not in n]
        time.sleep(0.05)
    children = _below(first.pid)
    os.killpg(first.pid, signal.SIGKILL)
    for pid in children:
        _kill(pid)
    first.wait()
    assert len(finished) == 1
    key = half_way[0].partition("/")[0]

    second = subprocess.run([sys.executable, "-c", _STUDY, *args], cwd=tmp_path, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert "decay: 1 of 2 trainings are done already" in second.stdout
    for name, content in finished.items():
        assert store.read_bytes(f"{root}/scores/{name}") == content
    assert len(_list(f"{root}/scores")) == 2
    assert _list(f"{root}/cells") == []
    # What was saved was not computed again: its time counts with that of the first start.
    score = json.loads(store.read_bytes(f"{root}/scores/{key}.json"))
    assert [step for step, _ in score["losses"]] == sorted({step for step, _ in score["losses"]})
    assert len(score["losses"]) == 60


def _list(uri: str) -> list[str]:
    return sorted(store.list_files(uri))


def _below(pid: int) -> list[int]:
    """Process ids of all descendants."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, queue = [], [pid]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _wait_for(condition, what: str, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@contextlib.contextmanager
def _study_on_a_cluster(tmp_path: Path, sets: Path, *args: str) -> Iterator[tuple[Cluster, subprocess.Popen[bytes]]]:
    """A study of one training in a process of its own, on a cluster whose head has no CPUs and whose node has 3."""
    words = ["study", "run", "tiny", "--name", "decay", "--val-shards", f"{sets}/val", "--storage", f"{tmp_path}/runs"]
    words += ["--seeds", "1", "--axes", "recipe.weight-decay=0.0", *args]
    nodes = Cluster(head_node_args=HEAD, initialize_head=True)
    try:
        nodes.add_node(**NODE)
        with (tmp_path / "log").open("w") as log:
            program = subprocess.Popen(
                [sys.executable, "-c", _STUDY, *words],
                env={**os.environ, "RAY_ADDRESS": nodes.address},
                stdout=log,
                stderr=log,
                cwd=tmp_path,
            )
        try:
            yield nodes, program
        finally:
            program.kill()
    finally:
        nodes.shutdown()


# A lost node is noticed in 1.5 s instead of 15.
NOTICED = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
HEAD = {"num_cpus": 0, "include_dashboard": False, "_system_config": NOTICED}
NODE = {"num_cpus": 3, "object_store_memory": 100 * 2**20}
KEY = "weight_decay-0-seed-0"
LEFT = """
import sys, time, ray
ray.init(address=sys.argv[1], logging_level="ERROR")
for _ in range(300):
    total = ray.cluster_resources().get("CPU")
    groups = [g for g in ray.util.placement_group_table().values() if g["state"] == "CREATED"]
    if total == ray.available_resources().get("CPU") and not groups:
        sys.exit()
    time.sleep(0.1)
sys.exit(f"{ray.available_resources()} of {total}, {groups}")
"""


def _saved(folder: Path) -> set[int]:
    """Steps of the whole checkpoints below a folder."""
    # Unlike a glob, a walk passes over what is deleted meanwhile.
    whole = [Path(directory).name for directory, _, files in os.walk(folder) if "training.json" in files]
    return {int(name.removeprefix("step-")) for name in whole if name.startswith("step-")}


def test_a_training_on_the_cluster_outlives_its_trial_and_then_its_node(sets, tmp_path):
    """SIGKILL of the trial while its worker trains, then of the only node, with another one that joins."""
    folder = tmp_path / "runs" / f"decay.{KEY}"
    args = ["--where", "cluster", "--set", f"shards={sets}/train", "recipe.epochs=40", "recipe.decay_epochs=[30]"]
    args += ["runtime.num_workers=1", "runtime.checkpoint_every_steps=100", "runtime.log_every_steps=100"]

    def starts() -> list[int]:
        path = folder / "runtime.json"
        return [start["first_step"] for start in json.loads(path.read_text())["starts"]] if path.exists() else []

    with _study_on_a_cluster(tmp_path, sets, *args) as (nodes, program):

        def wait_for(condition, what: str) -> None:
            _wait_for(lambda: program.poll() is not None or condition(), what)
            assert program.poll() is None, (tmp_path / "log").read_text()

        # The second is there only after the first is known to Ray Train, too.
        wait_for(lambda: len(_saved(folder)) >= 2, "no checkpoints")
        trials = [pid for pid in _below(os.getpid()) if _command(pid).startswith("ray::ImplicitFunc")]
        assert trials
        for pid in trials:
            _kill(pid)
        # Its worker holds 2 of 3 CPUs until it is freed; of the steps from 100 on, those to 200 may be the first one's.
        wait_for(lambda: len(starts()) >= 2 and max(_saved(folder)) >= starts()[1] + 300, "not continued")
        [lost] = nodes.worker_nodes
        lost.kill_raylet()
        nodes.add_node(**NODE)
        assert program.wait(240) == 0, (tmp_path / "log").read_text()
        left = subprocess.run([sys.executable, "-c", LEFT, nodes.address], capture_output=True, text=True)
        assert left.returncode == 0, left.stderr
    first, second, third = starts()
    assert 0 == first < second < third < 600
    # It was measured half-way, too, and the weights of then are not kept.
    score = json.loads((tmp_path / "runs" / "decay" / "scores" / f"{KEY}.json").read_text())
    assert [point["step"] for point in score["points"]] == [300, 600]
    assert all({"train/loss", "val/loss", "val/top_1"} <= point["values"].keys() for point in score["points"])
    assert score["points"][0]["values"] != score["points"][1]["values"]
    assert list(folder.glob("milestone-*")) == []


def test_a_training_in_memory_outlives_its_node(sets, tmp_path):
    """The only node is lost, and another one joins: the training goes on from its checkpoint."""
    folder = tmp_path / "runs" / "decay" / "cells"
    args = ["--save-every-s", "0", "--set", f"shards={sets}/train", "recipe.epochs=16", "recipe.decay_epochs=[12]"]
    with _study_on_a_cluster(tmp_path, sets, *args) as (nodes, program):
        _wait_for(lambda: program.poll() is not None or max(_saved(folder), default=0) >= 60, "no checkpoints")
        assert program.poll() is None, (tmp_path / "log").read_text()
        [lost] = nodes.worker_nodes
        lost.kill_raylet()
        before = _saved(folder)  # the newest, and the one before it if that was not deleted yet
        nodes.add_node(**NODE)
        seen: set[int] = set()
        while program.poll() is None:
            seen |= _saved(folder)
            time.sleep(0.02)
        assert program.returncode == 0, (tmp_path / "log").read_text()
    score = json.loads((tmp_path / "runs" / "decay" / "scores" / f"{KEY}.json").read_text())
    assert [point["step"] for point in score["points"]] == [120, 240]
    # A training that began again would save its first steps again.
    assert min(seen - before) > max(before) >= 60


def test_the_rule_and_a_sweep_are_compared_on_a_task_of_ones_own(tmp_path, ray_local, capsys):
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


def test_what_cannot_fit_is_refused_at_once_with_both_numbers(sets, tmp_path, ray_local):
    config = small(sets, tmp_path, where="cluster", set=(f"shards={sets}/train", "runtime.num_workers=4"))
    with pytest.raises(ConfigError, match=r"a trial takes 8 CPUs and 0 GPUs; accepted: at most 6 and 0, all of"):
        run_study(config)
    with pytest.raises(ConfigError, match=r"^runtime.num_workers: 0, with where cluster"):
        run_study(small(sets, tmp_path / "other", where="cluster"))
