"""Where MLflow is, as a URI; MLflow itself is not needed to say it."""

import os
from pathlib import Path
from urllib.parse import urlsplit

from bit_ray.config import DEFAULT_STORAGE
from bit_ray.errors import TrackingError
from bit_ray.tracking.spool import local_path
from bit_ray.uris import MASK, shown

_ACCEPTED = "http(s)://HOST:PORT, sqlite:///FILE, postgresql://..., mysql://... or mssql://..."
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


def tracking_uri(uri: str, storage: str | None = None) -> str:
    """Return the tracking URI to use: the given one, else ``$MLFLOW_TRACKING_URI``, else SQLite in ``storage``.

    SQLite files get an absolute path, so that workers with another current directory use the same file.

    Raises:
        TrackingError: No URI and no local storage for the default, or a kind of URI that is not supported.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        folder = local_path(storage) if storage is not None else None
        if folder is None:
            given = f"empty, and the default, a SQLite file in the storage, needs a local folder, not {storage}"
            raise TrackingError.of("tracking.uri", given, _ACCEPTED, "set it, or MLFLOW_TRACKING_URI")
        return f"sqlite:///{folder / 'mlflow.db'}"
    if f"://{MASK}@" in uri:
        remedy = f"write them, or leave {MASK}@ out and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        raise TrackingError.of("tracking.uri", f"{uri} has no user and password", _ACCEPTED, remedy)
    try:
        parts = urlsplit(uri)
        _ = parts.port  # parsed only here
    except ValueError:
        remedy = (
            "write special characters of a password as %2F and the like, or set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD"
        )
        raise TrackingError.of("tracking.uri", f"{shown(uri)} is not a URI", _ACCEPTED, remedy) from None
    kind = parts.scheme.split("+")[0]
    if kind == "sqlite":
        return f"sqlite:///{sqlite_file(uri)}"
    if kind not in ("http", "https", *DATABASE_PORTS):
        raise TrackingError.of("tracking.uri", shown(uri), _ACCEPTED, "a folder of files cannot be used")
    return uri.rstrip("/")


def registry_uri(uri: str | None) -> str:
    """Return the URI of the registry: the given one, else ``$MLFLOW_TRACKING_URI``, else that of `DEFAULT_STORAGE`.

    Raises:
        TrackingError: as `recorded_uri`.
    """
    return recorded_uri(uri or "", DEFAULT_STORAGE)


def recorded_uri(uri: str, storage: str) -> str:
    """Return the tracking URI, as `tracking_uri`, of a store that is only read.

    Raises:
        TrackingError: It is a SQLite file that does not exist, which MLflow would make.
    """
    named = uri or os.environ.get("MLFLOW_TRACKING_URI")
    uri = tracking_uri(uri, storage)
    if uri.startswith("sqlite:") and not sqlite_file(uri).exists():
        given = f"{shown(uri)}: no such file" if named else f"empty, and there is no {storage}/mlflow.db"
        accepted = "the server, or sqlite:///FILE, that has the record"
        remedy = f"set MLFLOW_TRACKING_URI to it, or set the storage to the {DEFAULT_STORAGE} folder that has it"
        raise TrackingError.of("tracking.uri", given, accepted, remedy)
    return uri


def sqlite_file(uri: str) -> Path:
    """Return the absolute path of the file of a ``sqlite:///FILE`` URI."""
    return Path(uri.split(":///", 1)[1] if ":///" in uri else "").absolute()
