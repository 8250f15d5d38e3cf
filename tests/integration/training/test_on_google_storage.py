"""A run whose shards, checkpoints and claim lie on Google Cloud Storage, killed and started again."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
from glyph_runs import SCRIPT, run_config
from gs_server import GoogleBucket

import bit_ray
from bit_ray import store
from bit_ray.config_files import write_config
from bit_ray.tracking.config import TrackingConfig
from bit_ray.training.pretrain import pretrain

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]


def test_a_run_that_was_killed_goes_on_from_its_checkpoint_in_the_bucket(
    gs: GoogleBucket,
    shards: Path,
    ray_local: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("BIT_RAY_CACHE", str(tmp_path / "cache"))
    for path in Path(shards).iterdir():
        store.upload_file(path, gs.uri(f"shards/{path.name}"))
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    config = run_config(gs.uri("runs"), "cloudy", gs.uri("shards"), 30, checkpoint_every_steps=5)
    config = bit_ray.PretrainConfig(**{**vars(config), "tracking": TrackingConfig(uri=uri)})
    script, settings = tmp_path / "script.py", tmp_path / "config.json"
    script.write_text(SCRIPT)
    write_config(config, settings)
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    with open(tmp_path / "log", "wb") as log:
        command = [sys.executable, str(script), str(settings)]
        first = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 200
        while not any(key.endswith("/training.json") for key in gs.keys()):  # noqa: SIM118  # a bucket, not a dict
            assert first.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.02)
    finally:
        first.kill()
        first.wait()
    assert "runs/cloudy/result.json" not in gs.keys()  # noqa: SIM118
    assert json.loads(gs.read("runs/cloudy/_running.json"))["pid"] == first.pid

    capsys.readouterr()
    assert pretrain(config) is not None
    out = capsys.readouterr().out
    continued = re.search(r"cloudy: attempt \d+ from step (\d+)", out)
    assert continued, out
    assert int(continued[1]) >= 5
    assert "runs/cloudy/_running.json" not in gs.keys()  # noqa: SIM118
    result = json.loads(gs.read("runs/cloudy/result.json"))
    assert result["package_uri"] == gs.uri("runs/cloudy/step-00000030")
    assert bit_ray.load_model(result["package_uri"]).sha256 == result["sha256"]
    assert bit_ray.load_model("models:/cloudy@champion", tracking_uri=uri).spec.num_classes == 50
