"""Studies in processes of their own outlive what is killed: a trial, a node, the driver with its whole Ray."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import tiny_study
from ray._private.node import Node
from ray.cluster_utils import Cluster
from servers import kill_ray_processes

from bit_ray import store
from bit_ray.cli.main import main
from bit_ray.tracking.config import TrackingConfig

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

# A lost node is noticed in 1.5 s instead of 15.
NOTICED = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
HEAD = {"num_cpus": 0, "include_dashboard": False, "_system_config": NOTICED}
NODE = {"num_cpus": 3, "object_store_memory": 100 * 2**20}
# The first training of the study.
KEY = "weight_decay-0-seed-0"


class Running:
    """A study in a process of its own, on a cluster whose head has no CPUs and whose node has 3."""

    def __init__(self, nodes: Cluster, program: subprocess.Popen[bytes], log: Path):
        self.nodes, self.program, self._log = nodes, program, log

    def wait_for(self, condition, what: str, seconds: float = 300) -> None:
        """Return when something has happened, while the study runs."""
        deadline = time.monotonic() + seconds
        while self.program.poll() is None and not condition():
            assert time.monotonic() < deadline, what
            time.sleep(0.05)
        assert self.program.poll() is None, self._log.read_text()

    def finish(self) -> None:
        """Wait for its good end."""
        assert self.program.wait(300) == 0, self._log.read_text()

    def nothing_is_left(self) -> None:
        """Return when all CPUs are free and no placement group stands."""
        state, deadline = self.nodes.global_state, time.monotonic() + 60
        while True:
            total, free = (found.get("CPU") for found in (state.cluster_resources(), state.available_resources()))
            groups = [group for group in state.placement_group_table().values() if group["state"] == "CREATED"]
            if total == free and not groups:
                return
            assert time.monotonic() < deadline, f"{free} of {total} CPUs are free, placement groups: {groups}"
            time.sleep(0.1)


@contextlib.contextmanager
def running(tmp_path: Path, sets: Path, *args: str) -> Iterator[Running]:
    nodes = Cluster(head_node_args=HEAD, initialize_head=True)
    try:
        nodes.add_node(**NODE)
        with (tmp_path / "log").open("w") as log:
            program = subprocess.Popen(
                [sys.executable, tiny_study.__file__, *study(sets, *args)],
                env={**os.environ, "RAY_ADDRESS": nodes.address},
                stdout=log,
                stderr=log,
                cwd=tmp_path,
            )
        try:
            yield Running(nodes, program, tmp_path / "log")
        finally:
            program.kill()
            program.wait()
    finally:
        nodes.shutdown()


def study(sets: Path, *args: str) -> list[str]:
    return ["study", "run", "tiny", "--name", "decay", "--val-shards", f"{sets}/val", "--seeds", "1", *args]


def recorded(tracking: TrackingConfig) -> list[str]:
    return ["--tracking.uri", tracking.uri, "--tracking.experiment", tracking.experiment]


def kill(processes: list[psutil.Process]) -> None:
    """SIGKILL to processes and all below them."""
    found = list(processes)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            found += process.children(recursive=True)
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def processes_of(node: Node) -> list[psutil.Process]:
    found = [info.process.pid for infos in node.all_processes.values() for info in infos]
    return [psutil.Process(pid) for pid in found if psutil.pid_exists(pid)]


def steps_of(files: list[str]) -> set[int]:
    """Steps of the whole checkpoints among files."""
    whole = [Path(file).parent.name for file in files if file.endswith("/training.json")]
    return {int(name.removeprefix("step-")) for name in whole if name.startswith("step-")}


def test_trainings_on_the_cluster_outlive_a_trial_then_its_node_and_a_worker_alone(sets, tmp_path, tracking):
    """SIGKILL of a trial while its worker trains, then of the only node, with another one that joins; of the worker
    of the next training, whose trial goes on.
    """
    long, short = (f"weight_decay-0-epochs-{epochs}-seed-0" for epochs in (40, 20))
    args = ["--where", "cluster", "--set", f"shards={sets}/train", "recipe.decay_epochs=[]"]
    args += ["runtime.num_workers=1", "runtime.checkpoint_every_steps=100", "runtime.log_every_steps=100"]
    args += ["--axes", "recipe.weight-decay=0.0", "recipe.epochs=40,20", "--storage", f"{tmp_path}/runs"]

    def folder(key: str) -> Path:
        return tmp_path / "runs" / f"decay.{key}"

    def score(key: str) -> Path:
        return tmp_path / "runs" / "decay" / "scores" / f"{key}.json"

    def starts(key: str) -> list[int]:
        path = folder(key) / "runtime.json"
        return [start["first_step"] for start in json.loads(path.read_text())["starts"]] if path.exists() else []

    def saved(key: str) -> set[int]:
        # Unlike a glob, a walk passes over what is deleted meanwhile.
        return steps_of([f"{place}/{file}" for place, _, files in os.walk(folder(key)) for file in files])

    with running(tmp_path, sets, *args, *recorded(tracking)) as run:
        # The second is there only after the first is known to Ray Train, too.
        run.wait_for(lambda: len(saved(long)) >= 2, "no checkpoints")
        assert kill_ray_processes("ray::ImplicitFunc")  # the trial
        # Its worker holds 2 of 3 CPUs until it is freed; of the steps from 100 on, those to 200 may be the first one's.
        run.wait_for(lambda: len(starts(long)) >= 2 and max(saved(long)) >= starts(long)[1] + 300, "not continued")
        [lost] = run.nodes.worker_nodes
        lost.kill_raylet()
        run.nodes.add_node(**NODE)
        run.wait_for(lambda: saved(short), "the second training has no checkpoint")
        finished, scored = starts(long), score(long).read_bytes()
        assert len(kill_ray_processes("RayTrainWorker")) == 1
        run.finish()
        run.nothing_is_left()
    first, second, third = finished
    assert 0 == first < second < third < 600
    again, later = starts(short)
    assert 0 == again < later < 300
    assert starts(long) == finished
    assert score(long).read_bytes() == scored
    for key, steps in ((long, [300, 600]), (short, [150, 300])):
        # It was measured half-way, too, and the weights of then are not kept.
        points = json.loads(score(key).read_text())["points"]
        assert [point["step"] for point in points] == steps
        assert all({"train/loss", "val/loss", "val/top_1"} <= point["values"].keys() for point in points)
        assert points[0]["values"] != points[1]["values"]
        assert list(folder(key).glob("milestone-*")) == []


def test_a_study_on_an_object_store_outlives_its_node_and_then_its_driver_with_the_whole_ray(
    sets, s3, tmp_path, ray_local, tiny, capsys, tracking
):
    """The first training in memory loses the only node, and another one joins; SIGKILL of all during the second one.

    The second start is on another Ray, that of this process.
    """
    # Says where the store is: the other Ray has only its keys.
    place = s3.endpoint.removeprefix("http://")
    storage = f"s3://{s3.bucket}/runs?endpoint_override={place}&scheme=http&region=us-east-1"

    def files(folder: str) -> list[str]:
        return store.list_files(store.join(storage, "decay", folder))

    def content(score: str) -> bytes:
        return store.read_bytes(store.join(storage, "decay", "scores", score))

    args = ["--side-by-side", "1", "--save-every-s", "0", *recorded(tracking)]
    args += ["--storage", storage, "--set", f"shards={sets}/train", "recipe.epochs=4", "recipe.decay_epochs=[3]"]

    def steps(key: str) -> set[int]:
        return steps_of([file for file in files("cells") if file.startswith(key)])

    with running(tmp_path, sets, *args) as run:
        run.wait_for(lambda: max(steps(KEY), default=0) >= 15, "no checkpoints")
        [lost] = run.nodes.worker_nodes
        kill(processes_of(lost))
        before = steps(KEY)  # the newest, and the one before it if that was not deleted yet
        assert max(before) < 60
        run.nodes.add_node(**NODE)
        seen: set[int] = set()

        def scored() -> list[str]:
            seen.update(steps(KEY))
            return files("scores")

        run.wait_for(scored, "the first training is not finished")
        # A training that began again would save its first steps again.
        assert min(seen - before) > max(before) >= 15
        run.wait_for(lambda: steps_of(files("cells")), "the second training has not begun")
        kill([psutil.Process(run.program.pid)] + [p for node in run.nodes.list_all_nodes() for p in processes_of(node)])
        assert run.program.wait() < 0
    [finished] = files("scores")
    first = content(finished)
    score = json.loads(first)
    assert [point["step"] for point in score["points"]] == [30, 60]
    half_way = {file.partition("/")[0] for file in files("cells") if file.endswith("training.json")}
    assert len(half_way) == 1

    capsys.readouterr()
    assert main(study(sets, *args)) == 0
    assert "decay: 1 of 2 trainings are done already" in capsys.readouterr().out
    assert content(finished) == first
    assert len(files("scores")) == 2
    assert files("cells") == []
    # What was saved was not computed again: its time counts with that of the first start.
    score = json.loads(content(f"{half_way.pop()}.json"))
    assert [step for step, _ in score["losses"]] == sorted({step for step, _ in score["losses"]})
    assert len(score["losses"]) == 60
