"""Ray on several hosts of this machine, with a store and a tracker on others, and a run that is started on its head."""

import contextlib
import json
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from glyph_runs import SCRIPT
from hosts import Host, Hosts, environment
from mlflow import MlflowClient
from s3_server import Bucket, S3Server
from servers import MlflowServer

from bit_ray.config_files import write_config
from bit_ray.errors import StoreError
from bit_ray.run_folder import Attempt, RunFolder
from bit_ray.store import PATIENCE_S
from bit_ray.training.config import PretrainConfig

# A host that is silent is given up after at most 5 x (0.5 + 1.5) s, by Ray's own numbers after 65 s.
NOTICED = {
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1500,
    "health_check_failure_threshold": 5,
}
PORT = 6379
WORKER = "RayTrainWorker"
"""In the name of a process that trains."""
RAY = str(Path(sys.executable).with_name("ray"))


class HostCluster:
    """A head without CPUs, trainers with one each, an S3 server on the host ``store``, MLflow's on ``tracker``."""

    def __init__(self, folder: Path, *trainers: str, number: int, store_patience_s: float = PATIENCE_S) -> None:
        """Nothing is started yet; ``number`` as that of `Hosts`, ``store_patience_s``: of programs and workers."""
        self.folder, self.trainers, self._store_patience_s = folder, trainers, store_patience_s
        self.hosts = Hosts(folder / "hosts", "head", "store", "tracker", *trainers, number=number)

    def __enter__(self) -> "HostCluster":
        self.hosts.__enter__()
        try:
            self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.hosts.__exit__()

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def _start(self) -> None:
        store, tracker = self["store"], self["tracker"]
        self.s3 = S3Server(self.folder / "s3", store.address, store.enter)
        self.mlflow = MlflowServer(self.folder / "mlflow", host=tracker.address, enter=tracker.enter)
        self.bucket = Bucket(self.s3.endpoint, "hosts", self.s3.client(), self.s3)
        token = self.folder / "token"
        token.write_text(secrets.token_hex())
        self.environment = environment(
            **self.bucket.environment,
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN_PATH=str(token),
            RAY_USAGE_STATS_ENABLED="0",
            BIT_RAY_STORE_PATIENCE_S=str(self._store_patience_s),
            OMP_NUM_THREADS="1",
            PYTHONUNBUFFERED="1",
        )
        self.start_head()
        self.s3.start()
        self.bucket = Bucket(self.s3.endpoint, "hosts", self.s3.client(), self.s3)
        self.bucket.client.create_bucket(Bucket=self.bucket.bucket)
        self.mlflow.start()
        self.wait(lambda: self.is_up("head"), 120, "the head")
        self.start(*self.trainers)
        self.wait(lambda: all(map(self.is_up, self.trainers)), 120, "all nodes")

    def start_head(self) -> None:
        """Start Ray on the head."""
        noticed = f"--system-config={json.dumps(NOTICED)}"
        self._ray("head", "--head", f"--port={PORT}", "--num-cpus=0", "--include-dashboard=false", noticed)

    def start(self, *trainers: str) -> None:
        """Start Ray on trainers, where nothing of an earlier one may run any more."""
        for name in trainers:
            assert not self[name].pids(), name
            self._ray(name, f"--address={self['head'].address}:{PORT}", "--num-cpus=1")

    def _ray(self, name: str, *arguments: str) -> None:
        host = self[name]
        (host.folder / "ray.log").unlink(missing_ok=True)
        for left in (host.folder / "ray").iterdir():  # by which a new head would look for the one before
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        command = [RAY, "start", "--block", f"--node-ip-address={host.address}", "--num-gpus=0", *arguments]
        command += [f"--object-store-memory={80 * 2**20}", "--disable-usage-stats"]
        # A shard cache of its own, as on a machine of its own.
        host.start(
            *command, log="ray.log", environment=self.environment | {"BIT_RAY_CACHE": str(host.folder / "cache")}
        )

    def is_up(self, name: str) -> bool:
        """Whether Ray runs on a host, and has joined."""
        return "Ray runtime started" in self[name].log("ray.log") and bool(self[name].pids())

    def training(self) -> list[str]:
        """Return the hosts on which workers train."""
        return [name for name in self.trainers if self[name].running(WORKER)]

    def losses(self, name: str) -> list[tuple[int, float]]:
        """Return the step and loss of every value that the tracker has of a run, by step."""
        client = MlflowClient(tracking_uri=self.mlflow.uri)
        experiment = client.get_experiment_by_name("bit_ray").experiment_id
        [tracked] = client.search_runs([experiment], f"tags.`bit_ray.run_name` = '{name}'")
        return sorted((m.step, m.value) for m in client.get_metric_history(tracked.info.run_id, "train/loss"))

    @staticmethod
    def wait(true: Callable[[], object], seconds: float, what: str) -> float:
        """Wait until something is true; return after how many seconds it was."""
        began = time.monotonic()
        while not true():
            assert time.monotonic() - began < seconds, f"{what}: not after {seconds:g} s"
            time.sleep(0.1)
        return time.monotonic() - began


class Program:
    """A run whose program is on the head, and can be started again."""

    def __init__(self, cluster: HostCluster, config: PretrainConfig, script: str = SCRIPT) -> None:
        """Nothing is started yet."""
        self.cluster, self.name = cluster, config.name
        self.run = RunFolder.of(config.storage, config.name)
        self._script, self._config = cluster.folder / "script.py", cluster.folder / f"{config.name}.json"
        self._script.write_text(script)
        write_config(config, self._config)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, or start it again."""
        head = self.cluster["head"]
        variables = self.cluster.environment | {"RAY_ADDRESS": f"{head.address}:{PORT}"}
        command = [sys.executable, str(self._script), str(self._config)]
        self.process = head.start(*command, log=f"{self.name}.log", environment=variables)

    @property
    def log(self) -> str:
        """What it has printed so far, over all its starts."""
        return self.cluster["head"].log(f"{self.name}.log")

    def attempts(self) -> tuple[Attempt, ...]:
        """Return what is recorded of its groups of workers."""
        return self.run.attempts()

    def reached(self) -> int:
        """Return the last step that it has printed, which it does every few seconds, or saved."""
        reached = list(map(int, re.findall(rf"{self.name}: step (\d+)/", self.log)))
        with contextlib.suppress(StoreError):  # while the store is away
            reached.append(self.run.newest_checkpoint())
        return max(reached, default=0)

    def wait(self, true: Callable[[], object], seconds: float, what: str) -> float:
        """Wait until something is true of it; return after how many seconds it was."""

        def looked() -> object:
            assert self.process is not None
            assert self.process.poll() is None or true(), self.log
            return true()

        try:
            return self.cluster.wait(looked, seconds, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log}\n{self._controller_log()[-6000:]}") from None

    def _controller_log(self) -> str:
        """Return why workers failed, by Ray Train in its newest session."""
        logs = self.cluster["head"].folder.glob("ray/session_2*/logs/train/ray-train-controller.log")
        return "".join(path.read_text(errors="replace") for path in sorted(logs)[-1:])

    def trains(self, number: int, steps: int = 5) -> bool:
        """Return whether the group of this number has taken some steps."""
        done = self.attempts()
        return len(done) == number and self.reached() >= done[-1].first_step + steps
