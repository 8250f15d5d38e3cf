"""A job on a cluster that was started separately: a head and a second raylet, token authentication, shards on S3.

A Prometheus watches it by the files in ``clusters/``.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
from s3_server import Bucket, S3Server, free_ports

import bit_ray
from bit_ray.cli.main import main
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.embedded.glyphs import GlyphSource

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[3]
SMALL = shlex.split(
    "--model R1-1-1-1x0.5 --recipe.epochs 2 --recipe.decay-epochs 1 1.5 --recipe.warmup-steps 2 --recipe.crop-size 32 "
    "--runtime.num-workers 2 --runtime.micro-batch-size 3 --runtime.log-every-steps 5 --runtime.peak-tflops 0.1"
)


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server) -> Iterator[Bucket]:
    found = Bucket(s3_server.endpoint, "job-submit", s3_server.client(), s3_server)
    found.client.create_bucket(Bucket=found.bucket)
    yield found
    found.delete()


@pytest.fixture(scope="module")
def cluster(bucket: Bucket) -> Iterator[dict[str, str]]:
    """The environment in which `ray job submit` reaches the cluster, whose processes know the S3 server."""
    folder = Path(tempfile.mkdtemp(prefix="brc-"))  # short, as sockets lie in it
    environment = {
        **os.environ,
        **bucket.environment,
        "RAY_metrics_report_interval_ms": "2000",
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


@pytest.fixture(scope="module")
def prometheus(cluster: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a Prometheus that runs by the files in ``clusters/``; empty where there is no such program."""
    program = shutil.which("prometheus")
    if program is None:
        yield ""
        return
    folder = tmp_path_factory.mktemp("prometheus")
    config = (ROOT / "clusters" / "prometheus.yml").read_text()
    assert config.count("http://127.0.0.1:8265/") == 1
    config = config.replace("http://127.0.0.1:8265", cluster["RAY_API_SERVER_ADDRESS"])
    (folder / "prometheus.yml").write_text(re.sub(r"_interval: \d+s", "_interval: 1s", config))
    shutil.copy(ROOT / "clusters" / "alerts.yml", folder)
    shutil.copy(Path(cluster["CLUSTER_DIR"], "auth_token"), folder)
    address = f"127.0.0.1:{free_ports(1)[0]}"
    command = [program, "--config.file=prometheus.yml", f"--web.listen-address={address}", "--storage.tsdb.path=data"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    yield f"http://{address}"
    server.terminate()
    server.wait(timeout=30)


def asked(prometheus: str, path: str, **query: Any) -> Any:
    url = f"{prometheus}/api/v1/{path}?{urllib.parse.urlencode(query)}"
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)["data"]


class Job(NamedTuple):
    began: float
    done: subprocess.CompletedProcess[str]
    tracking_uri: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        """What the job printed, line by line; Ray's own lines about it come before and after."""
        return [json.loads(line) for line in self.done.stdout.splitlines() if line.startswith("{")]

    @property
    def text(self) -> str:
        return "\n".join(line["message"] for line in self.lines)


