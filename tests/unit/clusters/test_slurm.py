"""What the SLURM script does with its command, its nodes and signals. Ray is a program that writes down how it was
called; `tests/integration/clusters` has all of it."""

import re
import shlex
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_slurm import SCRIPT, FakeSlurm
from ray_settings import unknown_to_ray

from bit_ray.cli.flags import parse
from bit_ray.cli.main import COMMANDS

RAY = """#!/bin/bash
[ "$1" = start ] || exit 0
echo "$SLURM_NODEID $RAY_AUTH_MODE $*" >>"{folder}/rays"
mkdir -p "$NODE_DIR" && trap 'exit 0' TERM
while :; do sleep 0.05; done
"""
# As bit_ray does it: save, and end with 143.
RUN = """#!/bin/bash
trap 'echo saved; sleep 0.2; exit 143' TERM
echo "begun $RAY_ADDRESS $*"
while [ ! -e "{folder}/done" ]; do sleep 0.05; done
exit "$(cat "{folder}/done")"
"""
SHELLCHECK = Path(sys.executable).with_name("shellcheck")


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[FakeSlurm]:
    slurm = FakeSlurm(tmp_path, 28_000)
    slurm.add("ray", RAY.format(folder=tmp_path))
    slurm.add("python", "#!/bin/sh\n")  # it waits for Ray's nodes
    slurm.add("run", RUN.format(folder=tmp_path))
    yield slurm
    slurm.end()


def begin(slurm: FakeSlurm) -> None:
    slurm.start("run", "a b", "c")
    slurm.until(lambda: "begun" in slurm.log and len(slurm.rays()) == 2)


def test_before_the_time_is_up_the_run_saves_and_the_job_is_queued_again(slurm: FakeSlurm) -> None:
    begin(slurm)
    slurm.warn()
    assert slurm.wait() == 143, slurm.log
    assert slurm.log.endswith("saved\n")
    assert slurm.started() == []
    assert slurm.asked == f"requeue {slurm.number}\n"


def test_a_job_that_is_cancelled_saves_and_is_not_queued_again(slurm: FakeSlurm) -> None:
    begin(slurm)
    slurm.process.terminate()
    assert slurm.wait() == 143, slurm.log
    assert slurm.log.endswith("saved\n")
    assert slurm.started() == []
    assert slurm.asked == ""


@pytest.mark.parametrize("status", [0, 2])
def test_a_run_that_is_done_or_fails_ends_the_job(slurm: FakeSlurm, tmp_path: Path, status: int) -> None:
    begin(slurm)
    (tmp_path / "done").write_text(str(status))
    assert slurm.wait() == status, slurm.log
    assert slurm.asked == ""
    assert slurm.started() == []
    assert "begun 127.0.0.2:28000 a b c" in slurm.log


def test_a_run_that_fails_while_it_is_told_to_save_is_not_queued_again(slurm: FakeSlurm) -> None:
    slurm.add("run", RUN.format(folder=slurm.folder).replace("exit 143", "exit 2"))
    begin(slurm)
    slurm.warn()
    assert slurm.wait() == 2, slurm.log
    assert slurm.asked == ""


def test_each_node_has_its_ports_the_token_and_no_open_dashboard(slurm: FakeSlurm) -> None:
    begin(slurm)
    head, other = sorted(slurm.rays())
    for number, line in enumerate((head, other)):
        assert line.startswith(f"{number} token start --block")
        assert f"--node-ip-address=127.0.0.{2 + number}" in line
        ports = [int(port) for port in re.findall(r"port=(\d{5})", line)]
        first = 28_000 + 20 * number
        assert len(set(ports)) == len(ports) >= 6
        assert all(first <= port < first + 11 for port in ports)
        assert not {first + 9, first + 10} & set(ports)  # two that are given by the environment
        assert "--num-cpus=2" in line
    assert "--head --port=28000 --dashboard-host=127.0.0.1" in head
    assert "--address=127.0.0.2:28000" in other


