"""Runs whose number of workers changes, on a cluster whose nodes come and go."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from glyph_runs import history, run_config, weights
from mlflow import MlflowClient
from ray.cluster_utils import Cluster

import bit_ray
from bit_ray.config_files import write_config
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.run_folder import RunFolder
from bit_ray.training.learner import build_model
from bit_ray.training.pretrain import pretrain, pretrain_plan

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
STEPS = 250

# A user's own script. Growth pays only in runs of minutes, which `bit_ray.training.goodput.pays` is tested for.
SCRIPT = """
import sys
from bit_ray.config_files import read_config
from bit_ray.training import attempts
from bit_ray.training.config import PretrainConfig
from bit_ray.training.pretrain import pretrain

if __name__ == "__main__":
    attempts.pays = lambda *_: True
    pretrain(read_config(PretrainConfig, sys.argv[1]))
"""


def attempts_of(folder, name):
    path = folder / name / "attempts.json"
    return json.loads(path.read_text())["attempts"] if path.exists() else []


def reached(log):
    """The last step that the program printed."""
    return max(map(int, re.findall(r"elastic: step (\d+)/", log.read_text())), default=0)


def wait_until(true, program, log, seconds=200):
    deadline = time.monotonic() + seconds
    while not true():
        assert program.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def drain(address, node):
    """What a spot notice, an eviction or SIGTERM to a node's Ray does."""
    command = [
        str(Path(sys.executable).with_name("ray")), "drain-node", "--address", address, "--node-id", node.node_id,
        "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", "60",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def test_a_run_on_2_1_and_2_workers_learns_what_one_on_a_fixed_number_does(folder, shards, ray_local, tmp_path):
    """A node is taken away with a notice, and another one comes: no step is lost."""
    runtime = {"num_workers": "1:2", "grow_after_s": 1.0, "log_every_steps": 1, "checkpoint_every_s": 1.0}
    config = run_config(folder, "elastic", shards, STEPS, base_lr_per_256=0.004, **runtime)
    script, settings, log = tmp_path / "script.py", tmp_path / "config.json", tmp_path / "log"
    script.write_text(SCRIPT)
    write_config(config, settings)
    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    nodes = Cluster(head_node_args={"num_cpus": 0, "include_dashboard": False}, initialize_head=True)
    try:
        members = [nodes.add_node(**node) for _ in range(2)]
        with log.open("w") as output:
            program = subprocess.Popen(
                [sys.executable, str(script), str(settings)],
                env={**os.environ, "RAY_ADDRESS": nodes.address},
                stdout=output,
                stderr=output,
                cwd=tmp_path,
            )

        def attempt_trains(number):
            def true():
                attempts = attempts_of(folder, "elastic")
                return len(attempts) == number and reached(log) > attempts[-1]["first_step"]

            wait_until(true, program, log)

        attempt_trains(1)
        drain(nodes.address, members[0])
        attempt_trains(2)
        nodes.add_node(**node)
        assert program.wait(timeout=400) == 0, log.read_text()
    finally:
        nodes.shutdown()

    attempts = attempts_of(folder, "elastic")
    assert [attempt["num_workers"] for attempt in attempts] == [2, 1, 2]
    assert [attempt["shares"] for attempt in attempts] == [[32, 32], [64], [32, 32]]
    assert [attempt["ended"] for attempt in attempts] == ["left", "left", "finished"]
    assert [attempt["steps_lost"] for attempt in attempts] == [0, 0, 0]
    for before, after in pairwise(attempts):
        assert before["last_step"] == after["first_step"]
    why = [attempt["why"] for attempt in attempts]
    assert why[0] == "the run begins"
    assert why[1].startswith("node ")
    assert "is being taken away in " in why[1]
    assert why[2] == "room for 1 more worker"
    # Checkpoints by the clock: the steps say nothing here, and the last two are kept.
    saved, last = RunFolder(str(folder / "elastic")).checkpoints("training.json")
    assert last == STEPS
    assert attempts[-1]["first_step"] < saved < STEPS
    text = log.read_text()
    assert "elastic: attempt 2 from step" in text
    assert "elastic: goodput" in text
    assert " 3 attempts, 0 steps lost (0 s again)" in text

    fixed = pretrain(replace(config, name="fixed", runtime=replace(config.runtime, num_workers=1))).result
    model = bit_ray.load_model("models:/elastic@champion", tracking_uri=f"sqlite:///{folder}/mlflow.db")
    run_id = model.spec.provenance["run_id"]
    losses, expected = dict(history(folder, run_id)), dict(history(folder, fixed.run_id))
    assert losses.keys() == expected.keys() == set(range(1, STEPS + 1))
    # Sums in another order differ in their last bit, and training makes more of it with every step.
    for until, bound in ((30, 1e-5), (STEPS, 5e-3)):
        assert max(abs(losses[step] / expected[step] - 1) for step in range(1, until)) < bound
    metrics = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db").get_run(run_id).data.metrics
    assert 0 < metrics["run/goodput"] < 1
    assert metrics["run/attempts"] == 3
    start = build_model(pretrain_plan(config, read_manifest(shards)), None).state_dict()
    one, other = weights(fixed.package_uri), model.model.state_dict()
    for name, tensor in one.items():
        moved, apart = (tensor - start[name]).norm(), (tensor - other[name]).norm()
        assert apart < 0.5 * moved, f"{name}: {apart:.3g} apart, {moved:.3g} moved"
