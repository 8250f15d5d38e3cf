"""What MLflow has of a run that is over."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bit_ray.errors import TrackingError, one_line
from bit_ray.locks import scratch_directory
from bit_ray.tracking.server import connect
from bit_ray.uris import shown

# isort: split
from mlflow import MlflowClient
from mlflow.entities import DatasetInput
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
        TrackingError: the server does not answer, or has no such run.
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
        TrackingError: the server does not answer, or refuses.
    """
    client = connect(uri)
    try:
        with scratch_directory() as directory:
            path = Path(directory, name)
            path.write_bytes(content)
            client.log_artifact(run_id, str(path))
    except (MlflowException, OSError) as error:
        raise TrackingError(f"{shown(uri)}: {name} cannot be recorded ({one_line(error)})") from None


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
