"""Passwords and keys stay where they are: five kinds are planted, and all that comes out is searched for them."""

import base64
import http.client
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient
from s3_server import Bucket
from servers import MlflowServer

from bit_ray.cli.training import exit_status, finetune
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.embedded.glyphs import GlyphSource
from bit_ray.errors import DataError, TrackingError
from bit_ray.tracking.address import tracking_uri
from bit_ray.tracking.config import TrackingConfig
from bit_ray.training.config import FinetuneConfig

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[3]
PASSWORD = "PLANTED-mlflow-password"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "PLANTED-aws-key",
    "AWS_SECRET_ACCESS_KEY": "PLANTED-aws-secret",
    "AWS_SESSION_TOKEN": "PLANTED-aws-token",
    "HF_TOKEN": "PLANTED-hugging-face-token",
}
BASIC = base64.b64encode(f"alice:{PASSWORD}".encode())
PLANTED = (b"PLANTED", BASIC.rstrip(b"=")[:-1])
"""What no file may hold: the mark of every secret, and the password as HTTP sends it."""
SMALL = [
    *("--model", "R1-1-1-1x0.5", "--recipe.epochs", "1", "--recipe.decay-epochs", "0.5", "--recipe.warmup-steps", "2"),
    *("--recipe.global-batch-size", "30", "--recipe.crop-size", "32", "--runtime.num-workers", "1"),
]


class Guard(http.server.BaseHTTPRequestHandler):
    """Lets the requests of one user through to the MLflow server behind it."""

    protocol_version = "HTTP/1.1"
    behind: int
    num_let_through = 0

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.headers.get("authorization") != f"Basic {BASIC.decode()}":
            self.answer(401, [], b"who are you?")
            return
        type(self).num_let_through += 1
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "connection", "authorization")}
        behind = http.client.HTTPConnection("127.0.0.1", self.behind, timeout=60)
        behind.request(self.command, self.path, body, {**headers, "Host": f"127.0.0.1:{self.behind}"})
        reply = behind.getresponse()
        content = reply.read()
        dropped = ("content-length", "transfer-encoding", "connection", "date", "server")
        self.answer(reply.status, [(k, v) for k, v in reply.getheaders() if k.lower() not in dropped], content)
        behind.close()

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any

    def answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def guarded(mlflow_server: MlflowServer) -> Iterator[str]:
    """Host and port of the MLflow server behind a password."""
    handler = type("Handler", (Guard,), {"behind": mlflow_server.port})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{web.server_port}"
        web.shutdown()
    assert handler.num_let_through > 10


@dataclass
class Done:
    """A run in processes of its own."""

    status: int
    out: bytes
    err: bytes
    folder: Path
    ray: Path


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shards = tmp_path_factory.mktemp("glyphs") / "shards"
    write_shards(GlyphSource("s", examples_per_class=3), shards, name="glyphs", row_group_size=8)
    return shards


@pytest.fixture(scope="module")
def done(shards: Path, guarded: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    """A pre-training by the command line, with a Ray of its own, that had all the secrets in its hands."""
    folder = tmp_path_factory.mktemp("secrets")
    ray = Path(tempfile.mkdtemp(prefix="bit-ray-"))  # a short path: Ray's sockets lie in it
    command = [sys.executable, str(ROOT / "jobs" / "pretrain.py"), "--name", "secret", "--shards", str(shards), *SMALL]
    command += ["--storage", str(folder / "runs"), "--tracking.uri", f"http://alice:{PASSWORD}@{guarded}"]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT), "HOME": str(folder), "RAY_TMPDIR": str(ray)}
    process = subprocess.run(command, env=environment, cwd=folder, capture_output=True, timeout=400, check=False)
    yield Done(process.returncode, process.stdout, process.stderr, folder, ray)
    shutil.rmtree(ray)


