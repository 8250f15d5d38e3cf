"""Commands that are started while the same command runs: status 2 and who runs it, or both do their work."""

import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
import torch
import vtab_files
from mlflow import MlflowClient
from PIL import Image

from bit_ray.cli.main import main
from bit_ray.config_files import write_config
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.embedded.glyphs import GlyphSource
from bit_ray.models.zoo import create_model
from bit_ray.recipes.upstream import UpstreamRecipe
from bit_ray.tracking.config import TrackingConfig
from bit_ray.tracking.runs import TrackedRun
from bit_ray.training.config import PretrainConfig, Runtime
from bit_ray.weights.package import ModelSpec, save_package

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
NETWORK = "R1-1-1-1x0.5"
NUM_STEPS = 40

HOLD = """
import sys
from bit_ray.claim import claimed, claimed_run
what, *names = sys.argv[1:]
if what == "run":
    held = claimed_run(*names)
else:
    held = claimed(*names, "x", remedy="y")
with held:
    print("held", flush=True)
    sys.stdin.read()
"""
RECORD = """
import sys
from bit_ray.tracking.config import TrackingConfig
from bit_ray.tracking.runs import TrackedRun
storage, name = sys.argv[1:]
run = TrackedRun.open(TrackingConfig(), run_name=name, storage=storage, params={}, tags={}, kind="evaluate")
print(run.run_id, flush=True)
sys.stdin.read()
"""
PREPARE = """
import sys
from bit_ray.config_files import read_config
from bit_ray.studies import vtab_shards
from bit_ray.studies.vtab_config import VtabConfig
config, write = read_config(VtabConfig, sys.argv[1]), vtab_shards.write_shards

def pause(*arguments, **options):
    print("writing", flush=True)
    sys.stdin.readline()
    return write(*arguments, **options)

vtab_shards.write_shards = pause if sys.argv[2] == "pause" else write
print("ready", flush=True)
print(vtab_shards.prepare_shards(config.chosen[0], config)[1], flush=True)
"""


@contextmanager
def program(script: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-W", "ignore", "-c", script, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, a saved model of their classes, two images."""
    folder = tmp_path_factory.mktemp("twice")
    write_shards(
        GlyphSource("s", examples_per_class=4), folder / "shards", name="glyphs", row_group_size=16, shard_examples=64
    )
    manifest = read_manifest(folder / "shards")
    torch.manual_seed(0)
    spec = ModelSpec(
        model=NETWORK, num_classes=manifest.num_classes, class_names=manifest.class_names, multi_label=False,
        resize_mode="square", resize_size=32, crop_size=32,
    )  # fmt: skip
    save_package(folder / "model", create_model(NETWORK, manifest.num_classes), spec)
    (folder / "images").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (40, 40), "red").save(folder / "images" / f"{name}.png")
    (folder / "vtab").mkdir()
    vtab_files.svhn(folder / "vtab", num_train=60, num_test=90)
    return folder


@pytest.mark.usefixtures("ray_local")
def test_a_run_is_refused_while_it_runs_and_goes_on_at_once_when_it_was_killed(
    made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = UpstreamRecipe(
        name="small", epochs=NUM_STEPS * 32 / 200, decay_epochs=(), global_batch_size=32, base_lr_per_256=0.4,
        warmup_steps=0, crop_size=32,
    )  # fmt: skip
    config = PretrainConfig(
        name="x", shards=str(made / "shards"), model=NETWORK, storage=str(tmp_path), recipe=recipe,
        runtime=Runtime(num_workers=1, log_every_steps=1, checkpoint_every_steps=10),
    )  # fmt: skip
    write_config(config, tmp_path / "config.json")
    arguments = ["pretrain", "--config", str(tmp_path / "config.json")]
    command = [sys.executable, "-m", "bit_ray.cli.main", *arguments]
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    with (tmp_path / "first.log").open("w") as log:
        first = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        while not (tmp_path / "x" / "plan.json").exists():
            assert first.poll() is None, (tmp_path / "first.log").read_text()
            time.sleep(0.05)
        capfd.readouterr()
        assert main(arguments) == 2
        out, err = capfd.readouterr()
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
    assert out == f"pretrain on {made}/shards (200 images)\n"
    assert re.fullmatch(
        rf"error: --name: {tmp_path}/x is being run by PID {first.pid} of \S+ on \S+ since \S+ \S+ \S+ "
        rf"\(main\.py pretrain --config {tmp_path}/config\.json\); wait for it, stop it, or choose another name\n",
        err,
    )
    assert first.returncode == -9
    assert not (tmp_path / "x" / "result.json").exists()
    assert (tmp_path / "x" / "_running.json").exists()

    assert main(arguments) == 0
    assert not (tmp_path / "x" / "_running.json").exists()
    run_id = json.loads((tmp_path / "x" / "result.json").read_text())["run_id"]
    metrics = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db").get_metric_history(run_id, "train/loss")
    assert sorted(metric.step for metric in metrics) == list(range(1, NUM_STEPS + 1))


@pytest.mark.parametrize(
    "command",
    [
        ["finetune", "--init", "{made}/model", "--shards", "{made}/shards"],
        ["finetune", "--init", "{made}/model", "--shards", "{made}/shards", "--shots", "1"],
        ["fewshot", "--init", "{made}/model", "--shards", "{made}/shards", "--test-shards", "{made}/shards"],
        ["vtab", "--model", NETWORK, "--tasks", "svhn", "--data-dir", "{made}/vtab"],
    ],
    ids=lambda command: " ".join(command[:1] + command[5:6]),
)
def test_what_trains_is_refused_while_the_same_name_runs(
    made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], command: list[str]
) -> None:
    arguments = [word.format(made=made) for word in command]
    with program(HOLD, "run", tmp_path / "runs", "x") as holder:
        assert line(holder) == "held"
        before = files(tmp_path)
        assert main([*arguments, "--name", "x", "--storage", str(tmp_path / "runs")]) == 2
        assert re.fullmatch(
            rf"error: --name: {tmp_path}/runs/x is being run by PID {holder.pid} of .*; wait for it, stop it, or "
            r"choose another name\n",
            capfd.readouterr().err,
        )
        assert files(tmp_path) == before


