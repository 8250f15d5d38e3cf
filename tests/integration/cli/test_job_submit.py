"""Jobs on a cluster that was started separately: a head and a second raylet, token authentication, shards on S3.

A Prometheus watches them by the files in ``clusters/``.
"""

import codecs
import contextlib
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
from proxy import Proxy
from ray.job_submission import JobSubmissionClient
from s3_server import READ_ONLY_KEY, Bucket, S3Server, free_ports

import bit_ray
from bit_ray.cli.main import main
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.embedded.glyphs import GlyphSource
from bit_ray.errors import DataError
from bit_ray.submission.nodes import small_file
from bit_ray.tracking.identity import code_digest

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
    """The environment in which a job is submitted to the cluster, whose processes know the S3 server."""
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
    (folder / "prometheus.yml").write_text(re.sub(r"_interval: \d+s", "_interval: 2s", config))
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
def shards(bucket: Bucket) -> str:
    with pytest.MonkeyPatch.context() as environment:
        for name, value in bucket.environment.items():
            environment.setenv(name, value)
        source = GlyphSource("s", examples_per_class=3)
        write_shards(source, bucket.uri("shards"), name="glyphs", row_group_size=8, shard_examples=40)
    return bucket.uri("shards")


@pytest.fixture(scope="module")
def small(cluster: dict[str, str], bucket: Bucket, shards: str, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job of one worker that Ray's own command has submitted, its lines in JSON."""
    tracking_uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"
    places = ["--shards", shards, "--storage", bucket.uri("runs"), "--tracking.uri", tracking_uri]
    settings = [*SMALL, "--recipe.global-batch-size", "12", "--runtime.num-workers", "1"]
    done = submit(cluster, "--name", "small", *places, *settings, log_format="JSON")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return Job(done, tracking_uri)


def submit(environment: dict[str, str], *arguments: str, log_format: str = "TEXT") -> subprocess.CompletedProcess[str]:
    ray = str(Path(sys.executable).with_name("ray"))
    variables = json.dumps({"env_vars": {"RAY_LOGGING_CONFIG_ENCODING": log_format}})
    command = [ray, "job", "submit", "--working-dir", ".", "--runtime-env-json", variables]
    command += ["--", "python", "jobs/pretrain_jft.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)


class Started:
    """A ``bit-ray`` command and what it prints; every wait for either has an end."""

    def __init__(self, environment: dict[str, str], *arguments: str, terminal: bool = False) -> None:
        self._output, theirs = pty.openpty() if terminal else os.pipe()
        self.text = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bit_ray.cli.main", *arguments],
            env={**environment, "PYTHONPATH": str(ROOT)},
            stdin=theirs if terminal else subprocess.DEVNULL, stdout=theirs, stderr=theirs,
            start_new_session=terminal,
        )  # fmt: skip
        os.close(theirs)

    def __enter__(self) -> "Started":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._output)

    def read(self, wanted: Callable[[str], object], seconds: float = 150) -> None:
        """Read on, until what was printed so far is as wanted."""
        deadline = time.monotonic() + seconds
        while not wanted(self.text):
            assert self._more(deadline - time.monotonic()), f"after {seconds} s or at the end:\n{self.text}"

    def status(self, seconds: float = 200) -> int:
        """Read to the end of what it prints; return its exit status."""
        deadline = time.monotonic() + seconds
        while self._more(deadline - time.monotonic()):
            pass
        try:
            return self.process.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs after {seconds} s:\n{self.text}") from None

    def type(self, text: str) -> None:
        os.write(self._output, text.encode())

    def _more(self, seconds: float) -> bool:
        if not select.select([self._output], [], [], max(0.0, seconds))[0]:
            return False
        try:
            data = os.read(self._output, 65536)
        except OSError:  # of a terminal whose last user has ended
            data = b""
        self.text += self._decoder.decode(data)
        return data != b""


def client(environment: dict[str, str]) -> JobSubmissionClient:
    token = Path(environment["RAY_AUTH_TOKEN_PATH"]).read_text().strip()
    return JobSubmissionClient(environment["RAY_API_SERVER_ADDRESS"], headers={"Authorization": f"Bearer {token}"})


