"""A run whose workers come and go with the nodes of a cluster, which Ray's own autoscaler brings for it.

One story, on a cluster of `clusters/local.sh up --autoscaling` with one node of each type, one CPU each, and a run that
takes one or two workers: no node at first; spot is not to be had, so an on-demand node comes; then a spot node too; the
on-demand node's machine gets a spot notice; the spot node, the last one, is told to end, and another one comes. The
program of another run is killed.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from glyph_runs import history, run_config, trained_here
from local_cluster import ROOT, TYPES, LocalCluster, address
from metadata_service import Metadata, metadata, notice  # noqa: F401  # a fixture
from mlflow import MlflowClient

import bit_ray
from bit_ray.cluster.slots import Resources, choose_workers
from bit_ray.config_files import write_config
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.errors import ConfigError
from bit_ray.run_folder import RunFolder
from bit_ray.training.config import PretrainConfig
from bit_ray.training.learner import build_model
from bit_ray.training.pretrain import pretrain_plan

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

STEPS, IDLE_S, NOTICE_S = 200, 3, 60
# During the run no node goes because it is idle, as one is while the next workers start on a slow machine. Nothing asks
# for the GPU: torch would find none.
CHANGES = {
    "idle_timeout_minutes: 0.25": "idle_timeout_minutes: 10",
    "  spot:": "  gpu:\n    resources: {GPU: 4}\n    max_workers: 2\n    node_config: {}\n  spot:",
    "{CPU: 2}\n    max_workers: 4": "{CPU: 1}\n    max_workers: 1",
}
# The job, but it says what it finds, and takes every worker there is room for: growth pays only in runs of minutes, for
# which `bit_ray.training.goodput.pays` is tested.
SCRIPT = f"""
import dataclasses, json, runpy
from bit_ray.cluster.session import cluster
from bit_ray.training import room

