"""A job on a cluster that was started separately: a head and a second raylet, token authentication, shards on S3."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from s3_server import Bucket, free_ports

import bit_ray
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.embedded.glyphs import GlyphSource

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[3]
SMALL = shlex.split(
    "--model R1-1-1-1x0.5 --recipe.epochs 2 --recipe.decay-epochs 1 1.5 --recipe.warmup-steps 2 --recipe.crop-size 32 "
    "--runtime.num-workers 2 --runtime.micro-batch-size 3 --runtime.log-every-steps 5"
)


@pytest.fixture
def cluster(s3: Bucket) -> Iterator[dict[str, str]]:
    """The environment in which `ray job submit` reaches the cluster, whose processes know the S3 server."""
    folder = Path(tempfile.mkdtemp(prefix="brc-"))  # short, as sockets lie in it
    environment = {
        **os.environ,
        "CLUSTER_DIR": str(folder),
        "CLUSTER_PORT": str(free_ports(1)[0]),
        "CLUSTER_CPUS": "2",
        "PYTHON": sys.executable,
    }
    script = str(ROOT / "clusters" / "local.sh")
    try:
        subprocess.run([script, "up", "2"], env=environment, check=True, timeout=200)
        printed = subprocess.run([script, "env"], env=environment, check=True, capture_output=True, text=True).stdout
        exports = (line.removeprefix("export ").partition("=") for line in printed.splitlines())
        yield environment | {name: value for name, _, value in exports}
    finally:
        nodes = [psutil.Process(int(file.read_text())) for file in folder.glob("node*.pid")]
        started = nodes + [process for node in nodes for process in node.children(recursive=True)]
        subprocess.run([script, "down"], env=environment, check=True, timeout=60)
        _, left = psutil.wait_procs(started, timeout=5)
        shutil.rmtree(folder)
    assert len(started) > 10
    assert left == []


def submit(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "job", "submit", "--working-dir", ".", "--", "python", "jobs/pretrain_jft.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)


@pytest.mark.timeout(600)
def test_the_jft_job_runs_on_two_raylets_and_a_batch_that_is_too_small_fails_it(
    cluster: dict[str, str], s3: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(
        GlyphSource("s", examples_per_class=3), s3.uri("shards"), name="glyphs", row_group_size=8, shard_examples=40
    )
    tracking_uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    places = ["--shards", s3.uri("shards"), "--storage", s3.uri("runs"), "--tracking.uri", tracking_uri]

    done = submit(cluster, "--name", "refused", *places, *SMALL, "--recipe.global-batch-size", "1")
    assert done.returncode != 0
    # Once from the job, and once where Ray repeats the end of a failed job's log.
    errors = {line for line in done.stdout.splitlines() if line.startswith("error: ")}
    assert errors == {
        "error: --runtime.num-workers: 2; accepted: at most 1, the images in a global batch; lower it, or raise the "
        "batch size"
    }
    assert "Traceback" not in done.stdout
    assert re.search(r"Job 'raysubmit_\w+' failed", done.stdout + done.stderr)
    assert {key.partition("/")[0] for key in s3.keys()} == {"shards"}  # noqa: SIM118  # a bucket, not a dict

    done = submit(cluster, "--name", "small", *places, *SMALL, "--recipe.global-batch-size", "12")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "small: step 25/25" in done.stdout
    assert "models:/small@champion, version 1" in done.stdout
    assert max(map(len, done.stdout.splitlines())) < 1000, "lines that Ray writes about every report"
    for node in (0, 1):  # each raylet keeps the logs of its own workers
        logs = Path(cluster["CLUSTER_DIR"], f"node{node}").glob("session_2*/logs/train/ray-train-app-worker-*.log")
        assert len(list(logs)) == 1

    monkeypatch.setenv("BIT_RAY_CACHE", str(tmp_path / "cache"))
    model = bit_ray.load_model("models:/small@champion", tracking_uri=tracking_uri)
    assert model.spec.num_classes == 50
    assert model.spec.recipe["name"] == "bit_l"
    assert len(model.predict(np.zeros((40, 30, 3), np.uint8), top_k=3)[0]) == 3
    assert model.spec.provenance["run_id"] in done.stdout
    # The code that came with the job is what ran: outside this git work tree the revision is a digest of the files.
    assert "+src." in model.spec.provenance["code_revision"]
