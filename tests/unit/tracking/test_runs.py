import http.server
import json
import math
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import get_args

import pytest
from mlflow import MlflowClient

from bit_ray.errors import ConfigError, DataError, TrackingError
from bit_ray.tracking import server
from bit_ray.tracking.address import tracking_uri
from bit_ray.tracking.config import TrackingConfig
from bit_ray.tracking.recorded import attach, recorded_metrics, recorded_run, run_page
from bit_ray.tracking.runs import Input, RunKind, TrackedRun, flatten
from bit_ray.tracking.spool import Spool
from bit_ray.tracking.system import system_metrics


@pytest.fixture(autouse=True)
def no_tracking_uri(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run storage folder; the embedded store takes two seconds to be made, so one is shared."""
    return str(tmp_path_factory.mktemp("bit_ray_runs"))


def open_run(storage: str, name: str, **kwargs) -> TrackedRun:
    settings = {"params": {}, "tags": {}, "kind": "pretrain", **kwargs}
    return TrackedRun.open(TrackingConfig(), run_name=name, storage=storage, **settings)


def history(run: TrackedRun, name: str) -> list[tuple[int, float]]:
    client = MlflowClient(tracking_uri=run.tracking_uri)
    return [(metric.step, metric.value) for metric in client.get_metric_history(run.run_id, name)]


def test_a_run_names_its_sets_and_what_its_settings_came_to(storage: str):
    inputs = [
        Input("training", "photos", "ab" * 32, "s3://AK:PLANTED@bucket/photos"),
        Input("test", "more", "cd" * 32, "/m"),
    ]
    for _ in range(2):  # started again it says the same
        run = open_run(storage, "inputs", params={"rule": {"crop": None}}, inputs=inputs, resolved={"crop": 128})
        assert run.close() == 0
    recorded = MlflowClient(tracking_uri=run.tracking_uri).get_run(run.run_id)
    found = {each.dataset.name: (each.dataset.digest, each.tags[0].value) for each in recorded.inputs.dataset_inputs}
    assert found == {"photos": ("ab" * 8, "training"), "more": ("cd" * 8, "test")}
    assert "PLANTED" not in str(recorded.inputs)
    assert recorded.data.params == {"rule.crop": "None", "resolved.crop": "128"}
    config = Path(storage, "mlruns", "bit_ray", run.run_id, "artifacts", "config.json")
    assert json.loads(config.read_text()) == {"rule": {"crop": None}}
    page = run_page(run.tracking_uri, run.run_id)
    assert page.url.endswith(f"/runs/{run.run_id}")
    assert page.command == f"mlflow ui --backend-store-uri {run.tracking_uri}"
    assert Path(page.artifacts) == config.parent


def test_what_is_recorded_of_a_run_is_read_again_with_the_curves_of_the_run_below(storage: str):
    run = open_run(storage, "above", params={"seed": 1}, inputs=[Input("test", "more", "cd" * 32, "/m")])
    below = open_run(storage, "below", parent_run_id=run.run_id)
    for step, loss in ((0, 2.0), (10, 1.0)):
        below.log_metrics({"train/loss": loss}, step=step)
    run.log_metrics({"val/ece": 0.1}, step=0)
    assert below.close() == run.close() == 0
    found = recorded_run(run.tracking_uri, run.run_id, ("train/loss", "train/lr"))
    assert (found.params, found.metrics, found.sets) == ({"seed": "1"}, {"val/ece": 0.1}, {"test": "/m"})
    assert found.curves == {"train/loss": ((0, 2.0), (10, 1.0))}
    attach(run.tracking_uri, run.run_id, b"<p>", "report.html")
    assert Path(storage, "mlruns", "bit_ray", run.run_id, "artifacts", "report.html").read_bytes() == b"<p>"
    for call in (
        lambda: recorded_run(run.tracking_uri, "0" * 32),
        lambda: attach(run.tracking_uri, "0" * 32, b"", "a"),
    ):
        with pytest.raises(TrackingError, match="cannot be re"):
            call()


def test_the_embedded_store_keeps_a_run_whole(storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    params = {"model": {"name": "R50x1", "units": (3, 4, 6, 3)}, "lr": 0.03}
    run = open_run(storage, "whole", params=params, tags={"bit_ray.manifest_digest": "ab12"}, parent_run_id="p0")
    run.log_metrics({"train/loss": 2.5, "train/top-1 (%)": 10.0}, step=0)
    run.log_metrics({"train/loss": math.nan}, step=1)
    run.log_text("a,b\n", "reports/confusion.csv")
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "few.json").write_text("[1]")
    run.log_artifact(tmp_path / "index", "subsets")
    assert run.close() == 0

    client = MlflowClient(tracking_uri=f"sqlite:///{storage}/mlflow.db")
    recorded = client.get_run(run.run_id)
    assert recorded.info.status == "FINISHED"
    assert recorded.data.params == {"model.name": "R50x1", "model.units": "[3, 4, 6, 3]", "lr": "0.03"}
    assert recorded.data.tags["bit_ray.manifest_digest"] == "ab12"
    assert recorded.data.tags["mlflow.parentRunId"] == "p0"
    assert recorded.data.tags["bit_ray.code_revision"]
    assert history(run, "train/top-1 ___") == [(0, 10.0)]
    (first, loss), (second, nan) = history(run, "train/loss")
    assert (first, loss, second) == (0, 2.5, 1)
    assert math.isnan(nan)
    artifacts = Path(storage, "mlruns", "bit_ray", run.run_id, "artifacts")
    assert json.loads((artifacts / "config.json").read_text())["model"]["units"] == [3, 4, 6, 3]
    assert (artifacts / "reports" / "confusion.csv").read_text() == "a,b\n"
    assert (artifacts / "subsets" / "index" / "few.json").read_text() == "[1]"
    assert not Path(storage, "spool", run.run_id).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["index"]  # nothing strays into the current directory


def test_the_same_name_continues_the_run_and_repeats_no_step(storage: str):
    first = open_run(storage, "continued", params={"lr": 0.1})
    for step in range(5):
        first.log_metrics({"loss": 10.0 - step}, step=step)
    assert first.close("FAILED") == 0
    second = open_run(storage, "continued", params={"lr": 0.1, "workers": 2})
    assert second.run_id == first.run_id
    for step in range(3, 8):  # back to the checkpoint of step 3
        second.log_metrics({"loss": 10.0 - step, "norm": 1.0}, step=step)
    assert second.close() == 0
    assert history(second, "loss") == [(step, 10.0 - step) for step in range(8)]
    assert [step for step, _ in history(second, "norm")] == [3, 4, 5, 6, 7]
    run = MlflowClient(tracking_uri=second.tracking_uri).get_run(second.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"lr": "0.1", "workers": "2"}


def test_the_metrics_that_a_pattern_names_whole_are_read_by_step(storage: str):
    run = open_run(storage, "read")
    for step in range(1, 4):
        run.log_metrics({"train/loss": 1.0 / step, "train/loss_of_another": 0.0, "probe/knn_5_shot": 0.1}, step=step)
    assert run.close() == 0
    found = recorded_metrics(TrackingConfig(), storage, "read", "pretrain", r"train/loss|probe/\w+|train/lr")
    assert found == {
        "probe/knn_5_shot": [(1, 0.1), (2, 0.1), (3, 0.1)],
        "train/loss": [(1, 1.0), (2, 1 / 2), (3, 1 / 3)],
    }
    with pytest.raises(TrackingError, match="^tracking.uri: sqlite:.* has no finetune 'read'; name the server that"):
        recorded_metrics(TrackingConfig(), storage, "read", "finetune", "train/loss")


def test_another_kind_of_the_same_name_is_another_run(storage: str):
    runs = [open_run(storage, "shared", kind=kind) for kind in ("pretrain", "finetune")]
    assert runs[0].run_id != runs[1].run_id
    assert [run.close() for run in runs] == [0, 0]


def test_what_a_killed_process_had_queued_is_sent_by_the_next_start(storage: str):
    code = f"""
import os, signal
from bit_ray.tracking import runs, sending
run = runs.TrackedRun.open(runs.TrackingConfig(), run_name="killed", storage={storage!r}, params={{}}, tags={{}},
                           kind="pretrain")
for step in range(300):
    run.log_metrics({{"loss": 1.0 / (step + 1)}}, step=step)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -9
    run = open_run(storage, "killed")
    run.log_metrics({"loss": 7.0}, step=299)  # repeated work
    run.log_metrics({"loss": 8.0}, step=300)
    assert run.close() == 0
    assert history(run, "loss") == [*((step, 1.0 / (step + 1)) for step in range(300)), (300, 8.0)]


def test_a_changed_param_keeps_its_first_value_and_is_told(storage: str, caplog: pytest.LogCaptureFixture):
    open_run(storage, "changed", params={"lr": 0.1}).close()
    run = open_run(storage, "changed", params={"lr": 0.2})
    run.close()
    assert "config.json has the new value: lr" in caplog.text
    artifacts = Path(storage, "mlruns", "bit_ray", run.run_id, "artifacts")
    assert json.loads((artifacts / "config.json").read_text()) == {"lr": 0.2}


def test_what_the_server_never_takes_is_put_aside(storage: str, caplog: pytest.LogCaptureFixture):
    run = open_run(storage, "deleted")
    MlflowClient(tracking_uri=run.tracking_uri).delete_run(run.run_id)
    run.log_metrics({"loss": 1.0}, step=0)
    assert run.close() == 0
    assert "refuses" in caplog.text
    refused = Path(storage, "spool", run.run_id, "refused.jsonl").read_text().splitlines()
    assert any(json.loads(line).get("metrics") == {"loss": 1.0} for line in refused)


def test_artifacts_that_cannot_be_stored_hold_up_no_metrics(storage: str, caplog: pytest.LogCaptureFixture):
    client = MlflowClient(tracking_uri=tracking_uri("", storage))
    open_run(storage, "first").close()  # makes the store
    client.create_experiment("read-only", artifact_location="file:///proc/nowhere")
    config = TrackingConfig(experiment="read-only")
    run = TrackedRun.open(config, run_name="a", storage=storage, params={"lr": 1}, tags={}, kind="pretrain")
    run.log_text("kept", "note.txt")
    run.log_metrics({"loss": 1.0}, step=0)
    assert run.close(timeout_s=1.5) == 2  # config.json and note.txt
    assert history(run, "loss") == [(0, 1.0)]
    assert client.get_run(run.run_id).info.status == "FINISHED"
    assert caplog.text.count("cannot be stored") == 1
    spool = Path(storage, "spool", run.run_id)
    assert sorted(path.name for path in spool.glob("files/*/*")) == ["config.json", "note.txt"]


def test_a_full_disk_is_told_once_and_ends_nothing(storage: str, caplog: pytest.LogCaptureFixture, monkeypatch):
    run = open_run(storage, "full")
    time.sleep(0.1)

    def refuse(self, operation):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Spool, "append", refuse)
        run.log_metrics({"loss": 1.0}, step=0)
        run.log_metrics({"loss": 1.0}, step=1)
    run.log_metrics({"loss": 1.0}, step=2)
    run.close()
    assert caplog.text.count("No space left") == 1
    assert [step for step, _ in history(run, "loss")] == [2]


