import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import psutil
import pytest
import torch
from faulty_s3 import Faults
from glyph_runs import SCRIPT, assert_identical, history, recipe, run_config, weights, write_glyphs
from mlflow import MlflowClient
from ray.cluster_utils import Cluster
from servers import kill_ray_processes

import bit_ray
from bit_ray import store
from bit_ray.config import to_dict
from bit_ray.config_files import write_config
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.errors import ConfigError, ModelError
from bit_ray.run_folder import RunFolder
from bit_ray.run_records import PlannedTime
from bit_ray.studies.config import DiagnoseConfig
from bit_ray.studies.diagnose import diagnose
from bit_ray.tracking.config import TrackingConfig
from bit_ray.tracking.registry import register
from bit_ray.training.checkpoint.retention import Retention
from bit_ray.training.config import PretrainConfig, RegisterAs, ReplayConfig, Runtime
from bit_ray.training.driver import Trained, train
from bit_ray.training.goodput import goodput
from bit_ray.training.learner import build_model
from bit_ray.training.memory import worker_memory
from bit_ray.training.pretrain import pretrain, pretrain_plan
from bit_ray.training.replay import replay
from bit_ray.weights.package import load_package

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
# As many steps as it takes until the last of its checkpoints can tell whether the loss still falls.
NUM_STEPS, FEW = 32, 4


class Undisturbed(NamedTuple):
    config: PretrainConfig
    trained: Trained
    printed: str


@pytest.fixture(scope="module")
def undisturbed(folder, shards, ray_local):
    """A run of one worker and one micro-batch that nobody disturbs, with all its checkpoints."""
    config = run_config(
        folder, "undisturbed", shards, NUM_STEPS, checkpoint_every_steps=FEW, num_checkpoints_to_keep=NUM_STEPS // FEW
    )
    # As bit-ray plan --run leaves it.
    planned = PlannedTime(seconds=100.0, low=50.0, high=150.0, source="a plan")
    store.write_json(RunFolder.of(config.storage, config.name).planned_file, to_dict(planned))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        trained = pretrain(config)
    return Undisturbed(config, trained, printed.getvalue())


def one_line(caught):
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_run_records_how_far_it_was_from_its_plan(undisturbed, folder):
    config, trained, _ = undisturbed
    spent = goodput(RunFolder.of(config.storage, config.name).attempts())
    metrics = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db").get_run(trained.result.run_id).data.metrics
    assert metrics["run/planned_s"] == 100
    assert metrics["run/plan_error"] == pytest.approx((spent.wall_s - spent.waited_s) / 100 - 1)


def memory_told_and_taken(config, trained, num_workers, num_images):
    plan = pretrain_plan(config, read_manifest(config.shards))
    taken = history(Path(config.storage), trained.result.run_id, "system/process_memory_gb")
    return worker_memory(plan, config.runtime, num_workers, num_images) / 1e9, max(value for _, value in taken)


def test_a_worker_takes_the_memory_that_its_plan_says(undisturbed):
    config, trained, _ = undisturbed
    told, taken = memory_told_and_taken(config, trained, 1, config.recipe.global_batch_size)
    assert told == pytest.approx(taken, rel=0.2)


def test_a_run_leaves_a_registered_model_with_its_identity(undisturbed, folder, shards):
    config, trained, _ = undisturbed
    result, version = trained.result, trained.version
    manifest = read_manifest(shards)
    plan = pretrain_plan(config, manifest)
    assert result.plan_digest == plan.digest
    assert Path(result.package_uri) == folder / "undisturbed" / f"step-{NUM_STEPS:08d}"
    assert (version.name, version.version, version.alias) == ("undisturbed", 1, "champion")
    assert version.sha256 == result.sha256

    classifier = bit_ray.load_model("models:/undisturbed@champion", tracking_uri=f"sqlite:///{folder}/mlflow.db")
    assert classifier.sha256 == result.sha256
    assert classifier.spec.class_names == manifest.class_names
    identity = {
        "manifest_digest": manifest.digest,
        "config_digest": plan.digest,
        "run_id": result.run_id,
        "run_name": "undisturbed",
    }
    assert identity.items() <= classifier.spec.provenance.items()
    [prediction] = classifier.predict(np.zeros((40, 50, 3), np.uint8), top_k=3)
    assert len(prediction) == 3

    run = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db").get_run(result.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["bit_ray.manifest_digest"] == manifest.digest
    assert run.data.params["recipe.global_batch_size"] == "64"
    assert run.data.metrics["train/images_seen"] == NUM_STEPS * 64
    names = {path.name for path in Path(run.info.artifact_uri.removeprefix("file://")).rglob("*.*")}
    assert {"config.json", "training.png"} <= names
    assert [step for step, _ in history(folder, result.run_id)] == list(range(1, NUM_STEPS + 1))


