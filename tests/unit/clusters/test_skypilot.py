import copy
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from kuberay import NUMBER, TEXT, record
from ray_settings import unknown_to_ray

from bit_ray.cli.flags import parse
from bit_ray.cli.main import COMMANDS
from bit_ray.training.config import PretrainConfig

FILE = Path(__file__).resolve().parents[3] / "clusters" / "skypilot.yaml"
TASK: dict[str, Any] = yaml.safe_load(FILE.read_text())
# A value of null is asked for when the job is launched.
VARIABLES = {
    "type": "object",
    "propertyNames": {"pattern": "^[A-Za-z_][A-Za-z0-9_]*$"},
    "additionalProperties": {"type": ["string", "null"]},
}
CHOICE = record("infra use_spot", infra=TEXT, use_spot={"type": "boolean"})
# The fields that our file uses; SkyPilot 0.14 itself has accepted it (clusters/skypilot.md).
SCHEMA = record(
    "name num_nodes resources run",
    name=TEXT,
    workdir=TEXT,
    num_nodes=NUMBER,
    envs=VARIABLES,
    secrets=VARIABLES,
    setup=TEXT,
    run=TEXT,
    resources=record(
        "accelerators any_of job_recovery",
        accelerators={"type": "object", "additionalProperties": {"type": "number"}},
        cpus={"type": ["string", "number"]},
        memory={"type": ["string", "number"]},
        disk_size=NUMBER,
        any_of={"type": "array", "minItems": 1, "items": CHOICE},
        job_recovery=record("max_restarts_on_errors", max_restarts_on_errors={"type": "integer", "minimum": 0}),
    ),
)


def problems(task: dict[str, Any]) -> str:
    """What SkyPilot refuses, and what it would do and should not."""
    found = [error.message for error in jsonschema.Draft202012Validator(SCHEMA).iter_errors(task)]
    if found:
        return "\n".join(found)
    commands = re.sub(r"^\s*#.*", "", task["run"], flags=re.MULTILINE)
    if "start_cluster" not in commands:
        found.append("run: a Ray of its own comes from ~/sky_templates/ray/start_cluster")
    if "ray stop" in commands or "auto" in re.findall(r"(?:RAY_ADDRESS|--address)=(\S+)", commands):
        found.append("run: that is SkyPilot's own Ray")
    if "sleep infinity" in commands:
        found.append("run: the job ends when all nodes have ended")
    if task["envs"].get("RAY_AUTH_MODE") != "token" or task.get("secrets", {}).get("RAY_AUTH_TOKEN", "") is not None:
        found.append("RAY_AUTH_TOKEN: a secret, given when the job is launched")
    return "\n".join(found)


def test_the_file_is_one_that_skypilot_takes() -> None:
    assert problems(TASK) == ""
    assert TASK["resources"]["any_of"][0]["use_spot"] is True


BROKEN: dict[str, Callable[[dict[str, Any]], object]] = {
    "'use_spots' was unexpected": lambda task: task["resources"].update(use_spots=True),
    "'2' is not of type 'integer'": lambda task: task.update(num_nodes="2"),
    "'yes' is not of type 'boolean'": lambda task: task["resources"]["any_of"][0].update(use_spot="yes"),
    "-1 is less than the minimum": lambda task: task["resources"]["job_recovery"].update(max_restarts_on_errors=-1),
    "1 is not of type 'string', 'null'": lambda task: task["envs"].update(RUN=1),
    "'job_recovery' is a required": lambda task: task["resources"].pop("job_recovery"),
    "'runs' was unexpected": lambda task: task.update(runs=task.pop("run")),
    "start_cluster": lambda task: task.update(run=task["run"].replace("start_cluster", "start")),
    "that is SkyPilot's own Ray": lambda task: task.update(run=task["run"] + "ray stop\n"),
    "SkyPilot's own": lambda task: task.update(run=task["run"].replace("127.0.0.1:6379", "auto")),
    "all nodes have ended": lambda task: task.update(run=task["run"] + "sleep infinity\n"),
    "RAY_AUTH_TOKEN: a secret": lambda task: task["secrets"].update(RAY_AUTH_TOKEN="abc"),
    "given when": lambda task: task["envs"].pop("RAY_AUTH_MODE"),
}


@pytest.mark.parametrize("problem", BROKEN)
def test_a_broken_copy_is_refused(problem: str) -> None:
    task = copy.deepcopy(TASK)
    BROKEN[problem](task)
    assert problem in problems(task)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_node_alone_runs_the_command_on_all_gpus(tmp_path: Path, rank: int) -> None:
    for name, text in {
        "bit_ray/bin/activate": f"PATH={tmp_path}/bit_ray/bin:$PATH\n",
        "bit_ray/bin/bit-ray": '#!/bin/bash\nprintf "%s\\n" "$RAY_ADDRESS" "$@"\n',
        "sky_templates/ray/start_cluster": "#!/bin/bash\necho started >>~/nodes\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    given = {
        "RUN": TASK["envs"]["RUN"],
        "SHARDS": "s3://BUCKET/a set",
        "STORAGE": "s3://BUCKET/runs",
        "HOME": str(tmp_path),
    }
    nodes = {"SKYPILOT_NODE_RANK": str(rank), "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    done = subprocess.run(
        ["bash", "-euc", TASK["run"]], env={**os.environ, **given, **nodes}, capture_output=True, text=True, check=True
    )
    assert (tmp_path / "nodes").read_text() == "started\n"
    if rank:
        assert done.stdout == ""
        return
    address, command, *flags = done.stdout.splitlines()
    assert address == "127.0.0.1:6379"
    config = parse(COMMANDS[command].config, flags, prog=command)
    assert isinstance(config, PretrainConfig)
    assert config.runtime.workers == (8, 16)
    assert config.shards == "s3://BUCKET/a set"


def test_ray_knows_the_variables() -> None:
    assert unknown_to_ray(re.findall(r"\bRAY_\w+", FILE.read_text())) == set()
    assert unknown_to_ray({"RAY_NO_SUCH_SETTING"}) == {"RAY_NO_SUCH_SETTING"}
