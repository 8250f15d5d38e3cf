"""The main job, at a tenth of its size: every joint of it, from shards to a prediction on an image file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[3]
SMALL = [
    "--upstream",
    "glyphs:s",
    "--shots",
    "1",
    "2",
    "--scratch-lrs",
    "0.03",
    "--recipe.epochs",
    "1",
    "--recipe.decay-epochs",
    "0.5",
    "--recipe.warmup-steps",
    "5",
    "--rule.num-steps",
    "8",
    "--rule.batch-size",
    "16",
]


@pytest.mark.timeout(600)
def test_the_main_job_runs_end_to_end(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    command = [sys.executable, str(ROOT / "jobs" / "quickstart.py"), *SMALL]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=580, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for table in ("Top-1 on 800 test digits, median of 5 draws", "Predictions from the registry", "Registered", "Time"):
        assert table in done.stdout
    assert "Traceback" not in done.stderr

    runs = tmp_path / "bit_ray_runs"
    for picture in ("few_shot.png", "predictions.png"):
        with Image.open(runs / picture) as image:
            assert min(image.size) > 300
    for k in (1, 2):
        for seed in range(5):
            index = json.loads((runs / "digits-few-shot" / "subsets" / f"{k}-per-class-seed-{seed}.json").read_text())
            assert len(index["ids"]) == 10 * k
    scores = json.loads((runs / "digits" / "result.json").read_text())["metrics"]
    assert scores["test/num_examples"] == 800
    assert scores["test/top_1"] > 0.5  # chance is 0.1

    # What it says to type next works as it stands, in any folder.
    commands = done.stdout.split("Next, for example:\n")[1].split("  mlflow ui")[0]
    assert commands.startswith("  source ")
    environment |= {"PATH": "/usr/bin:/bin", "COLUMNS": "400"}  # no path in the table is broken into lines
    typed = subprocess.run(
        ["bash", "-e"],
        input=commands,
        cwd="/",
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert typed.returncode == 0, typed.stderr
    assert "digits-test-00000.png" in typed.stdout
    assert "glyphs-s" in typed.stdout
