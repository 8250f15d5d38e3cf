"""A cluster of `clusters/local.sh up --autoscaling`, and what its head says of it."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import psutil
from s3_server import free_ports

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "clusters" / "local.sh")
TYPES = ROOT / "clusters" / "local-autoscaling" / "cluster.yaml"


class LocalCluster:
    """What a user of the script has, and what the head says."""

    def __init__(self, types: Path) -> None:
        """Nothing is started.

        Args:
            types: File of the nodes that there may be.
        """
        self.folder = Path(tempfile.mkdtemp(prefix="bra-"))  # short, as sockets lie in it
        self.port = free_ports(1)[0]
        settings = {"CLUSTER_DIR": str(self.folder), "CLUSTER_PORT": str(self.port), "PYTHON": sys.executable}
        self.environment = {**os.environ, **settings, "CLUSTER_NODES": str(types), "CLUSTER_NOTICE_S": "20"}

    def run(self, *arguments: str, timeout: float = 60) -> str:
        """Call the script and return what it prints."""
        done = subprocess.run(
            [SCRIPT, *arguments], env=self.environment, check=True, capture_output=True, text=True, timeout=timeout
        )
        return done.stdout

    def up(self) -> None:
        """Start the head."""
        self.run("up", "--autoscaling", timeout=200)
        exports = (line.removeprefix("export ").partition("=") for line in self.run("env").splitlines())
        self.environment |= {name: value for name, _, value in exports}

    def change(self, old: str, new: str) -> None:
        """Change the file of the nodes that there may be, which the autoscaler reads each time that it looks."""
        types = self.folder / "cluster.yaml"
        assert old in types.read_text()
        types.with_suffix(".new").write_text(types.read_text().replace(old, new))
        types.with_suffix(".new").replace(types)

    def processes(self) -> list[psutil.Process]:
        """Return all of its processes."""
        nodes = [psutil.Process(int(file.read_text())) for file in self.folder.glob("node*.pid")]
        return nodes + [process for node in nodes for process in node.children(recursive=True)]

    def running(self, what: str) -> list[psutil.Process]:
        """Return those with this in their command."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):  # it has just ended
                if what in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def down(self) -> list[psutil.Process]:
        """End all of it, and return the processes that outlive it."""
        started = self.processes()
        self.run("down")
        _, left = psutil.wait_procs(started, timeout=5)
        shutil.rmtree(self.folder)
        assert len(started) > 5  # the head alone has as many
        return left

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Return the answer of the head's dashboard to a GET, or to a POST of a body."""
        token = (self.folder / "auth_token").read_text().strip()
        address = self.environment["RAY_API_SERVER_ADDRESS"]
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(address + path, data, headers), timeout=30) as answer:
            return json.load(answer)

    def members(self) -> list[dict[str, Any]]:
        """What the head knows of each node that it has or had."""
        return list(self.ask("/api/v0/nodes?detail=1")["data"]["result"]["result"])

    def member(self, name: str) -> dict[str, Any]:
        """What it knows of one of them."""
        return next(member for member in self.members() if member["node_ip"] == address(name))

    def nodes(self) -> set[str]:
        """Names of the nodes that are in the cluster, without the head."""
        alive = {member["node_ip"] for member in self.members() if member["state"] == "ALIVE"}
        return {name for name in self.started() if address(name) in alive}

    def started(self) -> set[str]:
        """Names of the nodes whose processes run."""
        return {file.stem for file in self.folder.glob("node*-*.pid")}

    def log_of(self, name: str) -> str:
        """A log of the head, by its file's name."""
        return "".join(file.read_text() for file in self.folder.glob(f"node0/session_2*/logs/{name}"))


def address(name: str) -> str:
    """Of a node, by its name."""
    return f"127.0.0.{int(name.removeprefix('node').partition('-')[0]) + 2}"
