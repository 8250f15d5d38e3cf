"""A run that Ray's own autoscaler brings the nodes for, on a cluster of `clusters/local.sh up --autoscaling`."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from glyph_runs import history, run_config
from s3_server import free_ports

import bit_ray
from bit_ray.cluster.slots import Resources, choose_workers
from bit_ray.config_files import write_config
from bit_ray.errors import ConfigError

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = str(ROOT / "clusters" / "local.sh")
STEPS, IDLE_S = 120, 15
# One node of each type, so that two workers need both. Nothing asks for the GPU: torch would find none.
TYPES = {
    "  spot:": "  gpu:\n    resources: {GPU: 4}\n    max_workers: 2\n    node_config: {}\n  spot:",
    "{CPU: 2}\n    max_workers: 4": "{CPU: 1}\n    max_workers: 1",
}
ASK = """
import dataclasses, json
from bit_ray.cluster.session import cluster
with cluster() as resources:
    print(json.dumps(dataclasses.asdict(resources)))
"""


class LocalCluster:
    """What a user of the script has, and what the head says."""

    def __init__(self, folder: Path, types: Path) -> None:
        self.folder, self.port = folder, free_ports(1)[0]
        settings = {"CLUSTER_DIR": str(folder), "CLUSTER_PORT": str(self.port), "PYTHON": sys.executable}
        self.environment = {**os.environ, **settings, "CLUSTER_NODES": str(types), "CLUSTER_NOTICE_S": "20"}

    def run(self, *arguments: str, timeout: float = 60) -> str:
        done = subprocess.run(
            [SCRIPT, *arguments], env=self.environment, check=True, capture_output=True, text=True, timeout=timeout
        )
        return done.stdout

    def up(self) -> None:
        self.run("up", "--autoscaling", timeout=200)
        exports = (line.removeprefix("export ").partition("=") for line in self.run("env").splitlines())
        self.environment |= {name: value for name, _, value in exports}

    def ask(self, path: str) -> dict:
        token = (self.folder / "auth_token").read_text().strip()
        address = self.environment["RAY_API_SERVER_ADDRESS"]
        request = urllib.request.Request(address + path, headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def nodes(self) -> set[str]:
        """Names of the nodes that are in the cluster, without the head."""
        names = {f"127.0.0.{int(name.removeprefix('node').partition('-')[0]) + 2}": name for name in self.started()}
        summary = self.ask("/nodes?view=summary")["data"]["summary"]
        # A node that has just come has no address yet.
        alive = {node.get("ip") for node in summary if node.get("raylet", {}).get("state") == "ALIVE"}
        return {names[address] for address in alive & names.keys()}

    def started(self) -> set[str]:
        return {file.stem for file in self.folder.glob("node*-*.pid")}

    def log_of(self, name: str) -> str:
        return "".join(file.read_text() for file in self.folder.glob(f"node0/session_2*/logs/{name}"))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    types = tmp_path / "cluster.yaml"
    text = (ROOT / "clusters" / "local-autoscaling" / "cluster.yaml").read_text()
    for old, new in TYPES.items():
        assert old in text
        text = text.replace(old, new)
    types.write_text(text)
    folder = Path(tempfile.mkdtemp(prefix="bra-"))  # short, as sockets lie in it
    cluster = LocalCluster(folder, types)
    try:
        cluster.up()
        yield cluster
    finally:
        nodes = [psutil.Process(int(file.read_text())) for file in folder.glob("node*.pid")]
        started = nodes + [process for node in nodes for process in node.children(recursive=True)]
        cluster.run("down")
        _, left = psutil.wait_procs(started, timeout=5)
        shutil.rmtree(folder)
    assert len(started) > 5
    assert left == []


def wait_until(true: Callable[[], object], log: Callable[[], str], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, log()
        time.sleep(0.1)


def test_nodes_come_for_a_run_are_replaced_when_taken_away_and_go_after_it(
    cluster: LocalCluster, folder: Path, shards: str, tmp_path: Path
) -> None:
    """From 0 nodes to 2 and back to 0; spot is not to be had at first; a spot node is taken away: no step is lost."""
    asked = subprocess.run(
        [sys.executable, "-c", ASK],
        env={**cluster.environment, "RAY_ADDRESS": f"127.0.0.2:{cluster.port}"},
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    resources = Resources(**json.loads(asked.stdout.splitlines()[-1]))
    assert resources == Resources(1, 0, 0, False, num_cpus_later=2, num_gpus_later=8, cpus_of_one=0)
    assert choose_workers(resources, 64) == (1, 8, True)
    with pytest.raises(ConfigError, match="^runtime.num_workers: 3; accepted: at most 2, the CPUs that there may be; "):
        choose_workers(resources, 64, num_workers=(3, 4), device="cpu")
    assert cluster.nodes() == set()

    runtime = {"num_workers": "2:3", "device": "cpu", "grow_after_s": 1.0}
    settings = tmp_path / "config.json"
    write_config(run_config(folder, "scaled", shards, STEPS, base_lr_per_256=0.004, **runtime), settings)
    cluster.run("refuse", "spot")
    ray = str(Path(sys.executable).with_name("ray"))
    command = f"{sys.executable} {ROOT / 'jobs' / 'pretrain.py'} --config {settings}"
    subprocess.run(
        [ray, "job", "submit", "--no-wait", "--submission-id", "scaled", "--", *command.split()],
        env=cluster.environment,
        check=True,
        capture_output=True,
        timeout=100,
    )

    def log() -> str:
        return cluster.log_of("job-driver-scaled.log") + cluster.log_of("monitor.log")[-3000:]

    def ended() -> bool:
        return cluster.ask("/api/jobs/scaled")["status"] in ("SUCCEEDED", "FAILED", "STOPPED")

    def wait(true: Callable[[], object], seconds: float) -> None:
        wait_until(lambda: true() or ended(), log, seconds)
        assert true(), log()

    def trains(number: int) -> bool:
        file = folder / "scaled" / "attempts.json"
        attempts = json.loads(file.read_text())["attempts"] if file.exists() else []
        steps = [int(step) for step in re.findall(r"scaled: step (\d+)/", cluster.log_of("job-driver-scaled.log"))]
        return len(attempts) == number and max(steps, default=0) > attempts[-1]["first_step"] + 5

    wait(lambda: "starting workers" in cluster.log_of("job-driver-scaled.log"), 200)
    began = time.monotonic()
    # Spot comes first, and cannot be had: on-demand takes over.
    wait(lambda: cluster.started() == {"node1-on-demand"}, 200)
    tried = re.findall(r"(Failed to launch|Launched) \d nodes of type ([\w-]+)", cluster.log_of("monitor.log"))
    assert tried[0] == ("Failed to launch", "spot")
    assert ("Launched", "on-demand") in tried
    cluster.run("offer", "spot")
    wait(lambda: cluster.nodes() == {"node1-on-demand", "node2-spot"}, 200)
    up_s = time.monotonic() - began
    assert up_s <= 120

    wait(lambda: trains(1), 200)
    assert cluster.run("reclaim", "node2-spot") == "node2-spot has been given notice\n"
    wait(lambda: cluster.started() == {"node1-on-demand", "node3-spot"}, 200)
    wait(lambda: trains(2), 200)
    wait_until(ended, log, 400)
    done = time.monotonic()
    assert cluster.ask("/api/jobs/scaled")["status"] == "SUCCEEDED", log()
    wait_until(lambda: not cluster.nodes() and not cluster.started(), log, IDLE_S + 60)
    down_s = time.monotonic() - done
    print(f"{up_s:.0f} s from the demand to both nodes, {down_s:.0f} s from its end to none")

    attempts = json.loads((folder / "scaled" / "attempts.json").read_text())["attempts"]
    assert [attempt["num_workers"] for attempt in attempts] == [2, 2]
    assert [attempt["ended"] for attempt in attempts] == ["left", "finished"]
    assert [attempt["steps_lost"] for attempt in attempts] == [0, 0]
    assert 0 < attempts[0]["last_step"] == attempts[1]["first_step"] < STEPS
    assert "is being taken away in " in attempts[1]["why"]
    model = bit_ray.load_model("models:/scaled@champion", tracking_uri=f"sqlite:///{folder}/mlflow.db")
    steps = [step for step, _ in history(folder, model.spec.provenance["run_id"])]
    assert steps == list(range(1, STEPS + 1))  # each once