def test_the_first_loss_is_that_of_the_zero_head(undisturbed, folder):
    _, trained, _ = undisturbed
    (step, loss), *_ = history(folder, trained.result.run_id)
    assert step == 1
    # The head of a new network is not zero, but its logits are small against ln 50.
    assert loss == pytest.approx(np.log(50), abs=0.5)


@pytest.fixture
def registered(undisturbed, folder, tmp_path):
    """A run's folder whose only checkpoint, of step 3, is registered; and the run."""
    _, trained, _ = undisturbed
    run = SimpleNamespace(tracking_uri=f"sqlite:///{folder}/mlflow.db", run_id=trained.result.run_id)
    run_folder = RunFolder(str(tmp_path / "run"))
    shutil.copytree(trained.result.package_uri, run_folder.checkpoint(3))
    register(run_folder.checkpoint(3), name="kept", alias="best", tracking_uri=run.tracking_uri, run_id=run.run_id)
    return run_folder, run


def test_an_older_checkpoint_is_deleted_unless_a_registered_version_refers_to_it(registered):
    run_folder, run = registered
    for step in (4, 5):
        shutil.copytree(run_folder.checkpoint(3), run_folder.checkpoint(step))
    Retention(run_folder, 1, run).delete_others()
    assert run_folder.checkpoints("training.json") == [3, 5]


def test_the_best_checkpoint_is_kept_and_one_to_go_back_to(registered):
    run_folder, run = registered

    def kept(retention, *needed):
        retention.delete_others(needed)
        return run_folder.checkpoints("training.json")

    for step in range(4, 9):
        shutil.copytree(run_folder.checkpoint(3), run_folder.checkpoint(step))
    best = Retention(run_folder, 1, run, best_by="probe/knn_5_shot")
    for step, score in ((4, 0.5), (5, 0.4), (7, 0.5), (99, 0.9)):
        best.scored(step, {"probe/knn_5_shot": score, "probe/ridge_5_shot": 1 - score})
    assert kept(best, 6) == [3, 4, 6, 8]  # 3 is registered, 4 the best, 6 waits for its score, 8 is the newest
    best.scored(6, {"probe/knn_5_shot": 0.6})
    again = Retention(run_folder, 1, run, best_by="probe/knn_5_shot")  # of a program that goes on
    again.scored(8, {"probe/knn_5_shot": 0.55})
    assert again.best().step == 6
    assert kept(again) == [3, 6, 8]
    assert Retention(run_folder, 1, run, best_by="probe/ridge_5_shot").best() is None
    for step in (9, 10):
        shutil.copytree(run_folder.checkpoint(3), run_folder.checkpoint(step))
    assert kept(Retention(run_folder, 1, run, steps_back=2)) == [3, 6, 10]
    assert kept(Retention(run_folder, 1, run)) == [3, 10]


def test_a_step_replayed_from_its_checkpoint_gives_the_recorded_loss(undisturbed, folder):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    result = replay(ReplayConfig(run=str(folder / "undisturbed"), step=NUM_STEPS - 1))
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)
    assert result.start_step == NUM_STEPS - FEW
    assert (result.first_step, result.last_step) == (NUM_STEPS - 1, NUM_STEPS - 1)
    assert sorted(result.losses) == list(range(NUM_STEPS - FEW, NUM_STEPS))
    assert result.replayed == pytest.approx(result.recorded, rel=1e-6)
    assert result.losses[NUM_STEPS - 2] != pytest.approx(result.recorded, rel=1e-6)