def test_a_server_that_is_not_there_is_told_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        uri = f"http://user:secret@127.0.0.1:{listener.getsockname()[1]}"  # bound, but nobody listens
        begin = time.monotonic()
        with pytest.raises(TrackingError) as error:
            open_at(uri, tmp_path)
    assert time.monotonic() - begin < 3
    assert re.fullmatch(
        r"tracking\.uri: http://\*\*\*@127\.0\.0\.1:\d+: cannot be reached \(connection refused\); .+", str(error.value)
    )
    assert not list(tmp_path.iterdir())


def test_a_server_that_never_answers_is_given_up_after_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert server.PROBE_SECONDS <= 5
    monkeypatch.setattr(server, "PROBE_SECONDS", 1.0)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        begin = time.monotonic()
        with pytest.raises(TrackingError, match="cannot be reached .no answer within 1 s"):
            open_at(f"http://127.0.0.1:{listener.getsockname()[1]}", tmp_path)
        assert time.monotonic() - begin < 3


def test_a_web_server_that_is_not_mlflow_is_told(tmp_path: Path):
    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(401 if "private" in self.path else 200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{web.server_port}"
        with pytest.raises(TrackingError, match="not the answer of an MLflow server .HTTP 200, text/html"):
            open_at(uri, tmp_path)
        with pytest.raises(TrackingError, match="refused .HTTP 401.; set MLFLOW_TRACKING_USERNAME"):
            open_at(f"{uri}/private", tmp_path)
        web.shutdown()


def test_no_password_of_a_uri_is_recorded(storage: str):
    told = "postgresql://me:PLANTED/half@host/db"
    params = {"tracking": {"uri": told}, "shards": [told], "init": "models:/up@champion"}
    run = open_run(storage, "secret", params=params, tags={"bit_ray.parent": told})
    run.set_tags({"bit_ray.weights_uri": told})
    assert run.close() == 0
    recorded = MlflowClient(tracking_uri=run.tracking_uri).get_run(run.run_id).data
    assert recorded.params["tracking.uri"] == "postgresql://***@host/db"
    assert recorded.params["init"] == "models:/up@champion"
    assert {recorded.tags[f"bit_ray.{name}"] for name in ("parent", "weights_uri")} == {"postgresql://***@host/db"}
    written = [path for path in Path(storage).rglob("*") if path.is_file()]
    assert {"config.json", "mlflow.db"} <= {path.name for path in written}
    assert [path for path in written if b"PLANTED" in path.read_bytes() or b"half@" in path.read_bytes()] == []


def test_a_storage_with_keys_in_it_is_refused_before_the_server_is_asked():
    with pytest.raises(DataError, match=r"^s3://\*\*\*@bucket/runs: a key or a password in a URI"):
        open_at("http://127.0.0.1:1", "s3://AK:SECRET@bucket/runs")


@pytest.mark.parametrize(
    ("uri", "storage", "message"),
    [
        ("http://***@host:5000", "runs", r"tracking.uri: http://\*\*\*@host:5000 has no user and password"),
        (
            "postgresql://me:se/cret@127.0.0.1/db",
            "runs",
            r"tracking.uri: postgresql://\*\*\*@127.0.0.1/db is not a URI",
        ),
        ("http://me:se/cret@127.0.0.1", "runs", r"tracking.uri: http://\*\*\*@127.0.0.1 is not a URI.*%2F"),
        ("http://[me:secret@host", "runs", r"tracking.uri: http://\*\*\*@host is not a URI"),
        ("ftp://me:secret word@host", "runs", r"tracking.uri: ftp://\*\*\*@host; accepted: http"),
        (
            "",
            "s3://bucket/runs",
            "tracking.uri: empty, .*, not s3://bucket/runs.*set it, or MLFLOW_TRACKING_URI",
        ),
        ("./mlruns", "runs", "tracking.uri: ./mlruns; accepted: http"),
        ("sqlite:////proc/nowhere/mlflow.db", "runs", "cannot be reached|cannot be used"),
        (
            "postgresql://me:secret@127.0.0.1:1/db",
            "runs",
            r"tracking.uri: postgresql://\*\*\*@127.0.0.1:1/db: cannot be reached",
        ),
    ],
)
def test_a_tracking_uri_that_cannot_work_is_refused_in_one_line(uri: str, storage: str, message: str):
    with pytest.raises(TrackingError, match=message) as error:
        open_at(uri, storage)
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)
    assert "cret" not in str(error.value)