@pytest.fixture(scope="module")
def small(cluster: dict[str, str], bucket: Bucket, prometheus: str, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job that has trained, its lines in JSON."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in bucket.environment.items():
            environment.setenv(name, value)
        source = GlyphSource("s", examples_per_class=3)
        write_shards(source, bucket.uri("shards"), name="glyphs", row_group_size=8, shard_examples=40)
    tracking_uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"
    places = ["--shards", bucket.uri("shards"), "--storage", bucket.uri("runs"), "--tracking.uri", tracking_uri]
    began = time.time()
    done = submit(cluster, "--name", "small", *places, *SMALL, "--recipe.global-batch-size", "12", log_format="JSON")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return Job(began, done, tracking_uri)


def submit(environment: dict[str, str], *arguments: str, log_format: str = "TEXT") -> subprocess.CompletedProcess[str]:
    ray = str(Path(sys.executable).with_name("ray"))
    variables = json.dumps({"env_vars": {"RAY_LOGGING_CONFIG_ENCODING": log_format}})
    command = [ray, "job", "submit", "--working-dir", ".", "--runtime-env-json", variables]
    command += ["--", "python", "jobs/pretrain_jft.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)


@pytest.mark.timeout(600)
def test_a_job_with_a_batch_that_is_too_small_fails(cluster: dict[str, str], bucket: Bucket, small: Job) -> None:
    places = [
        "--shards",
        bucket.uri("shards"),
        "--storage",
        bucket.uri("refused"),
        "--tracking.uri",
        small.tracking_uri,
    ]
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
    assert {key.partition("/")[0] for key in bucket.keys()} == {"shards", "runs"}  # noqa: SIM118  # not a dict


@pytest.mark.timeout(600)
def test_the_jft_job_runs_on_two_raylets(
    cluster: dict[str, str], small: Job, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = small.text
    assert "small: step 25/25" in text
    assert "models:/small@champion, version 1" in text
    assert max(map(len, text.splitlines())) < 1000, "lines that Ray writes about every report"
    for node in (0, 1):  # each raylet keeps the logs of its own workers
        logs = Path(cluster["CLUSTER_DIR"], f"node{node}").glob("session_2*/logs/train/ray-train-app-worker-*.log")
        assert len(list(logs)) == 1

    for name, value in bucket.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("BIT_RAY_CACHE", str(tmp_path / "cache"))
    model = bit_ray.load_model("models:/small@champion", tracking_uri=small.tracking_uri)
    assert model.spec.num_classes == 50
    assert model.spec.recipe["name"] == "bit_l"
    assert len(model.predict(np.zeros((40, 30, 3), np.uint8), top_k=3)[0]) == 3
    assert model.spec.provenance["run_id"] in text
    # The code that came with the job is what ran: outside this git work tree the revision is a digest of the files.
    assert "+src." in model.spec.provenance["code_revision"]


def test_every_line_of_a_job_is_json_and_says_what_it_is_about(small: Job) -> None:
    printed = small.done.stdout.partition("Running entrypoint for job ")[2].splitlines()[1:]
    of_ray = re.compile(r"\d{4}-\d\d-\d\d .*\b(?:cli|sdk)\.py:\d+ -- |\s*$")  # that of `ray job submit`, at the end
    assert [line for line in printed if not line.startswith("{") and not of_ray.match(line)] == []
    for line in small.lines:
        assert {"asctime", "levelname", "message", "run", "attempt", "rank", "step"} <= line.keys()
    last = next(line for line in small.lines if "small: step 25/25" in line["message"])
    assert (last["run"], last["attempt"], last["rank"], last["step"]) == ("small", 1, None, 25)


@pytest.mark.prometheus
def test_every_expression_of_the_dashboard_gives_a_series(prometheus: str, small: Job) -> None:
    dashboard = json.loads((ROOT / "clusters" / "grafana" / "bit_ray.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    assert len(expressions) > 20
    variables = {item["name"]: item["query"] for item in dashboard["templating"]["list"]}
    metric = re.fullmatch(r"label_values\((\w+), run\)", variables["run"]["query"])
    assert metric is not None

    def series(expression: str) -> list[dict[str, str]]:
        found = asked(prometheus, "query_range", query=expression, start=small.began, end=time.time(), step="1s")
        return [one["metric"] for one in found["result"]]

    for expression in [*expressions, metric[1]]:
        assert series(expression.replace("$run", "small")), expression
    assert series("ray_bit_ray_no_such_metric") == []
    [loss] = series("ray_bit_ray_train_loss")
    assert (loss["run"], loss["kind"], loss["attempt"]) == ("small", "pretrain", "1")
    assert {worker["rank"] for worker in series("ray_bit_ray_worker_step")} == {"0", "1"}

    rules = asked(prometheus, "rules")["groups"][0]["rules"]
    assert {rule["health"] for rule in rules} == {"ok"}
    names = {name for rule in rules for name in re.findall(r"ray_\w+", rule["query"])}
    assert "ray_bit_ray_run_still_s" in names
    for name in names - {"ray_node_gpus_utilization"}:  # there is no GPU here
        assert series(name), name


def test_status_shows_what_the_cluster_and_the_storage_say_and_the_storage_alone_without_it(
    cluster: dict[str, str],
    small: Job,
    bucket: Bucket,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in (*bucket.environment, "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, cluster[name])
    address = ["--address", cluster["RAY_API_SERVER_ADDRESS"]]
    command = ["status", "small", "--storage", bucket.uri("runs")]
    assert main([*command, *address, "--price", "2"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("small: finished, pretrain of R1-1-1-1x0.5, step 25 of 25, saved after 25\n")
    assert re.search(r"raysubmit_\w+ *\S succeeded *\S small ", text)
    assert "cluster: 2 nodes, 4 CPUs, 0 GPUs; 2 idle\n" in text
    assert re.search(r"idle: \S+ \(the head\), 2 CPUs, 0 GPUs\n", text)
    assert text.endswith("idle nodes cost 4.00 an hour\n")

    monkeypatch.setenv("RAY_AUTH_TOKEN", "guessed")
    assert main([*command, *address]) == 2
    refused = f"error: --address: {address[1]} refuses the token (HTTP 403); set RAY_AUTH_TOKEN_PATH to the cluster's "
    assert capsys.readouterr().err.startswith(refused)
    assert main([*command, "--address", f"http://127.0.0.1:{free_ports(1)[0]}"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("small: finished, ")
    assert text.endswith(" (Connection refused); what is above is of the storage alone\n")