def test_a_recorded_run_is_diagnosed_as_its_last_checkpoint_was(undisturbed, folder):
    found = diagnose(DiagnoseConfig(run="undisturbed", storage=str(folder)))
    assert (found.step, found.num_steps) == (NUM_STEPS, NUM_STEPS)
    loss, norm = found.curves
    assert (loss.name, norm.name) == ("train/loss", "train/weight_norm")
    assert loss.trend.first_step == norm.trend.first_step == NUM_STEPS // 2
    assert norm.trend.slope is not None
    # Only the last of the checkpoints has 16 values in its last doubling.
    [line] = re.findall(r"^undisturbed: step (\d+): loss [\d.]+, (.*)$", undisturbed.printed, re.MULTILINE)
    change, low, high = (
        f"{100 * x:+.1f}" for x in (loss.trend.slope.estimate, loss.trend.slope.low, loss.trend.slope.high)
    )
    assert line == (str(NUM_STEPS), f"{loss.answer} ({change} % per doubling, 90 % interval {low} to {high})")


def test_a_finished_run_is_not_run_again(undisturbed, capsys):
    config, trained, _ = undisturbed
    before = time.monotonic()
    again = pretrain(config)
    assert time.monotonic() - before < 5
    assert again == trained
    assert "undisturbed: already finished, " in capsys.readouterr().out


def test_a_run_killed_between_its_last_step_and_its_result_only_finishes(undisturbed, folder):
    config, trained, _ = undisturbed
    result = folder / "undisturbed" / "result.json"
    content = result.read_bytes()
    result.unlink()
    again = pretrain(config)
    assert again == trained
    assert result.read_bytes() == content
    assert [step for step, _ in history(folder, again.result.run_id)] == list(range(1, NUM_STEPS + 1))


def test_a_name_is_tied_to_its_settings(undisturbed, folder):
    config, *_ = undisturbed
    with pytest.raises(ConfigError) as caught:
        pretrain(replace(config, recipe=replace(config.recipe, weight_decay=0.5)))
    assert one_line(caught).startswith(
        f"name: the run in {folder}/undisturbed has weight_decay 0.0001, this one has 0.5; accepted: "
    )
    with pytest.raises(ConfigError, match=f"has schedule.num_steps {NUM_STEPS}, this one has 5; "):
        pretrain(replace(config, recipe=recipe(5), dry_run=True))


def test_how_a_run_is_carried_out_may_change(undisturbed):
    config, trained, _ = undisturbed
    runtime = replace(config.runtime, num_workers=2, checkpoint_every_steps=1)
    assert pretrain(replace(config, runtime=runtime)) == trained