SOWN = {"HF_TOKEN": "SOWN-token", "MLFLOW_TRACKING_PASSWORD": "SOWN-password", "MY_KEY": "SOWN-key"}


class Sent(NamedTuple):
    began: float
    text: str
    """What it printed."""
    commands: str
    """The command lines of all processes during the preflight and at the end of the training."""
    record: str
    """What the cluster tells of its jobs."""
    job: str
    tracked: Path


@pytest.fixture(scope="module")
def sent(
    cluster: dict[str, str], bucket: Bucket, shards: str, prometheus: str, tmp_path_factory: pytest.TempPathFactory
) -> Sent:
    """A job of two workers that ``bit-ray submit`` has looked at and submitted, with secrets in its hands."""
    tracked = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    settings = ["--name", "sent", "--shards", shards, "--storage", bucket.uri("runs"), "--tracking.uri"]
    settings += [f"sqlite:///{tracked}", *SMALL, "--recipe.global-batch-size", "12"]
    before = {job.submission_id for job in client(cluster).list_jobs()}
    began, commands = time.time(), ""
    with Started({**cluster, **SOWN}, "submit", str(ROOT / "jobs" / "pretrain_jft.py"), "--", *settings) as command:
        for mark in ("Preflight: ", "step 25/25"):
            command.read(lambda text, mark=mark: mark in text, seconds=400)
            commands += str([found.info["cmdline"] for found in psutil.process_iter(["cmdline"])])
        assert command.status() == 0, command.text
    jobs = client(cluster).list_jobs()
    [job] = {job.submission_id for job in jobs} - before - {None}
    return Sent(began, command.text, commands, json.dumps([str(job) for job in jobs]), job, tracked)


