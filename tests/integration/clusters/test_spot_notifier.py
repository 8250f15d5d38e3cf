"""The notice of a spot machine's end: from a server that speaks as the clouds' metadata services to a real Ray node."""

import http.server
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from s3_server import free_ports

pytestmark = pytest.mark.cluster

CLUSTERS = Path(__file__).resolve().parents[3] / "clusters"
SCRIPT = CLUSTERS / "spot_notifier.py"


class Metadata(http.server.ThreadingHTTPServer):
    """Answers as AWS's service (IMDSv2 only) and as Google's; `aws` and `gcp` are what they say."""

    aws: bytes | None = None
    gcp = "FALSE"
    num_asked = 0
    fails = False


class Handler(http.server.BaseHTTPRequestHandler):
    server: Metadata

    def do_PUT(self) -> None:
        wanted = self.path == "/latest/api/token" and self.headers.get("X-aws-ec2-metadata-token-ttl-seconds")
        self.answer(200 if wanted else 400, b"a-token")

    def do_GET(self) -> None:
        self.server.num_asked += 1
        if self.server.fails:
            self.answer(503, b"")
        elif self.path == "/latest/meta-data/spot/instance-action":
            if self.headers.get("X-aws-ec2-metadata-token") != "a-token":
                self.answer(401, b"")
            else:
                self.answer(404 if self.server.aws is None else 200, self.server.aws or b"")
        elif self.path == "/computeMetadata/v1/instance/preempted":
            self.answer(200 if self.headers.get("Metadata-Flavor") == "Google" else 403, self.server.gcp.encode())
        else:
            self.answer(404, b"")

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    with Metadata(("127.0.0.1", 0), Handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield web
        web.shutdown()


@pytest.fixture(scope="module")
def notifier() -> ModuleType:
    spec = importlib.util.spec_from_file_location("spot_notifier", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def notice(seconds: float) -> bytes:
    end = datetime.now(UTC) + timedelta(seconds=seconds)
    return json.dumps({"action": "terminate", "time": end.strftime("%Y-%m-%dT%H:%M:%SZ")}).encode()


def test_a_notice_has_the_seconds_that_are_left(notifier: ModuleType, metadata: Metadata) -> None:
    address = f"http://127.0.0.1:{metadata.server_port}"
    assert notifier.seconds_left("aws", address) is None
    assert notifier.seconds_left("gcp", address) is None
    metadata.aws, metadata.gcp = notice(120), "TRUE"
    assert 110 < notifier.seconds_left("aws", address) <= 115
    assert notifier.seconds_left("gcp", address) == 25
    metadata.aws = notice(-60)
    assert notifier.seconds_left("aws", address) == 1


@pytest.fixture
def cluster() -> Iterator[dict[str, str]]:
    """A head and a second raylet, and the environment in which they are reached."""
    folder = Path(tempfile.mkdtemp(prefix="brs-"))  # short, as sockets lie in it
    port = free_ports(1)[0]
    environment = os.environ | {
        **{"CLUSTER_DIR": str(folder), "CLUSTER_PORT": str(port), "CLUSTER_CPUS": "1", "PYTHON": sys.executable},
        **{"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "auth_token")},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    script = str(CLUSTERS / "local.sh")
    try:
        subprocess.run([script, "up", "2"], env=environment, check=True, timeout=200)
        yield environment
    finally:
        subprocess.run([script, "down"], env=environment, check=True, timeout=60)
        shutil.rmtree(folder)


def nodes_of(environment: dict[str, str]) -> list[dict[str, Any]]:
    request = urllib.request.Request(f"http://127.0.0.1:{int(environment['CLUSTER_PORT']) + 1}/api/v0/nodes?detail=1")
    request.add_header("Authorization", f"Bearer {Path(environment['RAY_AUTH_TOKEN_PATH']).read_text().strip()}")
    with urllib.request.urlopen(request, timeout=20) as answer:
        return list(json.load(answer)["data"]["result"]["result"])


def test_a_node_whose_machine_gets_a_notice_drains(cluster: dict[str, str], metadata: Metadata) -> None:
    [worker] = [node for node in nodes_of(cluster) if not node["is_head_node"]]
    assert worker["state"] == "ALIVE"
    command = [sys.executable, str(SCRIPT), "aws", "--address", f"127.0.0.2:{cluster['CLUSTER_PORT']}"]
    command += ["--node-id", worker["node_id"], "--interval", "0.1"]
    command += ["--metadata", f"http://127.0.0.1:{metadata.server_port}"]
    metadata.fails = True
    # A proxy of the environment is not for the metadata service.
    environment = cluster | {"http_proxy": "http://127.0.0.1:9"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            deadline = time.monotonic() + 60
            while metadata.num_asked < 5:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            metadata.fails = False
            time.sleep(0.5)
            assert process.poll() is None  # no notice yet
            metadata.aws = notice(120)
            out, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0, out
    assert out.count("asking again") == 1  # not once for every question
    assert "the node drains" in out
    deadline = time.monotonic() + 60
    while (found := {node["node_id"]: node for node in nodes_of(cluster)}[worker["node_id"]])["state"] == "ALIVE":
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
    assert "spot notice" in found["state_message"], found  # nothing ran on it, so it left at once
    assert [node["state"] for node in nodes_of(cluster) if node["is_head_node"]] == ["ALIVE"]


def test_the_raylets_own_arguments_name_the_node(
    notifier: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for pid, arguments in (
        (1, ["/sbin/init"]),
        (7, ["/x/ray/core/src/ray/raylet/raylet", "--node_id=ab12", "--other"]),
    ):
        (tmp_path / f"proc/{pid}").mkdir(parents=True)
        (tmp_path / f"proc/{pid}/cmdline").write_text("\0".join(arguments))
    monkeypatch.setattr(notifier, "Path", lambda path: tmp_path / path.removeprefix("/"))
    assert notifier.own_node() == "ab12"