def test_a_refused_run_leaves_nothing(folder, shards, tmp_path):
    config = run_config(tmp_path / "runs", "refused", shards, 3)
    for changes, message in (
        (
            {"runtime": Runtime(num_workers=65)},
            "^runtime.num_workers: 65; accepted: at most 64, the images in a global batch",
        ),
        ({"register": RegisterAs(alias="v1")}, "^register.alias: 'v1'"),
        ({"recipe": recipe(3, warmup_steps=50)}, "^warmup_steps: 50"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            pretrain(replace(config, **changes))
        one_line(caught)
    tracking = TrackingConfig(uri="http://127.0.0.1:9")
    with pytest.raises(bit_ray.errors.TrackingError, match="cannot be reached") as caught:
        pretrain(replace(config, tracking=tracking))
    one_line(caught)
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_prints_the_plan_and_leaves_nothing(shards, tmp_path, capsys):
    config = run_config(tmp_path / "runs", "dry", shards, 3, micro_batch_size=16)
    assert pretrain(replace(config, dry_run=True)) is None
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    for fact in (
        "3 steps of 64 images, 0.48 passes",
        "1 workers x 4 micro-batches x 16 images",
        "400 images of 50 classes in 4 shards",
        pretrain_plan(config, read_manifest(shards)).digest[:12],
    ):
        assert fact in text
    assert not (tmp_path / "runs").exists()


def test_a_diverged_run_stops_with_the_step_and_a_checkpoint(folder, shards, ray_local):
    config = run_config(folder, "diverged", shards, 40, base_lr_per_256=1e20, log_every_steps=10)
    with pytest.raises(ModelError) as caught:
        pretrain(config)
    text = one_line(caught)
    step = int(re.match(r"step (\d+): the loss or its gradient is not finite; ", text).group(1))
    assert 0 < step < 40
    place = folder / "diverged" / f"nonfinite-step-{step:08d}"
    assert text.endswith(f"checkpoint: {place}")
    model, _ = load_package(place)
    assert any(p.abs().max() > 1e10 for p in model.parameters())
    assert json.loads((place / "training.json").read_text())["progress"]["next_step"] == step
    [run] = runs_named(folder, "diverged")
    assert run.info.status == "FAILED"
    assert not (folder / "diverged" / "result.json").exists()


def runs_named(folder, name):
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    return client.search_runs(
        [client.get_experiment_by_name("bit_ray").experiment_id], f"tags.`bit_ray.run_name` = '{name}'"
    )


def test_two_workers_with_micro_batches_learn_what_one_learns_and_one_that_hangs_is_named_and_ended(
    folder, shards, undisturbed, capsys
):
    config = run_config(
        folder,
        "hangs",
        shards,
        NUM_STEPS,
        num_workers=2,
        micro_batch_size=8,
        checkpoint_every_steps=FEW,
        num_checkpoints_to_keep=NUM_STEPS // FEW,
        stalled_after_s=6.0,
        give_up_after_s=9.0,
    )
    early = folder / "hangs" / f"step-{FEW:08d}"
    stopped = []

    def stop():
        deadline = time.monotonic() + 120
        while not (early / "training.json").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        here = {p.pid for p in psutil.Process().children(recursive=True)}  # and not those of another Ray
        found = psutil.process_iter(["cmdline"])
        workers = [p for p in found if p.pid in here and "RayTrainWorker" in " ".join(p.info["cmdline"] or ())]
        stopped.append(workers[0].pid)
        workers[0].suspend()

    stopper = threading.Thread(target=stop)
    stopper.start()
    trained = pretrain(config)
    stopper.join()
    assert not psutil.pid_exists(stopped[0])
    text = capsys.readouterr().out
    rank, step = re.search(
        r"hangs: worker ([01]) on \S+ has been at step (\d+), [a-z ]+, for \d+ s, not heard of for \d+ s; stacks of ",
        text,
    ).groups()
    assert 0 < int(step) <= NUM_STEPS
    assert re.search(r"hangs: no step for \d+ s; ending the workers", text)
    stacks = (folder / "hangs" / "stacks-attempt-1.txt").read_text()
    assert f"worker {1 - int(rank)} on " in stacks
    assert "in _train" in stacks
    collectives = json.loads(
        (folder / "hangs" / "stacks-attempt-1" / f"collectives-rank-{1 - int(rank):05d}.json").read_text()
    )
    assert {entry["profiling_name"] for entry in collectives["cpu"]["entries"]} >= {"gloo:all_reduce"}
    assert not all(entry["retired"] for entry in collectives["cpu"]["entries"])  # it waits for the worker that hangs
    assert json.loads((folder / "hangs" / "now.json").read_text())["step"] == NUM_STEPS
    first, second = json.loads((folder / "hangs" / "attempts.json").read_text())["attempts"]
    assert (first["ended"], second["ended"]) == ("failed", "finished")
    assert second["first_step"] >= FEW
    assert second["steps_lost"] == first["last_step"] - second["first_step"]
    assert [step for step, _ in history(folder, trained.result.run_id)] == list(range(1, NUM_STEPS + 1))

    told, taken = memory_told_and_taken(config, trained, 2, 8)
    assert told == pytest.approx(taken, rel=0.2)

    # Few steps are compared, before rounding grows.
    assert trained.result.plan_digest == undisturbed.trained.result.plan_digest
    for metric, tolerance in (("train/loss", 1e-4), ("train/grad_norm", 1e-2), ("train/weight_norm", 1e-5)):
        a, b = (history(folder, t.result.run_id, metric)[:FEW] for t in (undisturbed.trained, trained))
        assert [step for step, _ in b] == list(range(1, FEW + 1))
        np.testing.assert_allclose(b, a, rtol=tolerance)
    begin = build_model(pretrain_plan(config, read_manifest(shards)), None).state_dict()
    one, two = weights(folder / "undisturbed" / early.name), weights(early)
    for name, tensor in one.items():
        # Against how far the weights moved: a ReLU on the edge can make much of a little rounding (0.0032 on an EPYC).
        moved, apart = (tensor - begin[name]).norm(), (tensor - two[name]).norm()
        assert apart <= 5e-3 * moved, f"{name}: {apart:.3g} apart, {moved:.3g} moved"


def test_a_store_that_is_away_before_the_first_step_is_waited_for(folder, s3, faulty_s3, shards, ray_local):
    """For the driver, for Ray, for the driver while Ray starts workers, and for a worker."""
    # Named in the URI, the proxy is before the store of Ray's workers, too.
    place = f"endpoint_override={faulty_s3.endpoint.removeprefix('http://')}&scheme=http&region=us-east-1"
    config = replace(
        run_config(f"{s3.uri('runs')}?{place}", "waits", shards, 2),
        tracking=TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db"),
    )

    def one_after_the_other():
        deadline = time.monotonic() + 120
        for file in ("attempts.json", ".ray/.validate_storage_marker", "group.txt", "runtime.json"):
            faulty_s3.forget()
            faulty_s3.faults = Faults(bad_gateway=1.0, only=f"POST /{s3.bucket}/runs/waits/{file}", at_most=1)
            while not faulty_s3.counts["bad_gateway"] and time.monotonic() < deadline:
                time.sleep(0.01)

    faults = threading.Thread(target=one_after_the_other)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        faults.start()
        # Not `pretrain`: no version may have a URI with a query.
        manifest = read_manifest(config.shards)
        train(config, pretrain_plan(config, manifest), config.shards, manifest)
    faults.join()
    assert "waits: waiting for the store, for 120 s: s3://" in printed.getvalue()
    attempts = RunFolder(s3.uri("runs/waits")).attempts()
    assert [attempt.ended for attempt in attempts] == ["failed"] * 3 + ["finished"]
    assert [attempt.why for attempt in attempts] == ["the run begins"] + ["the store was away"] * 3


def test_a_last_checkpoint_that_takes_longer_to_write_than_a_step_may_take_is_no_hang(
    folder, s3, faulty_s3, shards, ray_local, monkeypatch
):
    place = f"endpoint_override={faulty_s3.endpoint.removeprefix('http://')}&scheme=http&region=us-east-1"
    runtime = {"give_up_after_s": 2.0, "stalled_after_s": 2.0}  # from the first step on, which is the last one
    config = replace(
        run_config(f"{s3.uri('runs')}?{place}", "slow", shards, 1, **runtime),
        tracking=TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db"),
    )
    monkeypatch.setattr("bit_ray.training.attempts._SECONDS_TO_SAVE_A_PARAMETER", 1e-3)
    faulty_s3.faults = Faults(bad_gateway=1.0, only=f"/{s3.bucket}/runs/slow/step-", at_most=6)  # tried for 3 s or more
    manifest = read_manifest(config.shards)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train(config, pretrain_plan(config, manifest), config.shards, manifest)
    assert faulty_s3.counts["bad_gateway"] == 6
    assert re.search(r"slow: worker 0 on \S+ has been at step 1, saving, for \d+ s; stacks of ", printed.getvalue())
    assert [attempt.ended for attempt in RunFolder(s3.uri("runs/slow")).attempts()] == ["finished"]


def test_a_run_on_an_object_store_outlives_its_program_then_a_worker_then_its_node(
    folder, undisturbed, s3, tmp_path, monkeypatch
):
    """Shards and checkpoints are on S3; after each fault the run of this name goes on from its last checkpoint."""
    write_glyphs(s3.uri("shards"))
    config = replace(
        run_config(s3.uri("runs"), "outlives", s3.uri("shards"), NUM_STEPS, checkpoint_every_steps=3),
        tracking=TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db"),
    )
    script, settings, first_log, log = (tmp_path / name for name in ("script.py", "config.json", "first.log", "log"))
    script.write_text(SCRIPT)
    write_config(config, settings)
    for name, value in (("BIT_RAY_CACHE", str(tmp_path / "cache")), ("PYTHONUNBUFFERED", "1")):
        monkeypatch.setenv(name, value)

    def start(log, **environment):
        with log.open("w") as output:
            return subprocess.Popen(
                [sys.executable, str(script), str(settings)],
                env={**os.environ, **environment},
                stdout=output,
                stderr=output,
                cwd=tmp_path,
            )

    def saved():
        keys = s3.keys()
        return max((int(step) for key in keys for step in re.findall(r"/step-(\d+)/training.json$", key)), default=0)

    def next_checkpoint(program, log):
        before = saved()
        while saved() == before:
            assert program.poll() is None, log.read_text()
            time.sleep(0.02)

    # The program and its Ray are killed.
    program = start(first_log)
    try:
        next_checkpoint(program, first_log)
    finally:
        family = psutil.Process(program.pid).children(recursive=True) if program.poll() is None else []
        program.kill()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):  # Ray's processes end with the program
                process.kill()
        psutil.wait_procs(family, timeout=30)
    assert program.wait() == -9
    assert "runs/outlives/result.json" not in s3.keys()  # noqa: SIM118
    last = saved()

    # It is started again, on a cluster that is there already: a worker is killed, and then the only node that can
    # train is lost, and another one joins. A lost node is noticed in 1.5 s instead of 15.
    noticed = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": noticed}
    node = {"num_cpus": 4, "object_store_memory": 100 * 2**20}
    nodes = Cluster(head_node_args=head, initialize_head=True)
    try:
        lost = nodes.add_node(**node)
        program = start(log, RAY_ADDRESS=nodes.address)
        next_checkpoint(program, log)
        assert len(kill_ray_processes("RayTrainWorker")) == 1
        next_checkpoint(program, log)
        lost.kill_raylet()
        nodes.add_node(**node)
        assert program.wait(timeout=240) == 0, log.read_text()
    finally:
        nodes.shutdown()
    text = log.read_text()
    shown = [int(step) for step in re.findall(rf"outlives: step (\d+)/{NUM_STEPS} ", text)]
    assert shown[0] > last >= 3
    assert shown[-1] == NUM_STEPS
    assert text.count("outlives: workers failed; starting them again") == 2
    # More may be lost than what was recorded.
    lost = r"(no recorded step|at least \d+ steps?) lost"
    # That a node goes may be known after that its worker does.
    whys = ("the run was started again", "a worker failed", "(a node was lost|a worker failed)")
    for number, why in enumerate(whys, 2):
        assert re.search(rf"outlives: attempt {number} from step .*; {lost} \({why}\)", text)
    attempts = RunFolder(s3.uri("runs/outlives")).attempts()
    assert [attempt.ended for attempt in attempts] == ["running", "failed", "failed", "finished"]
    begun = [attempt.first_step for attempt in attempts]
    assert begun[:2] == [0, last]
    assert begun == sorted(set(begun))

    classifier = bit_ray.load_model("models:/outlives@champion", tracking_uri=f"sqlite:///{folder}/mlflow.db")
    package_uri = s3.uri(f"runs/outlives/step-{NUM_STEPS:08d}")
    expected = undisturbed.trained.result
    for loaded in (classifier, bit_ray.load_model(package_uri)):
        assert_identical(loaded.model.state_dict(), weights(expected.package_uri))
    run_id = classifier.spec.provenance["run_id"]
    assert history(folder, run_id) == history(folder, expected.run_id)
    kept = {key.split("/")[2] for key in s3.keys() if key.startswith("runs/outlives/step-")}  # noqa: SIM118
    assert len(kept) == 2  # the one before may have been skipped, while the store was slow
    assert f"step-{NUM_STEPS:08d}" in kept
