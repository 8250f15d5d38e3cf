"""SLURM as a job script sees it, on this machine: `srun` runs a command once per node, `scontrol` writes down what it
is asked. A node is what two machines differ in: its number, its address, its ports and its folder."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

SRUN = """#!{python}
import os, signal, subprocess, sys
options = [arg for arg in sys.argv[1:] if arg.startswith("--")]
command = sys.argv[1 + len(options):]
(nodes,) = (int(option.partition("=")[2]) for option in options if option.startswith("--nodes="))
started = []
# As slurmstepd does it: a signal for srun goes to the started processes, and not to what they have started.
signal.signal(signal.SIGTERM, lambda *_: [process.terminate() for process in started])
for node in range(nodes):
    folder = os.environ["NODE_DIR"] + ("-%d" % node if node else "")
    own = {{"SLURM_NODEID": str(node), "NODE_DIR": folder, "PORT": str(int(os.environ["PORT"]) + 20 * node)}}
    arguments = [folder if arg == os.environ["NODE_DIR"] else arg for arg in command]
    started.append(subprocess.Popen(arguments, env={{**os.environ, **own}}))
sys.exit(max(abs(process.wait()) for process in started))
"""
IP = """#!/bin/sh
[ "$*" = "-4 -o address show dev lo" ] && echo "1: lo inet 127.0.0.$((${SLURM_NODEID:-0} + 2))/8"
"""
SCONTROL = """#!/bin/sh
echo "$@" >>"{folder}/scontrol"
"""
SCRIPT = Path(__file__).resolve().parents[1] / "clusters" / "slurm" / "bit_ray.sbatch"


class FakeSlurm:
    """One job of two nodes."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        self.programs = folder / "programs"
        self.programs.mkdir()
        self.add("srun", SRUN.format(python=sys.executable))
        self.add("ip", IP)
        self.add("scontrol", SCONTROL.format(folder=folder))
        self.number = os.getpid() * 100_000 + port  # of no other job on this machine
        self.token = folder / "home" / ".ray" / "auth_token"
        self.options = re.findall(r"^#SBATCH (--\S+)", SCRIPT.read_text(), re.MULTILINE)

    def add(self, name: str, text: str) -> None:
        """Put a program on the job's PATH."""
        path = self.programs / name
        path.write_text(text)
        path.chmod(0o755)

    def start(self, *command: str, **environment: str) -> None:
        """Start the job, as `sbatch` does with a script and a command."""
        settings = {
            "PATH": f"{self.programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(self.folder / "home"),
            "SLURM_JOB_ID": str(self.number),
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "2",
            "INTERFACE": "lo",
            "PORT": str(self.port),
            "JOIN_TIMEOUT": "120",
            **environment,
        }
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SLURM_"))}
        with (self.folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                ["bash", str(SCRIPT), *command],
                env={**inherited, **settings},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def warn(self) -> None:
        """Send what the script has asked for before its time is up, to it alone."""
        (name,) = re.findall(r"--signal=B:(\w+)@", " ".join(self.options))
        self.process.send_signal(signal.Signals[f"SIG{name}"])

    def wait(self, seconds: float = 120) -> int:
        """Wait for the job's end and return its exit status."""
        return self.process.wait(seconds)

    def started(self) -> list[psutil.Process]:
        """All processes that the job has started and that still run, wherever they have gone."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURM_JOB_ID") == str(self.number):
                    found.append(process)
        return found

    def rays(self) -> list[str]:
        """How `ray start` was called, where a program of the test takes its place."""
        path = self.folder / "rays"
        return path.read_text().splitlines() if path.exists() else []

    def end(self) -> None:
        """End what is left."""
        for process in self.started():
            with contextlib.suppress(psutil.Error):
                process.kill()
        shutil.rmtree(f"/tmp/bit_ray-{os.getuid()}/{self.number}", ignore_errors=True)
        shutil.rmtree(f"/tmp/bit_ray-{os.getuid()}/{self.number}-1", ignore_errors=True)

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def asked(self) -> str:
        """What `scontrol` was asked."""
        path = self.folder / "scontrol"
        return path.read_text() if path.exists() else ""

    def until(self, condition: Callable[[], object], seconds: float = 120) -> None:
        """Wait for a condition while the job runs."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.1)
