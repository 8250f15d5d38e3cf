"""Connection to MLflow: which server, whether it answers, and where the embedded default keeps its files."""

import logging
import os
import re
import socket
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

# Before MLflow is imported: by default it reports usage to its makers, prints links from any thread, and draws a
# progress bar for every file of a kilobyte.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request

from bit_ray.errors import BitRayError, TrackingError, connection_reason, one_line
from bit_ray.tracking.address import DATABASE_PORTS, sqlite_file
from bit_ray.tracking.embedded import prepare_store
from bit_ray.tracking.spool import local_path
from bit_ray.uris import shown

# The user need not read that the embedded store is created, nor the traceback of an error that is raised as well.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)

PROBE_SECONDS = 5.0


def connect(uri: str) -> MlflowClient:
    """Return a client of a server that answers now; fails after at most about 10 seconds.

    A missing SQLite file is made; see `bit_ray.tracking.embedded`.

    Raises:
        TrackingError: It cannot be reached, refuses the credentials, or is not an MLflow server.
        ConfigError: Other processes have been making the SQLite file for minutes.
    """
    probe(uri)
    try:
        if uri.startswith("sqlite:"):
            prepare_store(sqlite_file(uri))
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)  # this opens a database on a server and, if it is new, sets it up
    except BitRayError:
        raise
    except Exception as error:
        reason = one_line(error).partition(" [SQL:")[0]  # of a full disk or a foreign file; the rest is for developers
        given = f"{shown(uri)}: cannot be used ({reason})"
        raise TrackingError.of("tracking.uri", given, remedy="name another server or file") from None
    return client


def probe(uri: str) -> None:
    """Check that the server answers, once and without MLflow's minutes of retries.

    Raises:
        TrackingError: No answer came within seconds.
    """
    remedy = "start the server, correct tracking.uri, or unset it and MLFLOW_TRACKING_URI for a local file"
    parts = urlsplit(uri)
    try:
        if parts.scheme == "sqlite":
            sqlite_file(uri).parent.mkdir(parents=True, exist_ok=True)
        elif parts.scheme in ("http", "https"):
            # In a thread, because no timeout of a socket covers the look-up of a host name.
            _within(2 * PROBE_SECONDS, lambda: _probe_http(uri))
        else:
            address = (parts.hostname or "localhost", parts.port or DATABASE_PORTS[parts.scheme.split("+")[0]])
            _within(2 * PROBE_SECONDS, lambda: socket.create_connection(address, PROBE_SECONDS).close())
    except (OSError, MlflowException) as error:
        reason = connection_reason(error, PROBE_SECONDS) or one_line(error)
        given = f"{shown(uri)}: cannot be reached ({reason})"
        raise TrackingError.of("tracking.uri", given, remedy=remedy) from None


def experiment_id(client: MlflowClient, name: str, storage: str | None = None) -> str:
    """Return the id of the experiment of this name; it is made if there is none.

    Its artifacts go where the server says. Without a server they go next to the SQLite file, or into ``storage``, but
    never into a folder below the current directory, which is MLflow's own default.

    Raises:
        TrackingError: It was deleted, or cannot be made.
    """
    try:
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            location = _artifact_location(client.tracking_uri, name, storage)
            try:
                return str(client.create_experiment(name, artifact_location=location))
            except MlflowException:
                experiment = client.get_experiment_by_name(name)  # another process was first
                if experiment is None:
                    raise
    except Exception as error:
        given = f"{name!r}: {one_line(error)}"
        raise TrackingError.of("tracking.experiment", given, remedy="choose another name") from None
    if experiment.lifecycle_stage != "active":
        remedy = f"mlflow experiments restore --experiment-id {experiment.experiment_id}, or choose another name"
        given = f"{name!r} was deleted in {shown(client.tracking_uri)}"
        raise TrackingError.of("tracking.experiment", given, remedy=remedy)
    return str(experiment.experiment_id)


def _artifact_location(uri: str, experiment: str, storage: str | None) -> str | None:
    if uri.startswith("http"):
        return None
    folder = re.sub(r"[^\w.-]", "_", experiment)
    if uri.startswith("sqlite"):
        return (sqlite_file(uri).parent / "mlruns" / folder).as_uri()
    if storage is None:
        return None
    path = local_path(storage)
    return f"{storage.rstrip('/')}/mlruns/{folder}" if path is None else (path / "mlruns" / folder).as_uri()


def _probe_http(uri: str) -> None:
    path = "/api/2.0/mlflow/experiments/search"
    credentials = get_default_host_creds(uri)
    timeout = (PROBE_SECONDS, PROBE_SECONDS)
    query = {"max_results": 1}
    response = http_request(
        credentials, path, "GET", max_retries=0, timeout=timeout, raise_on_status=False, params=query
    )
    if response.status_code in (401, 403):
        remedy = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        given = f"{shown(uri)}: access refused (HTTP {response.status_code})"
        raise TrackingError.of("tracking.uri", given, remedy=remedy)
    if response.status_code != 200 or not response.text.lstrip().startswith("{"):
        answer = f"HTTP {response.status_code}, {response.headers.get('content-type', 'no content type')}"
        raise TrackingError.of("tracking.uri", f"{shown(uri)}: not the answer of an MLflow server ({answer})")


def _within(seconds: float, function: Callable[[], Any]) -> None:
    """Run the function; raise its exception, or TimeoutError if it does not end in time."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True, name="mlflow-probe")
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    if raised:
        raise raised[0]