def test_a_run_name_with_quotes_and_an_empty_experiment_are_refused(tmp_path: Path):
    with pytest.raises(TrackingError, match="name: 'a\"b'"):
        open_run(str(tmp_path), 'a"b')
    with pytest.raises(ConfigError, match="experiment: empty"):
        TrackingConfig(experiment=" ")


def test_a_deleted_experiment_is_told(storage: str):
    run = TrackedRun.open(
        TrackingConfig(experiment="gone"), run_name="a", storage=storage, params={}, tags={}, kind="evaluate"
    )
    run.close()
    MlflowClient(tracking_uri=run.tracking_uri).delete_experiment(run.experiment_id)
    with pytest.raises(TrackingError, match="tracking.experiment: 'gone' was deleted .*mlflow experiments restore"):
        TrackedRun.open(
            TrackingConfig(experiment="gone"), run_name="a", storage=storage, params={}, tags={}, kind="evaluate"
        )


def test_sqlite_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert tracking_uri("sqlite:///a.db") == f"sqlite:///{tmp_path}/a.db"
    assert tracking_uri("", "runs") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://example.org/mlflow/")
    assert tracking_uri("", "s3://bucket/runs") == "https://example.org/mlflow"


def test_nested_params_get_dotted_names():
    assert flatten({"a": {"b": {"c": 1}, "d": None}, "e": (1, 2), "f": {}, "g=h": True}) == {
        "a.b.c": "1",
        "a.d": "None",
        "e": "[1, 2]",
        "f": "{}",
        "g_h": "True",
    }


