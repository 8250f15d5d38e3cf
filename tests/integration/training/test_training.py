import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from glyph_runs import MODEL, SCRIPT, assert_identical, history, recipe, run_config, weights, write_glyphs
from mlflow import MlflowClient
from ray.cluster_utils import Cluster
from servers import kill_ray_processes

import bit_ray
from bit_ray import store
from bit_ray.config import to_dict
from bit_ray.config_files import write_config
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.shards.write import write_shards
from bit_ray.errors import ConfigError, ModelError
from bit_ray.recipes.hyperrule import RuleOverrides
from bit_ray.run_folder import PlannedTime, RunFolder
from bit_ray.tracking.config import TrackingConfig
from bit_ray.training.checkpoint.retention import Retention
from bit_ray.training.config import FinetuneConfig, RegisterAs, Runtime
from bit_ray.training.finetune import finetune
from bit_ray.training.goodput import goodput
from bit_ray.training.learner import build_model
from bit_ray.training.pretrain import pretrain, pretrain_plan
from bit_ray.weights.package import load_package

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
NUM_STEPS = 60


@pytest.fixture(scope="module")
def reference(folder, shards, ray_local):
    """A short run of one worker and one micro-batch."""
    config = run_config(folder, "reference", shards, 3)
    # As bit-ray plan --run leaves it.
    planned = PlannedTime(seconds=100.0, low=50.0, high=150.0, source="a plan")
    store.write_json(RunFolder.of(config.storage, config.name).planned_file, to_dict(planned))
    return config, pretrain(config)


@pytest.fixture(scope="module")
def undisturbed(folder, shards, ray_local):
    """A longer run that nobody kills."""
    return pretrain(run_config(folder, "undisturbed", shards, NUM_STEPS, checkpoint_every_steps=10)).result


def one_line(caught):
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_run_records_how_far_it_was_from_its_plan(reference, folder):
    config, trained = reference
    spent = goodput(RunFolder.of(config.storage, config.name).attempts())
    metrics = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db").get_run(trained.result.run_id).data.metrics
    assert metrics["run/planned_s"] == 100
    assert metrics["run/plan_error"] == pytest.approx((spent.wall_s - spent.waited_s) / 100 - 1)


def test_a_run_leaves_a_registered_model_with_its_identity(reference, folder, shards):
    config, trained = reference
    result, version = trained.result, trained.version
    manifest = read_manifest(shards)
    plan = pretrain_plan(config, manifest)
    assert result.plan_digest == plan.digest
    assert Path(result.package_uri) == folder / "reference" / "step-00000003"
    assert (version.name, version.version, version.alias) == ("reference", 1, "champion")
    assert version.sha256 == result.sha256

    classifier = bit_ray.load_model("models:/reference@champion", tracking_uri=f"sqlite:///{folder}/mlflow.db")
    assert classifier.sha256 == result.sha256
    assert classifier.spec.class_names == manifest.class_names
    identity = {
        "manifest_digest": manifest.digest,
        "config_digest": plan.digest,
        "run_id": result.run_id,
        "run_name": "reference",
    }
    assert identity.items() <= classifier.spec.provenance.items()
    [prediction] = classifier.predict(np.zeros((40, 50, 3), np.uint8), top_k=3)
    assert len(prediction) == 3

    run = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db").get_run(result.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["bit_ray.manifest_digest"] == manifest.digest
    assert run.data.params["recipe.global_batch_size"] == "64"
    assert run.data.metrics["train/images_seen"] == 192
    names = {path.name for path in Path(run.info.artifact_uri.removeprefix("file://")).rglob("*.*")}
    assert {"config.json", "training.png"} <= names
    assert [step for step, _ in history(folder, result.run_id)] == [1, 2, 3]


def test_the_first_loss_is_that_of_the_zero_head(reference, folder):
    _, trained = reference
    (step, loss), *_ = history(folder, trained.result.run_id)
    assert step == 1
    # The head of a new network is not zero, but its logits are small against ln 50.
    assert loss == pytest.approx(np.log(50), abs=0.5)