def test_the_token_is_made_for_this_user_alone_and_kept(slurm: FakeSlurm) -> None:
    begin(slurm)
    token = slurm.token.read_text()
    assert re.fullmatch("[0-9a-f]{64}", token)
    assert stat.S_IMODE(slurm.token.stat().st_mode) == 0o600
    assert stat.S_IMODE(slurm.token.parent.stat().st_mode) == 0o700
    assert [path.name for path in slurm.token.parent.iterdir()] == ["auth_token"]
    (slurm.folder / "done").write_text("0")
    slurm.wait()
    begin(slurm)
    assert slurm.token.read_text() == token


def test_a_token_that_others_can_read_is_refused_before_anything_starts(slurm: FakeSlurm) -> None:
    slurm.token.parent.mkdir(parents=True)
    slurm.token.write_text("a" * 64)
    slurm.token.chmod(0o644)
    slurm.start("run")
    assert slurm.wait() == 2
    assert slurm.log == (
        f"error: RAY_AUTH_TOKEN_PATH: others may read {slurm.token}; accepted: mode 600; run chmod 600 on it\n"
    )
    assert slurm.rays() == []


@pytest.mark.parametrize(
    ("command", "environment", "message"),
    [
        ([], {}, "COMMAND: missing; accepted: what runs on the cluster"),
        (["no-such-program"], {}, "PATH: has no no-such-program; activate bit_ray's environment"),
        (["run"], {"INTERFACE": "fake1"}, "INTERFACE: fake1 has no address on "),
        (["run"], {"SLURM_JOB_ID": ""}, "SLURM_JOB_ID: not set; accepted: a job of SLURM; start it with sbatch"),
    ],
)
def test_a_mistake_is_one_line(slurm: FakeSlurm, command: list[str], environment: dict[str, str], message: str) -> None:
    slurm.start(*command, **environment)
    assert slurm.wait() == 2
    assert slurm.log.startswith(f"error: {message}")
    assert slurm.log.count("\n") == 1
    assert slurm.rays() == []


def test_the_options_say_when_to_warn_whom_and_to_queue_again(slurm: FakeSlurm) -> None:
    options = dict(option.removeprefix("--").partition("=")[::2] for option in slurm.options)
    assert options.items() >= {"requeue": "", "no-kill": "", "open-mode": "append", "ntasks-per-node": "1"}.items()
    shell, signal, seconds = re.fullmatch(r"(B):(\w+)@(\d+)", options["signal"]).groups()  # type: ignore[union-attr]
    assert (shell, signal) == ("B", "USR1")
    assert int(seconds) >= 60


def test_the_example_can_be_typed() -> None:
    text = SCRIPT.read_text()
    (example,) = re.findall(r"^#   (sbatch .*\\\n#  .*)$", text, re.MULTILINE)
    words = shlex.split(example.replace("\\\n#", ""))
    program, command, *flags = words[words.index("clusters/slurm/bit_ray.sbatch") + 1 :]
    assert program == "bit-ray"
    assert parse(COMMANDS[command].config, flags, prog=command).runtime.workers == (8, 32)
    assert unknown_to_ray(re.findall(r"\bRAY_\w+", text)) == set()


def shellcheck(text: str) -> str:
    done = subprocess.run([SHELLCHECK, "--shell=bash", "-"], input=text, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_shellcheck_finds_nothing() -> None:
    assert shellcheck(SCRIPT.read_text()) == ""


@pytest.mark.parametrize(
    ("good", "bad"),
    [('"$RAY_ADDRESS" >', "$RAY_ADDRESS >"), ("fail() {", "fail( {"), ("nodes=$!", "node=$!"), ("\nfi\n", "\n")],
)
def test_shellcheck_finds_what_is_wrong_with_a_broken_copy(good: str, bad: str) -> None:
    assert good in SCRIPT.read_text()
    assert shellcheck(SCRIPT.read_text().replace(good, bad, 1)) != ""
