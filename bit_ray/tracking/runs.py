"""One MLflow run per training run, with a queue on disk that survives outages of the server."""

import json
import logging
import re
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from bit_ray import store
from bit_ray.config import digest
from bit_ray.errors import TrackingError, one_line
from bit_ray.locks import locked, scratch_directory, user_name
from bit_ray.tracking.address import tracking_uri
from bit_ray.tracking.config import TrackingConfig
from bit_ray.tracking.identity import code_revision
from bit_ray.tracking.sending import send
from bit_ray.tracking.server import connect, experiment_id
from bit_ray.tracking.spool import Operation, Spool, spool_directory
from bit_ray.uris import shown, shown_in

# isort: split
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Param, Run
from mlflow.exceptions import MlflowException

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

SEND_EVERY_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0


RunKind = Literal["pretrain", "finetune", "train", "evaluate", "fewshot", "vtab", "study"]
"""The command that a run belongs to: different commands with the same run name never share a run."""


class Input(NamedTuple):
    """A shard set that a run reads."""

    context: Literal["training", "test"]
    name: str
    digest: str
    uri: str


class TrackedRun:
    """An open MLflow run. Logged values are queued on disk at once and sent by a thread: logging never waits or fails.

    A value is recorded once: a continued run leaves out the steps that the earlier process recorded already.
    """

    def __init__(self, client: MlflowClient, run: Run, spool: Spool, last_steps: Mapping[str, int], held: ExitStack):
        """Start sending for an existing run whose queue this process has locked (``held``); use ``TrackedRun.open``."""
        self.run_id: str = run.info.run_id
        self.experiment_id: str = run.info.experiment_id
        self.tracking_uri: str = client.tracking_uri
        self._client = client
        self._spool = spool
        self._held = held
        self._last_steps = dict(last_steps)
        self._outage = ""
        self._disk_failed = False
        self._closing = threading.Event()
        self._deadline = 0.0
        self._thread = threading.Thread(target=self._keep_sending, daemon=True, name=f"mlflow-{self.run_id[:8]}")
        self._thread.start()

    @property
    def furthest_step(self) -> int:
        """The last step of which earlier processes recorded something; 0 if none did."""
        return max(self._last_steps.values(), default=0)

    @classmethod
    def open(
        cls,
        config: TrackingConfig,
        *,
        run_name: str,
        storage: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        kind: RunKind,
        parent_run_id: str | None = None,
        inputs: Sequence[Input] = (),
        resolved: Mapping[str, Any] = MappingProxyType({}),
    ) -> "TrackedRun":
        """Continue the run of this name and kind in the experiment, or start it; the server is contacted at once.

        ``params`` is the nested config: MLflow gets it flattened to dotted names, and complete as ``config.json``.
        ``inputs`` are the sets that it reads, MLflow's Datasets; ``resolved`` is what the settings came to, as further
        params ``resolved.*``, by which runs can be compared.
        ``storage`` is the folder or URI of the runs, which also has the queue if it is local. Passwords in URIs of
        params and tags are not recorded.

        Raises:
            TrackingError: The server does not answer within about 10 seconds, or refuses.
            ConfigError: Another process records the run.
            DataError: ``storage`` has a key or a password in it.
        """
        if not run_name or re.search(r"[\"`\\\n]", run_name):
            raise TrackingError.of("name", repr(run_name), "text without quotes and backslashes", "rename the run")
        store.check_uri(storage)
        uri = tracking_uri(config.uri, storage)
        client = connect(uri)
        experiment = experiment_id(client, config.experiment, storage)
        params = shown_in(params)
        known = {"bit_ray.run_name": run_name, "bit_ray.kind": kind, "bit_ray.code_revision": code_revision()}
        tags = {**known, **shown_in(tags)}
        if parent_run_id is not None:
            tags["mlflow.parentRunId"] = parent_run_id
        opening = spool_directory(storage, f".{digest([uri, experiment, run_name, kind])[:16]}.lock")
        with ExitStack() as held:
            try:
                begun = f"{run_name!r} is being started"
                with locked(opening, begun, field="name", remedy="wait for it", wait_s=60.0):
                    run = find_run(client, experiment, run_name, kind)
                    if run is None:
                        user = user_name()
                        run = client.create_run(experiment, tags={"mlflow.user": user, **tags}, run_name=run_name)
                    spool = Spool(spool_directory(storage, run.info.run_id))
                    held.enter_context(_lock(spool, run_name))
                _log_params(client, run, {**flatten(params), **flatten(shown_in(resolved), "resolved.")})
                if inputs:
                    client.log_inputs(run.info.run_id, [_dataset(each) for each in inputs])
            except MlflowException as error:
                given = f"{shown(uri)} refuses the run {run_name!r} ({one_line(error)})"
                raise TrackingError.of("tracking.uri", given, remedy="see the log of the server") from None
            tracked = cls(client, run, spool, _last_steps(run, spool), held.pop_all())
        tracked._queue({"status": "RUNNING"})
        tracked.set_tags(tags)
        tracked.log_text(json.dumps(params, indent=2, default=str) + "\n", "config.json")
        return tracked

    def __enter__(self) -> "TrackedRun":
        """Record until the end of the ``with``, which ends the run too: FINISHED, FAILED, or KILLED by Ctrl-C."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """End the run with the status of the exception."""
        self.close("FINISHED" if error is None else "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Record values at a step; NaN is kept, and MLflow's stores turn an infinity into the largest float."""
        values = {_metric_name(name): float(value) for name, value in metrics.items()}
        values = {name: value for name, value in values.items() if step > self._last_steps.get(name, -1)}
        if values:
            self._queue({"metrics": values, "step": int(step), "time": _now()})

    def log_child(self, name: str, *, params: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Record a finished part of this run as a finished child run; only once, even if it is recorded again."""
        values = {_metric_name(key): float(value) for key, value in metrics.items()}
        self._queue({"child": name, "params": flatten(shown_in(params)), "values": values, "time": _now()})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run; the last value of each counts."""
        self._queue({"tags": {name: shown(str(value)) for name, value in tags.items()}})

    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        """Record a file or directory, as it is now, below ``folder`` of the run's artifacts."""
        try:
            self._queue({"artifact": self._spool.add_file(Path(path)), "folder": folder})
        except OSError as error:
            log.warning("%s is not recorded in MLflow: %s", path, one_line(error))

    def log_text(self, text: str, name: str) -> None:
        """Record a text as the artifact ``name``, such as ``reports/confusion.csv``."""
        self.log_bytes(text.encode(), name)

    def log_bytes(self, content: bytes, name: str) -> None:
        """Record bytes as the artifact ``name``, such as ``report/plots/loss.png``."""
        with scratch_directory() as directory:
            path = Path(directory, Path(name).name)
            path.write_bytes(content)
            self.log_artifact(path, Path(name).parent.as_posix().strip("."))

    def log_figure(self, figure: "Figure", name: str) -> None:
        """Record a matplotlib figure as the artifact ``name``, such as ``plots/loss.png``."""
        from bit_ray.plots.style import save_figure

        with scratch_directory() as directory:
            path = Path(directory, Path(name).name)
            save_figure(figure, path, dpi="figure")
            self.log_artifact(path, Path(name).parent.as_posix().strip("."))

    def close(self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED", timeout_s: float = 30.0) -> int:
        """End the run and wait until all is sent, at most ``timeout_s`` seconds.

        Returns:
            The number of operations not sent. They stay on disk for the next start of the run.
        """
        if not self._closing.is_set():
            self._queue({"status": status, "time": _now()})
            self._deadline = time.monotonic() + timeout_s
            self._closing.set()
        self._thread.join(max(0.0, self._deadline - time.monotonic()))
        unsent = len(self._spool.waiting())
        if unsent:
            where = self._spool.directory
            log.warning(
                "%d entries for MLflow are not sent yet and kept in %s; start the run again to send them", unsent, where
            )
        else:
            self._spool.remove_if_empty()
        self._held.close()
        return unsent

    def _queue(self, operation: Operation) -> None:
        try:
            self._spool.append(operation)
        except OSError as error:
            if not self._disk_failed:  # a full disk must not end a training
                self._disk_failed = True
                log.warning(
                    "%s: cannot be written (%s); metrics are lost until it can", self._spool.directory, one_line(error)
                )

    def _keep_sending(self) -> None:
        pause = SEND_EVERY_SECONDS
        while True:
            self._closing.wait(pause)
            closing = self._closing.is_set()
            failure = send(self._client, self.run_id, self._spool)
            self._report(failure)
            if closing and (not failure or time.monotonic() > self._deadline):
                return
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS) if failure else SEND_EVERY_SECONDS
            if closing:
                time.sleep(SEND_EVERY_SECONDS)

    def _report(self, failure: str) -> None:
        """Warn once when an outage begins, and log when it is over."""
        if failure and not self._outage:
            self._outage = time.strftime("%Y-%m-%d %H:%M:%S")
            text = "MLflow cannot be used since %s: %s; training continues, metrics are kept in %s and sent later"
            log.warning(text, self._outage, failure, self._spool.directory)
        elif self._outage and not failure:
            log.warning("MLflow can be used again; what was kept since %s is sent", self._outage)
            self._outage = ""


def send_kept(config: TrackingConfig, storage: str, run_id: str) -> None:
    """Send what a run that is over has kept on this machine, because it ended during an outage.

    Raises:
        TrackingError: The server does not answer, or refuses.
        ConfigError: Another process records the run.
    """
    spool = Spool(spool_directory(storage, run_id))
    if not spool.segments():
        return
    client = connect(tracking_uri(config.uri, storage))
    with _lock(spool, run_id):
        if failure := send(client, run_id, spool):
            given = f"{shown(client.tracking_uri)} does not take what is kept in {spool.directory} ({failure})"
            raise TrackingError.of("tracking.uri", given, remedy="see the log of the server, and start the run again")
        spool.remove_if_empty()


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested params by dotted name, as MLflow has them: ``{"model.width": "2"}``; lists as JSON."""
    flat: dict[str, str] = {}
    for key, value in params.items():
        name = prefix + re.sub(r"[^\w./ -]", "_", str(key))
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = json.dumps(value, default=str) if isinstance(value, (list, tuple, Mapping)) else str(value)
    return flat


def _lock(spool: Spool, run_name: str) -> AbstractContextManager[None]:
    """Lock a queue, so that no other process records the same run at the same time."""
    remedy = "wait for it, or choose another name"
    return locked(spool.directory / ".lock", f"{run_name!r} is being recorded", field="name", remedy=remedy)


def find_run(client: MlflowClient, experiment: str, run_name: str, kind: str) -> Run | None:
    """Return the run of this name and kind in an experiment, None if there is none."""
    query = f'tags.`bit_ray.run_name` = "{run_name}" and tags.`bit_ray.kind` = "{kind}"'
    runs = client.search_runs([experiment], query, max_results=1, order_by=["attributes.start_time ASC"])
    return client.get_run(runs[0].info.run_id) if runs else None


def _log_params(client: MlflowClient, run: Run, params: dict[str, str]) -> None:
    """Record the params that are new; MLflow never changes one, so a change shows only in ``config.json``."""
    recorded: dict[str, str] = run.data.params
    changed = [name for name in params if name in recorded and recorded[name] != params[name][: len(recorded[name])]]
    if changed:
        log.warning("changed since the run began; in MLflow only config.json has the new value: %s", ", ".join(changed))
    new = [Param(name, value) for name, value in params.items() if name not in recorded]
    client.log_batch(run.info.run_id, params=new, synchronous=True)


def _dataset(read: Input) -> DatasetInput:
    source = json.dumps({"uri": shown(read.uri)})
    # MLflow has room for 36 characters of a digest.
    dataset = Dataset(read.name, read.digest[:16], "shards", source)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", read.context)])


def _last_steps(run: Run, spool: Spool) -> dict[str, int]:
    """Return metric name -> last step that the server has or the queue will send."""
    steps = {metric.key: int(metric.step) for metric in run.to_proto().data.metrics}
    for operation in spool.waiting():
        for name in operation.get("metrics", ()):
            steps[name] = max(steps.get(name, -1), operation["step"])
    return steps


def _metric_name(name: str) -> str:
    """Return the name with an underscore for every character that MLflow refuses."""
    return re.sub(r"[^\w./: -]", "_", name)


def _now() -> int:
    return int(time.time() * 1000)