def test_system_metrics_are_plausible(tmp_path: Path):
    metrics = system_metrics(str(tmp_path))
    assert set(metrics) >= {
        f"system/{name}" for name in ("cpu_percent", "memory_used_gb", "process_memory_gb", "disk_free_gb")
    }
    assert 0 < metrics["system/process_memory_gb"] < metrics["system/memory_used_gb"]
    assert all(math.isfinite(value) and value >= 0 for value in metrics.values())


def test_importing_the_trackers_switches_usage_reports_off(tmp_path: Path):
    code = "import bit_ray.tracking.runs, bit_ray.tracking.registry\n"
    code += "from mlflow.telemetry import get_telemetry_client\nprint(get_telemetry_client())"
    # Without the variables by which MLflow recognises a test run, where it reports nothing anyway.
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "None"


def open_at(uri: str, storage: str | Path) -> TrackedRun:
    config = TrackingConfig(uri=uri)
    return TrackedRun.open(config, run_name="a", storage=str(storage), params={}, tags={}, kind="pretrain")


def test_commands_of_one_name_never_share_a_run(tmp_path: Path):
    settings = {"run_name": "digits", "storage": str(tmp_path), "params": {}, "tags": {}}
    ids = []
    for kind in (*get_args(RunKind), "fewshot"):
        run = TrackedRun.open(TrackingConfig(), **settings, kind=kind)
        ids.append(run.run_id)
        run.close()
    assert len(set(ids)) == len(get_args(RunKind))
    assert ids[-1] == ids[get_args(RunKind).index("fewshot")]


