"""What MLflow has of a run, and where to look at it."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bit_ray.errors import TrackingError, one_line
from bit_ray.locks import scratch_directory
from bit_ray.tracking.address import recorded_uri
from bit_ray.tracking.config import TrackingConfig
from bit_ray.tracking.runs import RunKind, find_run
from bit_ray.tracking.server import connect, experiment_id
from bit_ray.uris import shown

# isort: split
from mlflow import MlflowClient
from mlflow.entities import DatasetInput, Run
from mlflow.exceptions import MlflowException


@dataclass(frozen=True, kw_only=True)
class RecordedRun:
    """A run's settings, sets and values."""

    params: Mapping[str, str]
    """Its settings by dotted name."""
    metrics: Mapping[str, float]
    """The last value of each metric."""
    sets: Mapping[str, str]
    """URI of each set that it read, by what for: ``training``, ``test``."""
    curves: Mapping[str, tuple[tuple[int, float], ...]]
    """(step, value) of the wanted metrics, by step; of the newest run below it where it has none of them itself."""


def recorded_run(uri: str, run_id: str, curves: tuple[str, ...] = ()) -> RecordedRun:
    """Read a run.

    Args:
        uri: Tracking URI.
        run_id: The run.
        curves: Metrics of which all values are wanted.

    Raises:
        TrackingError: The server does not answer, or has no such run.
    """
    client = connect(uri)
    try:
        run = client.get_run(run_id)
        trained = run
        if not set(curves) & run.data.metrics.keys():
            below = client.search_runs([run.info.experiment_id], f'tags.`mlflow.parentRunId` = "{run_id}"')
            trained = next((each for each in below if set(curves) & each.data.metrics.keys()), run)
        return RecordedRun(
            params=run.data.params,
            metrics=run.data.metrics,
            sets=dict(_set(each) for each in run.inputs.dataset_inputs),
            curves={
                name: _values(client, trained.info.run_id, name) for name in curves if name in trained.data.metrics
            },
        )
    except MlflowException as error:
        raise TrackingError(f"{shown(uri)}: run {run_id} cannot be read ({one_line(error)})") from None


def attach(uri: str, run_id: str, content: bytes, name: str) -> None:
    """Add an artifact to a run that is over.

    Raises:
        TrackingError: The server does not answer, or refuses.
    """
    client = connect(uri)
    try:
        with scratch_directory() as directory:
            path = Path(directory, name)
            path.write_bytes(content)
            client.log_artifact(run_id, str(path))
    except (MlflowException, OSError) as error:
        raise TrackingError(f"{shown(uri)}: {name} cannot be recorded ({one_line(error)})") from None


def recorded_metrics(
    config: TrackingConfig, storage: str, run_name: str, kind: str, names: str
) -> dict[str, list[tuple[int, float]]]:
    """Return the (step, value) pairs of a run's metrics, by step; a metric without values is left out.

    Args:
        config: Where the run is recorded.
        storage: Folder or URI of the runs.
        run_name: Name of the run.
        kind: Its `RunKind`.
        names: Regular expression of the whole names of the wanted metrics.

    Raises:
        TrackingError: The server does not answer, or has no such run.
    """
    client, run = _named(config, storage, run_name, kind)
    found = [name for name in sorted(run.data.metrics) if re.fullmatch(names, name)]
    return {name: list(_values(client, run.info.run_id, name)) for name in found}


def recorded_artifact(config: TrackingConfig, storage: str, run_name: str, kind: RunKind, name: str) -> bytes:
    """Return the content of an artifact of a run.

    Raises:
        TrackingError: The server does not answer, or has no such run or artifact.
    """
    client, run = _named(config, storage, run_name, kind)
    try:
        with scratch_directory() as directory:
            return Path(client.download_artifacts(run.info.run_id, name, directory)).read_bytes()
    except (MlflowException, OSError) as error:
        given = f"{shown(client.tracking_uri)} has no {name} of {run_name!r} ({one_line(error)})"
        raise TrackingError.of("tracking.uri", given, remedy=f"start the {kind} again") from None


class RunPage(NamedTuple):
    """Where to look at a run."""

    url: str
    """Its page in MLflow."""
    command: str
    """What serves that page; empty where a server does already."""
    artifacts: str
    """Its pictures and files: a folder, or a URI."""


def run_page(uri: str, run_id: str) -> RunPage:
    """Return where a run of a tracking store can be looked at.

    Raises:
        TrackingError: The server does not answer, or has no such run.
    """
    client = connect(uri)
    try:
        info = client.get_run(run_id).info
    except MlflowException as error:
        raise TrackingError(f"{shown(uri)}: {one_line(error)}") from None
    served = uri.startswith("http")
    host = shown(uri).rstrip("/") if served else "http://127.0.0.1:5000"
    return RunPage(
        url=f"{host}/#/experiments/{info.experiment_id}/runs/{run_id}",
        command="" if served else f"mlflow ui --backend-store-uri {uri}",
        artifacts=shown(info.artifact_uri).removeprefix("file://"),
    )


def _named(config: TrackingConfig, storage: str, run_name: str, kind: str) -> tuple[MlflowClient, Run]:
    client = connect(recorded_uri(config.uri, storage))
    run = find_run(client, experiment_id(client, config.experiment, storage), run_name, kind)
    if run is None:
        given = f"{shown(client.tracking_uri)} has no {kind} {run_name!r}"
        raise TrackingError.of("tracking.uri", given, remedy="name the server that recorded it")
    return client, run


def _values(client: MlflowClient, run_id: str, name: str) -> tuple[tuple[int, float], ...]:
    return tuple(sorted((metric.step, metric.value) for metric in client.get_metric_history(run_id, name)))


def _set(read: DatasetInput) -> tuple[str, str]:
    """Context and URI of a set; the URI is empty if something else has recorded it."""
    context = next((tag.value for tag in read.tags if tag.key == "mlflow.data.context"), "")
    try:
        source = json.loads(read.dataset.source)
    except ValueError:
        source = None
    uri = source.get("uri") if isinstance(source, dict) else None
    return context, uri if isinstance(uri, str) else ""