def search(*folders: Path) -> tuple[set[str], list[Path]]:
    """The names of all files below some folders, and those of them that hold a secret."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return {path.name for path in files}, [path for path in files if any(mark in path.read_bytes() for mark in PLANTED)]


def test_the_search_finds_what_is_planted(tmp_path: Path) -> None:
    for number, text in enumerate(
        (PASSWORD, *ENVIRONMENT.values(), base64.b64encode(b"alice:" + PASSWORD.encode()).decode())
    ):
        (tmp_path / f"{number}.bin").write_bytes(b"\xff\x00" + text.encode() + b"\x00")
    (tmp_path / "innocent.txt").write_text("planted")
    names, guilty = search(tmp_path)
    assert len(names) == len(guilty) + 1 == 7


def test_a_run_leaves_its_secrets_in_no_file_and_on_no_screen(done: Done, mlflow_server: MlflowServer) -> None:
    assert done.status == 0, done.err
    assert not any(mark in done.out + done.err for mark in PLANTED)
    names, guilty = search(done.folder, done.ray, mlflow_server.directory)
    expected = {
        "plan.json",
        "result.json",
        "model.json",
        "README.md",
        "config.json",
        "reference.json",
        "MLmodel",
        "server.db",
    }
    assert expected <= names
    assert len([name for name in names if name.endswith((".log", ".out", ".err"))]) > 10  # Ray's
    assert guilty == []


def test_the_run_is_recorded_with_its_tracking_uri_masked(
    done: Done, guarded: str, mlflow_server: MlflowServer
) -> None:
    client = MlflowClient(tracking_uri=mlflow_server.uri)
    run_id = json.loads((done.folder / "runs" / "secret" / "result.json").read_text())["run_id"]
    assert client.get_run(run_id).data.params["tracking.uri"] == f"http://***@{guarded}"
    [config] = mlflow_server.artifacts.rglob(f"{run_id}/artifacts/config.json")
    recorded = json.loads(config.read_text())["tracking"]["uri"]
    with pytest.raises(TrackingError, match="has no user and password; .*set MLFLOW_TRACKING_USERNAME"):
        tracking_uri(recorded)


KEYS = "s3://PLANTED-KEY:PLANTED/SECRET@bucket/x"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"shards": KEYS},
            r"s3://\*\*\*@bucket/x/manifest.json: a key or a password in a URI, .* set AWS_ACCESS_KEY_ID",
        ),
        ({"storage": KEYS}, r"s3://\*\*\*@bucket/x: a key or a password in a URI"),
        ({"init": KEYS, "model": ""}, r"s3://\*\*\*@bucket/x/model.json: a key or a password in a URI"),
        ({"tracking": "http://alice:PLANTED@GUARDED"}, r"tracking.uri: http://\*\*\*@.*: access refused \(HTTP 401\)"),
        ({"shards": "s3://bucket/set"}, r"AWS_ENDPOINT_URL: \*\*\*@127.0.0.1:9: a user in it; accepted: http"),
    ],
    ids=["keys in shards", "keys in storage", "keys in init", "wrong password", "password in endpoint"],
)
def test_what_goes_wrong_is_told_in_one_line_without_a_secret(
    settings: dict[str, str],
    message: str,
    shards: Path,
    guarded: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": "http://me:PLANTED@127.0.0.1:9"}.items():
        monkeypatch.setenv(name, value)
    given = {
        "shards": str(shards),
        "storage": str(tmp_path / "runs"),
        "model": "R1-1-1-1x0.5",
        "tracking": "",
        **settings,
    }
    tracking = TrackingConfig(uri=given.pop("tracking").replace("GUARDED", guarded))
    config = FinetuneConfig(name="a", tracking=tracking, **given)
    assert exit_status(lambda: finetune(config)) == 2
    out, err = capfd.readouterr()
    assert re.fullmatch(f"error: {message}.*\n", err)
    assert "PLANTED" not in out + err + caplog.text
    assert search(tmp_path)[1] == []


def test_keys_that_a_store_refuses_are_not_shown(s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DataError, match="refused by http://127.0.0.1:.*; check AWS_ACCESS_KEY_ID") as error:
        read_manifest(s3.uri("set"))
    assert "PLANTED" not in "".join(traceback.format_exception(error.value))