@pytest.mark.parametrize("output", ["out.csv", "out.parquet", "out/"])
def test_predictions_are_refused_while_the_same_output_is_written(
    made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], output: str
) -> None:
    place = f"{tmp_path}/{output}"
    with program(HOLD, "file", f"{place}_running.json" if output == "out/" else f"{place}._running.json") as holder:
        assert line(holder) == "held"
        before = files(tmp_path)
        assert main(["predict", f"{made}/images", "--model", f"{made}/model", "--output", place]) == 2
        assert re.fullmatch(
            rf"error: --output: {place} is being written by PID {holder.pid} of .*; wait for it, stop it, or choose "
            r"another output\n",
            capfd.readouterr().err,
        )
        assert files(tmp_path) == before


def test_an_evaluation_is_refused_while_its_run_is_recorded(
    made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with program(RECORD, tmp_path, "x") as holder:
        run_id = line(holder)
        arguments = ["evaluate", "--model", f"{made}/model", "--shards", f"{made}/shards", "--name", "x"]
        assert main([*arguments, "--storage", str(tmp_path)]) == 2
        assert re.fullmatch(
            rf"error: --name: 'x' is being recorded by PID {holder.pid} of .*; wait for it, or choose another name\n",
            capfd.readouterr().err,
        )
    # Killed: what it left is sent by the next start.
    with TrackedRun.open(
        TrackingConfig(), run_name="x", storage=str(tmp_path), params={}, tags={}, kind="evaluate"
    ) as again:
        assert again.run_id == run_id
    assert not (tmp_path / "spool").exists() or not any((tmp_path / "spool").iterdir())


def test_studies_of_two_names_share_the_shards_that_both_find_missing(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "vtab", tmp_path / "data")
    settings = []
    for name in ("a", "b"):
        settings.append(tmp_path / f"{name}.json")
        text = {"name": name, "model": NETWORK, "tasks": ["svhn"], "num_train": 20, "num_val": 4}
        text |= {"data_dir": str(tmp_path / "data"), "storage": str(tmp_path)}
        settings[-1].write_text(json.dumps(text))
    with program(PREPARE, settings[0], "pause") as first:
        assert (line(first), line(first)) == ("ready", "writing")
        with program(PREPARE, settings[1], "go") as second:
            assert line(second) == "ready"
            assert second.stdout is not None
            assert select.select([second.stdout], [], [], 4.0)[0] == []  # it waits
            assert first.stdin is not None
            first.stdin.write("\n\n")
            first.stdin.flush()
            assert line(first) == "writing"  # the other set of the task
            found = [line(first), line(second)]
    assert found[0].startswith("Index(")
    assert found[0] == found[1]
    root = tmp_path / "vtab" / "svhn"
    assert sorted(path.name for path in root.iterdir()) == ["index.json", "test", "train800val200"]
    assert read_manifest(root / "test").num_examples == 90


def test_what_a_killed_run_was_writing_is_gone_with_the_next_start(tmp_path: Path) -> None:
    left = tmp_path / "x" / f".plan.json.{'0' * 32}.partial"
    left.parent.mkdir()
    left.touch()
    with program(HOLD, "run", tmp_path, "x") as holder:
        assert line(holder) == "held"
        assert os.listdir(tmp_path / "x") == ["_running.json"]
