"""A real MLflow server in its own processes, on a free loopback port, with a SQLite backend and proxied artifacts."""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def kill_ray_processes(running: str, at_most: int | None = None) -> list[int]:
    """Kill processes of this process's Ray that run what is named; return their ids."""
    killed: list[int] = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # ended meanwhile, or a zombie of another test
            # Ray names its processes after what they run.
            if running in " ".join(process.cmdline()) and len(killed) != at_most:
                process.kill()
                killed.append(process.pid)
    return killed


AUTHENTICATION = """[mlflow]
default_permission = READ
database_uri = sqlite:///basic_auth.db
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
grant_default_workspace_access = false
auth_cache_ttl_seconds = 60
"""


class MlflowServer:
    """One server that can be killed and started again on the same port and data.

    With an ``admin_password`` it wants to know who asks, and knows the user ``admin``.
    """

    def __init__(
        self,
        directory: Path,
        admin_password: str = "",
        host: str = "127.0.0.1",
        enter: Callable[..., list[str]] | None = None,
    ):
        """Nothing is started yet; ``enter`` gives the command that carries out another one where ``host`` is."""
        self.directory, self._host, self._enter = directory, host, enter
        self._admin_password = admin_password
        self.artifacts = directory / "artifacts"
        self.port = free_port()
        self.uri = f"http://{host}:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, timeout: float = 90.0) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "mlflow", "server", "--host", self._host, "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.directory}/server.db", "--workers", "1"]
        command += ["--artifacts-destination", str(self.artifacts)]
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        environment.pop("MLFLOW_TRACKING_URI", None)
        if self._admin_password:
            command += ["--app-name", "basic-auth"]
            # As of MLflow's own file, but a password is hashed once in a while and not for every request.
            (self.directory / "auth.ini").write_text(AUTHENTICATION)
            environment["MLFLOW_AUTH_CONFIG_PATH"] = str(self.directory / "auth.ini")
            environment["MLFLOW_AUTH_ADMIN_PASSWORD"] = self._admin_password
            environment["MLFLOW_FLASK_SERVER_SECRET_KEY"] = secrets.token_hex()
        with open(self.directory / "server.log", "ab") as log:
            self._process = subprocess.Popen(
                self._enter(*command) if self._enter else command,
                stdout=log,
                stderr=log,
                env=environment,
                cwd=self.directory,
                start_new_session=True,
            )
        deadline = time.monotonic() + timeout
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=2).close()
                return
            except (urllib.error.URLError, OSError):
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self.kill()
                    raise RuntimeError((self.directory / "server.log").read_text()[-3000:]) from None
                time.sleep(0.1)

    def kill(self) -> None:
        """End the server and its workers at once."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # the group that it leads, started above
            self._process.wait()
            self._process = None


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """One server for all tests that only read and write; a test that kills a server starts its own."""
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.kill()