@pytest.mark.timeout(900)
def test_bit_ray_submit_looks_first_and_trains_with_this_code_and_leaves_no_secret(
    cluster: dict[str, str], bucket: Bucket, sent: Sent
) -> None:
    for check in ("settings", "storage", "tracker", "workers", "lanes", "disk", "all-reduce", "first step", "CPUs"):
        assert re.search(rf"^(ok|warning) +{check} ", sent.text, re.MULTILINE), sent.text
    assert "GB/s between 2 nodes by gloo" in sent.text
    assert "sent: step 25/25" in sent.text
    # Both workers have the code and the compiled decoder of this machine, which `ray job submit` leaves behind.
    workers = set(re.findall(r"worker (\d) on 127\.0\.0\.\d: bit_ray (\w+), compiled decoder", sent.text))
    assert workers == {("0", code_digest()), ("1", code_digest())}
    # The preflight has left nothing behind, neither in the store nor at the cluster.
    assert not [key for key in bucket.keys() if "preflight" in key]  # noqa: SIM118  # not a dict
    assert f"ray job stop --address {cluster['RAY_API_SERVER_ADDRESS']} {sent.job}" in sent.text
    # Nothing of this machine's secrets has reached the cluster.
    assert "bit_ray.cli.main" in sent.commands
    assert "SOWN" not in sent.text + sent.record + sent.commands
    logs = [path for path in Path(cluster["CLUSTER_DIR"]).rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(logs) > 50
    assert [path for path in (*logs, sent.tracked) if b"SOWN" in path.read_bytes()] == []
    keys = bucket.keys()
    assert sum("sent" in key for key in keys) > 5
    assert not any(b"SOWN" in bucket.client.get_object(Bucket=bucket.bucket, Key=key)["Body"].read() for key in keys)


@pytest.mark.timeout(600)
def test_each_raylet_keeps_the_logs_of_its_own_workers(cluster: dict[str, str], small: Job, sent: Sent) -> None:
    logs = [
        Path(cluster["CLUSTER_DIR"], f"node{node}").glob("session_2*/logs/train/ray-train-app-worker-*.log")
        for node in (0, 1)
    ]
    assert sorted(len(list(found)) for found in logs) == [1, 2]  # one worker of one job, two of the other


@pytest.mark.timeout(600)
def test_a_job_with_a_batch_that_is_too_small_fails(
    cluster: dict[str, str], bucket: Bucket, shards: str, small: Job
) -> None:
    places = ["--shards", shards, "--storage", bucket.uri("refused"), "--tracking.uri", small.tracking_uri]
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
def test_the_jft_job_trains_where_ray_has_sent_it(
    small: Job, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = small.text
    assert "small: step 25/25" in text
    # What was sent is small, and without the C extension, which git ignores.
    assert re.search(rf"worker 0 on 127\.0\.0\.\d: bit_ray {code_digest()}, plain decoder", text)
    assert "models:/small@champion, version 1" in text
    assert max(map(len, text.splitlines())) < 1000, "lines that Ray writes about every report"

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
def test_every_expression_of_the_dashboard_gives_a_series(prometheus: str, sent: Sent) -> None:
    dashboard = json.loads((ROOT / "clusters" / "grafana" / "bit_ray.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    assert len(expressions) > 20
    variables = {item["name"]: item["query"] for item in dashboard["templating"]["list"]}
    metric = re.fullmatch(r"label_values\((\w+), run\)", variables["run"]["query"])
    assert metric is not None

    def series(expression: str) -> list[dict[str, str]]:
        found = asked(prometheus, "query_range", query=expression, start=sent.began, end=time.time(), step="1s")
        return [one["metric"] for one in found["result"]]

    def comes(expression: str) -> bool:
        deadline = time.monotonic() + 30  # from Ray to Prometheus it takes seconds
        while not (found := series(expression)) and time.monotonic() < deadline:
            time.sleep(1)
        return found != []

    for expression in [*expressions, metric[1]]:
        assert comes(expression.replace("$run", "sent")), expression
    assert series("ray_bit_ray_no_such_metric") == []
    [loss] = series('ray_bit_ray_train_loss{run="sent"}')
    assert (loss["run"], loss["kind"], loss["attempt"]) == ("sent", "pretrain", "1")
    assert {worker["rank"] for worker in series('ray_bit_ray_worker_step{run="sent"}')} == {"0", "1"}

    rules = asked(prometheus, "rules")["groups"][0]["rules"]
    assert {rule["health"] for rule in rules} == {"ok"}
    names = {name for rule in rules for name in re.findall(r"ray_\w+", rule["query"])}
    assert "ray_bit_ray_run_still_s" in names
    for name in names - {"ray_node_gpus_utilization"}:  # there is no GPU here
        assert comes(name), name


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
    assert main([*command, *address, "--node-price", "2"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("small: finished, pretrain of R1-1-1-1x0.5, step 25 of 25, saved after 25\n")
    assert re.search(r"raysubmit_\w+ *\S succeeded *\S small ", text)
    assert "cluster: 2 nodes, 4 CPUs, 0 GPUs; 2 idle\n" in text
    assert re.search(r"idle: \S+ \(the head\), 2 CPUs, 0 GPUs, for \d+ (s|min)\n", text)
    assert text.endswith("idle nodes cost 4.00 an hour\n")

    monkeypatch.setenv("RAY_AUTH_TOKEN", "guessed")
    assert main([*command, *address]) == 2
    refused = f"error: --address: {address[1]} refuses the token (HTTP 403); set RAY_AUTH_TOKEN_PATH to the cluster's "
    assert capsys.readouterr().err.startswith(refused)
    assert main([*command, "--address", f"http://127.0.0.1:{free_ports(1)[0]}"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("small: finished, ")
    assert text.endswith(" (Connection refused); what is above is of the storage alone\n")


COUNT_JOB = """
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bit_ray.cli.main import run_job


@dataclass(frozen=True, kw_only=True)
class CountConfig:
    \"\"\"Count until a file is there.\"\"\"

    until: str = ""
    saved: str = ""
    status: int = 0


def count(config):
    def save(*_):
        time.sleep(4)  # longer than Ray's default of 3 s
        if config.saved:
            Path(config.saved).write_text("saved")
        sys.exit(config.status)

    signal.signal(signal.SIGTERM, save)
    number = 0
    while not (config.until and Path(config.until).exists()):
        print(f"number {number} é", flush=True)
        number += 1
        time.sleep(0.05)
    sys.exit(config.status)


if __name__ == "__main__":
    run_job(count, CountConfig)
"""


@pytest.fixture(scope="module")
def count_job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("project") / "count.py"
    path.write_text(COUNT_JOB)
    return path


def test_preflight_names_each_thing_that_would_fail(cluster: dict[str, str], shards: str) -> None:
    settings = ["--name", "a", "--shards", shards, "--storage", "s3://no-such-bucket-here/runs"]
    settings += ["--tracking.uri", "http://127.0.0.1:9", *SMALL, "--recipe.global-batch-size", "12"]
    settings += ["--runtime.num-workers", "9"]
    with Started(cluster, "preflight", "pretrain", "--", *settings) as preflight:
        assert preflight.status() == 2, preflight.text
    out = preflight.text
    failures = dict(re.findall(r"^failed +(\S+) +(.*)$", out, re.MULTILINE))
    assert set(failures) == {"storage", "tracker", "workers"}, out
    assert "no-such-bucket-here" in failures["storage"]
    assert "http://127.0.0.1:9: cannot be reached (connection refused)" in failures["tracker"]
    assert failures["workers"] == (
        "--runtime.num-workers: 9, but the cluster has 4 CPUs and no autoscaler that adds any; accepted: at most 4; "
        "lower it, or add nodes"
    )
    assert out.splitlines()[-1].startswith("error: preflight: 3 of ")
    assert "Traceback" not in out


def test_a_bucket_that_may_only_be_read_is_refused(s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READ_ONLY_KEY)
    with pytest.raises(DataError, match="refused"), small_file(s3.uri("runs")):
        pass


def test_a_log_is_followed_over_connections_that_drop_and_the_exit_status_is_the_jobs(
    cluster: dict[str, str], count_job: Path, tmp_path: Path
) -> None:
    proxy = Proxy(int(cluster["RAY_API_SERVER_ADDRESS"].rpartition(":")[2]))
    arguments = ["submit", str(count_job), "--no-preflight", "--address", f"http://127.0.0.1:{proxy.port}", "--"]
    arguments += ["--until", str(tmp_path / "enough"), "--status", "7"]

    def numbers(text: str) -> list[int]:
        return [int(number) for number in re.findall(r"number (\d+) é\n", text)]

    with contextlib.closing(proxy), Started(cluster, *arguments) as following:

        def read_what_comes_now() -> None:
            """Read until a number has come that the job had not written yet."""
            written = len(numbers(client(cluster).get_job_logs(job)))
            following.read(lambda text: len(numbers(text)) > written)

        following.read(lambda text: 20 in numbers(text))
        [job] = re.findall(r"Submitted: (raysubmit_\w+)", following.text)
        proxy.cut(down=False)
        read_what_comes_now()
        proxy.cut(down=True)
        assert proxy.num_cut >= 2
        following.read(lambda text: "the job goes on, trying again" in text)
        deadline = time.monotonic() + 60
        while proxy.num_refused < 2:
            assert time.monotonic() < deadline, following.text
            time.sleep(0.05)
        proxy.cut(down=False)
        following.read(lambda text: "connected again" in text)
        read_what_comes_now()
        (tmp_path / "enough").touch()
        assert following.status() == 7, following.text
    found = numbers(following.text)
    assert found == list(range(len(found)))
    assert found == numbers(client(cluster).get_job_logs(job))


def test_ctrl_c_asks_and_a_stopped_job_has_time_to_save_and_does_not_count_as_done(
    cluster: dict[str, str], count_job: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "saved"
    arguments = ["submit", str(count_job), "--no-preflight", "--", "--saved", str(saved)]
    with Started(cluster, *arguments, terminal=True) as following:
        following.read(lambda text: "number 3 " in text)
        following.process.send_signal(signal.SIGINT)
        following.read(lambda text: "Stop it? [y/N]" in text)
        following.type("y\n")
        assert following.status() == 143, following.text
    assert re.search(r"raysubmit_\w+ was stopped", following.text)
    assert saved.read_text() == "saved"


def test_ctrl_c_leaves_the_job_where_nobody_can_answer(cluster: dict[str, str], count_job: Path) -> None:
    with Started(cluster, "submit", str(count_job), "--no-preflight") as following:
        following.read(lambda text: "number 3 " in text)
        before = len(following.text)
        following.process.send_signal(signal.SIGINT)
        assert following.status() == 130, following.text
    [job] = re.findall(r"Stop: +ray job stop --address \S+ (raysubmit_\w+)", following.text[before:])
    assert client(cluster).get_job_status(job) == "RUNNING"
    client(cluster).stop_job(job)