def test_two_workers_with_micro_batches_learn_what_one_learns(reference, folder, shards):
    config, trained = reference
    runtime = replace(config.runtime, num_workers=2, micro_batch_size=8)
    other = pretrain(replace(config, name="two-workers", runtime=runtime))
    assert other.result.plan_digest == trained.result.plan_digest
    for metric, tolerance in (("train/loss", 1e-4), ("train/grad_norm", 1e-2), ("train/weight_norm", 1e-5)):
        a, b = (history(folder, t.result.run_id, metric) for t in (trained, other))
        assert [step for step, _ in b] == [1, 2, 3]
        np.testing.assert_allclose(b, a, rtol=tolerance)
    start = build_model(pretrain_plan(config, read_manifest(shards)), None).state_dict()
    one, two = weights(trained.result.package_uri), weights(other.result.package_uri)
    for name, tensor in one.items():
        # Against how far the weights moved: a ReLU on the edge can make much of a little rounding.
        moved, apart = (tensor - start[name]).norm(), (tensor - two[name]).norm()
        assert apart <= 2e-3 * moved, f"{name}: {apart:.3g} apart, {moved:.3g} moved"


def test_an_older_checkpoint_is_deleted_unless_a_registered_version_refers_to_it(reference, folder):
    _, trained = reference
    run = SimpleNamespace(tracking_uri=f"sqlite:///{folder}/mlflow.db", run_id=trained.result.run_id)
    run_folder = RunFolder(str(folder / "reference"))
    for step in (4, 5):
        shutil.copytree(run_folder.checkpoint(3), run_folder.checkpoint(step))
    Retention(run_folder, 1, run).delete_others()
    assert run_folder.checkpoints("training.json") == [3, 5]
    shutil.rmtree(run_folder.checkpoint(5))


def test_the_best_checkpoint_is_kept_and_one_to_go_back_to(reference, folder):
    _, trained = reference
    run = SimpleNamespace(tracking_uri=f"sqlite:///{folder}/mlflow.db", run_id=trained.result.run_id)
    run_folder = RunFolder(str(folder / "reference"))

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
    shutil.rmtree(run_folder.checkpoint(10))
    (folder / "reference" / "best.json").unlink()


def test_a_finished_run_is_not_run_again(reference, capsys):
    config, trained = reference
    before = time.monotonic()
    again = pretrain(config)
    assert time.monotonic() - before < 5
    assert again == trained
    assert "reference: already finished, " in capsys.readouterr().out


def test_a_run_killed_between_its_last_step_and_its_result_only_finishes(reference, folder):
    config, trained = reference
    result = folder / "reference" / "result.json"
    content = result.read_bytes()
    result.unlink()
    again = pretrain(config)
    assert again == trained
    assert result.read_bytes() == content
    assert [step for step, _ in history(folder, again.result.run_id)] == [1, 2, 3]


def test_a_name_is_tied_to_its_settings(reference, folder):
    config, _ = reference
    with pytest.raises(ConfigError) as caught:
        pretrain(replace(config, recipe=replace(config.recipe, weight_decay=0.5)))
    assert one_line(caught).startswith(
        f"name: the run in {folder}/reference has weight_decay 0.0001, this one has 0.5; accepted: "
    )
    with pytest.raises(ConfigError, match="has schedule.num_steps 3, this one has 5; "):
        pretrain(replace(config, recipe=recipe(5)))


def test_how_a_run_is_carried_out_may_change(reference):
    config, trained = reference
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


def test_a_run_outlives_its_worker(folder, shards, undisturbed):
    config = run_config(folder, "outlives", shards, NUM_STEPS, checkpoint_every_steps=10)
    killed = []

    def kill():
        deadline = time.monotonic() + 120
        while not (folder / "outlives" / "step-00000010" / "model.json").exists():
            if time.monotonic() > deadline:
                return
            time.sleep(0.02)
        killed.extend(kill_ray_processes("RayTrainWorker"))

    killer = threading.Thread(target=kill)
    killer.start()
    trained = pretrain(config)
    killer.join()
    assert len(killed) == 1
    assert_identical(weights(trained.result.package_uri), weights(undisturbed.package_uri))
    assert history(folder, trained.result.run_id) == history(folder, undisturbed.run_id)