@pytest.mark.parametrize(
    ("raised", "status"),
    [(None, "FINISHED"), (ValueError, "FAILED"), (SystemExit, "FAILED"), (KeyboardInterrupt, "KILLED")],
)
def test_a_run_ends_with_its_block_by_what_was_raised(storage: str, raised: type[BaseException] | None, status: str):
    with suppress(raised or ()), open_run(storage, "ended") as run:
        run.log_metrics({"loss": 1.0}, step=1)
        if raised is not None:
            raise raised
    recorded = MlflowClient(tracking_uri=run.tracking_uri).get_run(run.run_id)
    assert recorded.info.status == status
    assert recorded.data.metrics == {"loss": 1.0}


def test_a_child_is_a_finished_run_below_and_is_recorded_once(storage: str):
    for value in (0.5, 0.5):  # sent twice, as after a process was killed between sending and forgetting
        with open_run(storage, "study") as run:
            run.log_child("svhn", params={"rule": {"steps": 3}}, metrics={"top_1": value})
    client = MlflowClient(tracking_uri=run.tracking_uri)
    [child] = client.search_runs([run.experiment_id], f'tags.`mlflow.parentRunId` = "{run.run_id}"')
    assert (child.info.run_name, child.info.status) == ("svhn", "FINISHED")
    assert (child.data.params, child.data.metrics) == ({"rule.steps": "3"}, {"top_1": 0.5})
    parent = client.get_run(run.run_id)
    assert (parent.info.status, parent.data.metrics) == ("FINISHED", {})