if __name__ == "__main__":
    with cluster() as resources:
        print("found: " + json.dumps(dataclasses.asdict(resources)), flush=True)
    room.pays = lambda *_: True
    runpy.run_path("{ROOT}/jobs/pretrain.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    types, text = tmp_path_factory.mktemp("types") / "cluster.yaml", TYPES.read_text()
    for old, new in CHANGES.items():
        assert old in text
        text = text.replace(old, new)
    types.write_text(text)
    cluster = LocalCluster(types)
    try:
        cluster.up()
        yield cluster
    finally:
        left = cluster.down()
    assert left == []


@dataclass(frozen=True)
class Story:
    """What was seen of the cluster and the run."""

    config: PretrainConfig
    found: Resources
    """What the job found, before there was any node."""
    launches: list[tuple[str, str]]
    """What the autoscaler did until the first node: ``Launched`` or ``Failed to launch``, and the type."""
    up_s: float
    """From the demand to two nodes."""
    down_s: float
    """From the end of the job to none."""
    notifier: str
    """What the notifier of spot machines printed."""
    drained: dict[str, Any]
    """What the head says of the node that it drained, when that has gone."""
    head: dict[str, Any]
    """The same of itself."""
    log: str
    """Of the job."""
    attempts: list[dict[str, Any]]
    left: tuple[str, str]
    """Addresses of the nodes that were taken away."""
    killed: str
    """What became of the job whose program was killed."""


@pytest.fixture(scope="module")
def story(
    cluster: LocalCluster,
    folder: Path,
    shards: Path,
    metadata: Metadata,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Story:
    # Two workers train in shards, from a checkpoint of one, which goes on from theirs.
    runtime = {
        "num_workers": "1:3",
        "device": "cpu",
        "grow_after_s": 1.0,
        "checkpoint_every_s": 1.0,
        "sharding": "fsdp",
    }
    config = run_config(folder, "elastic", shards, STEPS, base_lr_per_256=0.004, **runtime)
    jobs = tmp_path_factory.mktemp("jobs")
    script = jobs / "script.py"
    script.write_text(SCRIPT)

    def submit(config: PretrainConfig) -> str:
        """Start a run as a job of its name; return what its program has in its command."""
        settings = jobs / f"{config.name}.json"
        write_config(config, settings)
        entrypoint = f"{sys.executable} {script} --config {settings}"
        cluster.ask("/api/jobs/", {"submission_id": config.name, "entrypoint": entrypoint})
        return str(settings)

    def job(name: str = "elastic") -> str:
        return cluster.log_of(f"job-driver-{name}.log")

    def attempts() -> list[dict[str, Any]]:
        file = folder / "elastic" / "attempts.json"
        return list(json.loads(file.read_text())["attempts"]) if file.exists() else []

    def trains(number: int) -> bool:
        """Whether this attempt has taken some steps."""
        done = attempts()
        steps = [int(step) for step in re.findall(r"elastic: step (\d+)/", job())]
        return len(done) == number and max(steps, default=0) > done[-1]["first_step"] + 5

    def status(name: str = "elastic") -> str:
        return str(cluster.ask(f"/api/jobs/{name}")["status"])

    def wait(
        true: Callable[[], object], seconds: float = 200, while_it: tuple[str, ...] = ("PENDING", "RUNNING")
    ) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            assert status() in while_it or true(), job()
            assert time.monotonic() < deadline, job() + cluster.log_of("monitor.log")[-3000:]
            time.sleep(0.3)

    assert cluster.nodes() == set()
    cluster.run("refuse", "spot")
    submit(config)
    wait(lambda: "starting workers" in job())
    began = time.monotonic()
    wait(lambda: kinds(cluster.started()) == ["on-demand"])
    [on_demand] = cluster.started()
    wait(attempts)
    launches = re.findall(r"(Failed to launch|Launched) \d nodes of type ([\w-]+)", cluster.log_of("monitor.log"))
    cluster.run("offer", "spot")
    wait(lambda: kinds(cluster.nodes()) == ["on-demand", "spot"])
    [spot] = cluster.nodes() - {on_demand}
    up_s = time.monotonic() - began

    wait(lambda: len(attempts()) == 2)
    cluster.run("refuse", "on-demand")
    with notifier(cluster, on_demand, metadata) as process:
        try:
            wait(lambda: metadata.num_asked >= 5)
            metadata.fails = False
            wait(lambda: trains(2))
            assert process.poll() is None  # no notice yet
            metadata.aws = notice(NOTICE_S + 5)
            notified, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0, notified
    wait(lambda: trains(3))
    assert cluster.run("reclaim", spot) == f"{spot} has been given notice\n"
    wait(lambda: kinds(cluster.started() - {spot}) == ["spot"] and spot not in cluster.started())
    wait(lambda: cluster.member(on_demand)["state"] == "DEAD")
    drained, head = cluster.member(on_demand), cluster.member("node0")
    wait(lambda: status() == "SUCCEEDED", 400)

    program = submit(replace(config, name="killed"))
    ended = ("SUCCEEDED",)
    wait(lambda: "killed: step " in job("killed"), 100, ended)
    for process in cluster.running(program):
        process.kill()
    wait(lambda: status("killed") not in ("PENDING", "RUNNING"), 60, ended)
    wait(lambda: not cluster.running("RayTrainWorker"), 20, ended)

    cluster.change("idle_timeout_minutes: 10", f"idle_timeout_minutes: {IDLE_S / 60}")
    began = time.monotonic()
    wait(lambda: not cluster.nodes() and not cluster.started(), IDLE_S + 60, ended)
    return Story(
        config=config,
        found=Resources(**json.loads(re.findall(r"^found: (.*)$", job(), re.MULTILINE)[0])),
        launches=launches,
        up_s=up_s,
        down_s=time.monotonic() - began,
        notifier=notified,
        drained=drained,
        head=head,
        log=job(),
        attempts=attempts(),
        left=(address(on_demand), address(spot)),
        killed=status("killed"),
    )


def kinds(nodes: set[str]) -> list[str]:
    """Return the types of nodes, by their names."""
    return sorted(node.partition("-")[2] for node in nodes)


def notifier(cluster: LocalCluster, node: str, metadata: Metadata) -> "subprocess.Popen[str]":  # noqa: F811
    """Start what watches a spot machine for its notice, while the metadata service fails."""
    metadata.fails = True
    node_id = cluster.member(node)["node_id"]
    command = [sys.executable, str(ROOT / "clusters" / "spot_notifier.py"), "aws", "--metadata", metadata.address]
    command += ["--address", f"{address('node0')}:{cluster.port}", "--node-id", node_id, "--interval", "0.1"]
    environment = cluster.environment | {
        "http_proxy": "http://127.0.0.1:9",  # a proxy of the environment is not for the metadata service
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_job_finds_what_the_autoscaler_may_bring(story: Story) -> None:
    assert story.found == Resources(1, 0, 0, False, num_cpus_later=2, num_gpus_later=8)
    assert choose_workers(story.found, 64) == (1, 8, True)
    assert choose_workers(story.found, 64, num_workers=(1, 3), device="cpu") == (1, 2, False)
    with pytest.raises(ConfigError, match="^runtime.num_workers: 3; accepted: at most 2, the CPUs that there may be; "):
        choose_workers(story.found, 64, num_workers=(3, 4), device="cpu")


def test_nodes_come_for_a_run_spot_first_and_go_after_it(story: Story) -> None:
    assert story.launches[0] == ("Failed to launch", "spot")
    assert ("Launched", "on-demand") in story.launches
    assert story.up_s <= 120
    assert story.down_s <= IDLE_S + 60
    print(f"{story.up_s:.0f} s from the demand to both nodes, {story.down_s:.0f} s from the last job's end to none")


def test_a_job_whose_program_is_killed_fails_and_holds_no_node(story: Story) -> None:
    assert story.killed == "FAILED"  # its workers ended, and then its nodes, or there would be no story
    [attempt] = RunFolder(f"{story.config.storage}/killed").attempts()
    assert attempt.ended == "running"


def test_a_node_whose_machine_gets_a_spot_notice_drains(story: Story) -> None:
    assert story.notifier.count("asking again") == 1  # not once for every question
    assert "the node drains" in story.notifier
    assert story.drained["state"] == "DEAD"
    assert "spot notice" in story.drained["state_message"], story.drained  # nothing ran on it any more
    assert story.head["state"] == "ALIVE"


def test_the_run_goes_on_at_once_on_what_there_is(story: Story) -> None:
    attempts = story.attempts
    assert [attempt["num_workers"] for attempt in attempts] == [1, 2, 1, 1]
    assert [attempt["shares"] for attempt in attempts] == [[64], [32, 32], [64], [64]]
    assert [attempt["ended"] for attempt in attempts] == ["left", "left", "left", "finished"]
    assert [attempt["steps_lost"] for attempt in attempts] == [0, 0, 0, 0]
    for before, after in pairwise(attempts):
        assert 0 < before["last_step"] == after["first_step"] < STEPS
    begins, more_room, noticed, reclaimed = (attempt["why"] for attempt in attempts)
    assert begins == "the run begins"
    assert more_room == "room for 1 more worker"
    for why, node, seconds in zip((noticed, reclaimed), story.left, (NOTICE_S, 20), strict=True):
        said = re.fullmatch(rf"node {node} is being taken away in (\d+) s", why)
        assert said is not None, why
        assert 0 < int(said[1]) <= seconds
    assert attempts[-1]["waited_s"] > 1  # all workers were needed, and there was no node
    # Checkpoints by the clock: the steps say nothing here, and the last two are kept.
    saved, last = RunFolder(f"{story.config.storage}/elastic").checkpoints("training.json")
    assert last == STEPS
    assert attempts[-1]["first_step"] < saved < STEPS
    assert "elastic: attempt 2 from step" in story.log
    assert "elastic: goodput" in story.log
    assert " 4 attempts, 0 steps lost (0 s again)" in story.log


def test_the_run_learns_what_one_worker_alone_does(story: Story, folder: Path, shards: Path, ray_local: None) -> None:
    plan = pretrain_plan(story.config, read_manifest(shards))
    expected, one = trained_here(plan, shards)
    model = bit_ray.load_model("models:/elastic@champion", tracking_uri=f"sqlite:///{folder}/mlflow.db")
    run_id = model.spec.provenance["run_id"]
    recorded = history(folder, run_id)
    assert [step for step, _ in recorded] == list(range(1, STEPS + 1))  # each once
    apart = {step: abs(loss / expected[step] - 1) for step, loss in recorded}
    # Sums in another order differ in their last bit, and training makes more of it with every step.
    shared_from = story.attempts[1]["first_step"]
    for until, bound in ((shared_from + 1, 1e-6), (shared_from + 30, 1e-5), (STEPS + 1, 5e-3)):
        assert max(apart[step] for step in range(1, until)) < bound
    metrics = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db").get_run(run_id).data.metrics
    assert 0 < metrics["run/goodput"] < 1
    assert metrics["run/attempts"] == 4
    start = build_model(plan, None).state_dict()
    other = model.model.state_dict()
    for name, tensor in one.items():
        moved, between = (tensor - start[name]).norm(), (tensor - other[name]).norm()
        assert between < 0.5 * moved, f"{name}: {between:.3g} apart, {moved:.3g} moved"