def test_a_worker_that_hangs_is_named_and_the_run_goes_on(folder, shards, ray_local, capsys):
    config = run_config(
        folder,
        "hangs",
        shards,
        NUM_STEPS,
        num_workers=2,
        checkpoint_every_steps=10,
        stalled_after_s=6.0,
        give_up_after_s=9.0,
    )
    stopped = []

    def stop():
        deadline = time.monotonic() + 120
        while not (folder / "hangs" / "step-00000010").exists() and time.monotonic() < deadline:
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
    assert second["first_step"] >= 10
    assert second["steps_lost"] == first["last_step"] - second["first_step"]
    assert [step for step, _ in history(folder, trained.result.run_id)] == list(range(1, NUM_STEPS + 1))


def test_a_run_outlives_its_node(folder, shards, undisturbed, tmp_path):
    """The only node that can train is lost in mid-run, and another one joins."""
    node = {"num_cpus": 4, "object_store_memory": 100 * 2**20}
    config = run_config(folder, "moved", shards, NUM_STEPS, checkpoint_every_steps=10)
    script, settings, log = tmp_path / "script.py", tmp_path / "config.json", tmp_path / "log"
    script.write_text(SCRIPT)
    write_config(config, settings)
    # A lost node is noticed in 1.5 s instead of 15.
    noticed = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": noticed}
    nodes = Cluster(head_node_args=head, initialize_head=True)
    try:
        lost = nodes.add_node(**node)
        with log.open("w") as output:
            program = subprocess.Popen(
                [sys.executable, str(script), str(settings)],
                env={**os.environ, "RAY_ADDRESS": nodes.address},
                stdout=output,
                stderr=output,
                cwd=tmp_path,
            )
        while not (folder / "moved" / "step-00000010" / "model.json").exists():
            assert program.poll() is None, log.read_text()
            time.sleep(0.02)
        lost.kill_raylet()
        nodes.add_node(**node)
        assert program.wait(timeout=240) == 0, log.read_text()
    finally:
        nodes.shutdown()
    classifier = bit_ray.load_model("models:/moved@champion", tracking_uri=f"sqlite:///{folder}/mlflow.db")
    assert "moved: workers failed; starting them again" in log.read_text()
    assert_identical(classifier.model.state_dict(), weights(undisturbed.package_uri))
    run_id = classifier.spec.provenance["run_id"]
    assert history(folder, run_id) == history(folder, undisturbed.run_id)


def test_a_killed_run_on_an_object_store_continues_with_the_same_name(folder, shards, undisturbed, s3, tmp_path):
    """The program and its Ray are killed; shards and checkpoints are on S3."""
    write_glyphs(s3.uri("shards"))
    config = replace(
        run_config(s3.uri("runs"), "killed", s3.uri("shards"), NUM_STEPS, checkpoint_every_steps=10),
        tracking=TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db"),
    )
    script, settings = tmp_path / "script.py", tmp_path / "config.json"
    script.write_text(SCRIPT)
    write_config(config, settings)
    environment = {**os.environ, "BIT_RAY_CACHE": str(tmp_path / "cache"), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(script), str(settings)]

    with (tmp_path / "first.log").open("w") as log:
        program = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=tmp_path)
    try:
        while "runs/killed/step-00000010/training.json" not in s3.keys():  # noqa: SIM118
            assert program.poll() is None, (tmp_path / "first.log").read_text()
            time.sleep(0.05)
    finally:
        family = psutil.Process(program.pid).children(recursive=True) if program.poll() is None else []
        program.kill()
        for process in family:
            with suppress(psutil.NoSuchProcess):  # Ray's processes end with the program
                process.kill()
        psutil.wait_procs(family, timeout=30)
    assert program.wait() == -9
    assert "runs/killed/result.json" not in s3.keys()  # noqa: SIM118

    again = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    shown = [int(step) for step in re.findall(rf"killed: step (\d+)/{NUM_STEPS} ", again.stdout)]
    assert shown[0] > 10
    assert shown[-1] == NUM_STEPS

    classifier = bit_ray.load_model("models:/killed@champion", tracking_uri=f"sqlite:///{folder}/mlflow.db")
    package_uri = s3.uri(f"runs/killed/step-{NUM_STEPS:08d}")
    for loaded in (classifier, bit_ray.load_model(package_uri)):
        assert_identical(loaded.model.state_dict(), weights(undisturbed.package_uri))
    run_id = classifier.spec.provenance["run_id"]
    assert history(folder, run_id) == history(folder, undisturbed.run_id)
    kept = {key.split("/")[2] for key in s3.keys() if key.startswith("runs/killed/step-")}  # noqa: SIM118
    assert len(kept) == 2  # the one before may have been skipped, while the store was slow
    assert "step-00000060" in kept


