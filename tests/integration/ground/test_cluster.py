"""The cluster that a command starts for itself, seen by other users of the machine and by other machines."""

import json
import os
import re
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from ray.core.generated import gcs_service_pb2

from bit_ray.cluster import session
from bit_ray.errors import ConfigError

pytestmark = pytest.mark.cluster

START = """
import json, os, sys
import psutil
import ray
from bit_ray.cluster.session import cluster

os.umask(0o022)

@ray.remote
def address():
    return ray.util.get_node_ip_address()

with cluster() as resources:
    found = {"local": resources.local, "task": ray.get(address.remote()), "mode": os.environ["RAY_AUTH_MODE"]}
    mine = [psutil.Process(), *psutil.Process().children(recursive=True)]
    sockets = [socket for process in mine for socket in process.net_connections("tcp") if socket.status == "LISTEN"]
    found["listening"] = sorted({socket.laddr.ip for socket in sockets})
    found["num_listening"] = len(sockets)
    found["commands"] = [" ".join(process.cmdline()) for process in mine]
    found["gcs"] = ray.get_runtime_context().gcs_address
    found["folder"] = ray._private.worker._global_node.get_session_dir_path()
    print(json.dumps(found), flush=True)
    sys.stdin.read()
print(json.dumps(os.environ["RAY_AUTH_MODE"]), flush=True)
"""


@dataclass
class Started:
    """A cluster in another process."""

    found: dict[str, Any]
    home: Path
    process: subprocess.Popen[str]


@pytest.fixture(scope="module")
def started() -> Iterator[Started]:
    """One start, by a user who has no token yet and whose environment turns authentication off."""
    with tempfile.TemporaryDirectory(dir="/tmp") as home:  # a short path: sockets lie in it
        environment = {**os.environ, "HOME": home, "TMPDIR": home, "RAY_AUTH_MODE": "disabled"}
        for name in ("RAY_ADDRESS", "RAY_TMPDIR", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
            environment.pop(name, None)
        with subprocess.Popen(
            [sys.executable, "-c", START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                yield Started(json.loads(process.stdout.readline()), Path(home), process)
                process.stdin.close()
                # The environment is again as it was.
                assert json.loads(process.stdout.readline()) == "disabled"
                assert process.wait(60) == 0
            finally:
                process.kill()


def rights(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def ask(address: str, token: str | None) -> grpc.StatusCode:
    """Ask a cluster for its jobs, as a program of anybody may."""
    method = "/ray.rpc.JobInfoGcsService/GetAllJobInfo"
    metadata = [("authorization", f"Bearer {token}")] if token is not None else []
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        call = channel.unary_unary(
            method,
            request_serializer=gcs_service_pb2.GetAllJobInfoRequest.SerializeToString,
            response_deserializer=gcs_service_pb2.GetAllJobInfoReply.FromString,
        )
        try:
            reply = call(gcs_service_pb2.GetAllJobInfoRequest(), metadata=metadata, timeout=30)
        except grpc.RpcError as error:
            return error.code()
    assert len(reply.job_info_list) == 1
    return grpc.StatusCode.OK


def test_nobody_else_can_read_the_token(started: Started) -> None:
    token = started.home / ".ray" / "auth_token"
    assert rights(token) == 0o600
    assert rights(token.parent) == 0o700
    assert len(token.read_text()) == 64
    assert [path.name for path in token.parent.iterdir()] == ["auth_token"]


def test_the_cluster_wants_the_token_though_the_environment_turns_it_off(started: Started) -> None:
    token = (started.home / ".ray" / "auth_token").read_text()
    assert started.found["mode"] == "token"
    assert ask(started.found["gcs"], None) is grpc.StatusCode.UNAUTHENTICATED
    assert ask(started.found["gcs"], "0" * 64) is grpc.StatusCode.UNAUTHENTICATED
    assert ask(started.found["gcs"], token) is grpc.StatusCode.OK


def test_the_cluster_listens_on_loopback_only(started: Started) -> None:
    assert started.found["num_listening"] >= 8
    assert started.found["listening"] == ["127.0.0.1", "::ffff:127.0.0.1"]
    assert started.found["task"] == "127.0.0.1"
    assert started.found["local"] is True


def test_the_cluster_starts_no_process_for_watchers(started: Started) -> None:
    commands = started.found["commands"]
    assert any("gcs_server" in command for command in commands)
    assert not [command for command in commands if re.search(r"dashboard\.py|monitor\.py", command)]


def test_nobody_else_can_enter_the_folder_of_sockets_and_logs(started: Started) -> None:
    folder = Path(started.found["folder"])
    private = started.home / f"bit_ray-{os.getuid()}"
    assert private in folder.parents
    assert rights(private) == 0o700


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_a_token_that_everyone_can_read_is_kept_and_hidden(home: Path) -> None:
    token = home / ".ray" / "auth_token"
    token.parent.mkdir(mode=0o755)
    token.parent.chmod(0o775)
    token.write_text("a" * 64)
    token.chmod(0o644)
    session._make_token()
    assert token.read_text() == "a" * 64
    assert rights(token) == 0o600
    assert rights(token.parent) == 0o755  # nobody else may put another there


def test_an_empty_token_is_made_anew_for_this_user_alone(home: Path) -> None:
    token = home / ".ray" / "auth_token"
    token.parent.mkdir()
    token.touch(0o666)
    session._make_token()
    assert len(token.read_text()) == 64
    assert rights(token) == 0o600


def test_a_token_that_is_named_is_used_and_its_folder_left_alone(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "shared").mkdir()
    (home / "shared").chmod(0o777)
    token = home / "shared" / "token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    with pytest.raises(
        ConfigError, match=rf"^RAY_AUTH_TOKEN_PATH: {token} cannot be used \(No such file or directory\)"
    ):
        session._make_token()
    token.touch()
    with pytest.raises(ConfigError, match=rf"^RAY_AUTH_TOKEN_PATH: {token} is empty"):
        session._make_token()
    token.write_text("a" * 64)
    token.chmod(0o644)
    session._make_token()
    assert rights(token) == 0o600
    assert rights(token.parent) == 0o777
    assert not (home / ".ray").exists()


def test_a_folder_that_is_not_this_users_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        monkeypatch.setenv("RAY_TMPDIR", short)
        private = Path(short, f"bit_ray-{os.getuid()}")
        private.symlink_to(tmp_path)
        with pytest.raises(
            ConfigError, match=rf"^RAY_TMPDIR: {private} cannot be used \(.+\); accepted: a folder with a"
        ):
            session._private_folder()
        private.unlink()
        assert session._private_folder() == str(private / "ray")
        private.chmod(0o777)
        session._private_folder()
        assert rights(private) == 0o700


def test_sockets_lie_where_their_paths_are_short_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        monkeypatch.setenv("RAY_TMPDIR", f"{short}/{'long' * 10}")
        monkeypatch.setenv("TMPDIR", short)
        assert session._private_folder() == f"{short}/bit_ray-{os.getuid()}/ray"


def test_a_start_that_times_out_on_a_busy_machine_is_one_line(monkeypatch) -> None:
    def too_late(**settings: Any) -> None:
        raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(session.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(session.ray, "init", too_late)
    with pytest.raises(ConfigError, match=r"^Ray did not start in time: this machine is too busy; "), session.cluster():
        pass