def test_few_shot_transfer_starts_at_a_zero_head_and_is_tested_in_full(undisturbed, folder, tmp_path_factory):
    digits = tmp_path_factory.mktemp("digits")
    for split in ("train", "test"):
        write_shards(f"digits:{split}", digits / split, name=f"digits-{split}")
    config = FinetuneConfig(
        name="digits",
        shards=str(digits / "train"),
        init="models:/undisturbed@champion",
        test_shards=str(digits / "test"),
        rule=RuleOverrides(
            resize=36, crop=32, num_steps=60, warmup_steps=0, boundaries=(50,), batch_size=32, base_lr=0.03,
            mixup_alpha=0.1,
        ),
        random_flip=False,
        shots=5,
        subset_seed=3,
        storage=str(folder),
        runtime=Runtime(num_workers=1, log_every_steps=1),
        register=RegisterAs(name="digits-5"),
    )  # fmt: skip
    trained = finetune(config)
    losses = [loss for _, loss in history(folder, trained.result.run_id)]
    assert len(losses) == 60
    assert losses[0] == pytest.approx(np.log(10), rel=1e-6)
    assert np.mean(losses[-5:]) < 0.8 * losses[0]

    subset = json.loads((folder / "digits" / "few-shot" / "subset.json").read_text())
    assert len(set(subset["ids"])) == 50
    manifest = read_manifest(folder / "digits" / "few-shot" / "shards")
    assert manifest.num_examples == 50
    assert trained.result.metrics["test/num_examples"] == 800
    assert trained.result.metrics["test/top_1"] > 0.2
    classifier = bit_ray.load_model("models:/digits-5@champion", tracking_uri=f"sqlite:///{folder}/mlflow.db")
    assert classifier.spec.provenance["parent"] == "models:/undisturbed@champion"
    assert classifier.spec.provenance["parent_digest"] == undisturbed.sha256
    assert classifier.spec.resize_mode == "square"
    assert finetune(config) == trained

    run = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db").get_run(trained.result.run_id)
    assert run.data.metrics["test/top_1"] == trained.result.metrics["test/top_1"]
    assert "digits-test" in {each.dataset.name for each in run.inputs.dataset_inputs}
    with pytest.raises(
        ConfigError, match="^shots: 4 with subset_seed 3; accepted: 5 with subset_seed 3, as this run began; "
    ):
        finetune(replace(config, shots=4))


def test_transfer_settings_that_cannot_work_are_refused(undisturbed, folder, shards, tmp_path_factory):
    digits = tmp_path_factory.mktemp("digits") / "shards"
    write_shards("digits:test", digits, name="digits")
    config = FinetuneConfig(name="refused", shards=str(digits), storage=str(folder), init=undisturbed.package_uri)
    for changes, message in (
        ({"init": ""}, "^init: empty, and model is empty; "),
        (
            {"model": "R50x1"},
            f"^model: R50x1, but the weights in {undisturbed.package_uri} are of {MODEL}; leave it out$",
        ),
        ({"test_shards": str(shards)}, "^test_shards: .* has 50 classes that are not those of the training shards"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            finetune(replace(config, **changes))
        one_line(caught)
    with pytest.raises(
        ModelError, match="^models:/undisturbd@champion: no model of that name; .*undisturbed"
    ) as caught:
        finetune(replace(config, init="models:/undisturbd@champion"))
    one_line(caught)
    assert not (folder / "refused").exists()
