"""What cannot work on a cluster, or must not be sent there, found in the settings alone."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bit_ray.config import to_dict
from bit_ray.data.sources.published.names import is_named
from bit_ray.data.sources.vtab.splits import is_vtab
from bit_ray.errors import ConfigError
from bit_ray.uris import shown

_WRITTEN = ("storage", "output")
_PLACES = (*_WRITTEN, "shards", "test_shards", "val_shards", "data_dir", "index", "images")
"""Settings that are always a folder or a URI."""
_PERHAPS_PLACES = ("init", "model", "labels", "run", "source", "directory", "tasks")
"""Settings that may also be a name."""


def check_secrets(config: Any) -> None:
    """Refuse a password or a key in the settings: Ray shows a job's command to everyone on the cluster.

    Raises:
        ConfigError: There is one.
    """
    for name, value in _leaves(to_dict(config)):
        if (masked := shown(value)) != value:
            remedy = (
                "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD where the cluster starts, or name a "
                "store that a role of the machine opens"
            )
            accepted = "nothing secret, as everyone on the cluster can read the command"
            raise ConfigError.of(name, f"{masked} holds a password or a key", accepted, remedy)


def check_places(config: Any) -> None:
    """Refuse paths that can only be meant on this machine: relative ones.

    An absolute path may be on a file system that all nodes share, which the preflight finds out.

    Raises:
        ConfigError: A path is relative.
    """
    source = getattr(config, "source", None)
    for name, value in _leaves(to_dict(config)):
        field = name.rpartition(".")[2]
        if field == "data_dir" and source is not None and not (is_named(source) or is_vtab(source)):
            continue  # nothing reads it
        path = value.removeprefix("file://")
        if not value or "://" in path or path.startswith("models:/") or os.path.isabs(path):
            continue
        if field in _PLACES or (field in _PERHAPS_PLACES and Path(path).exists()):
            raise ConfigError.of(
                name,
                f"{value} is a path on this machine",
                "s3://..., gs://..., or an absolute path that all nodes share",
                "name such a place" if field in _WRITTEN else "copy it there, and name that place",
            )


def local_places(config: Any) -> list[tuple[str, str]]:
    """Return the name and value of the settings that are absolute paths of what is read."""
    found = []
    for name, value in _leaves(to_dict(config)):
        field = name.rpartition(".")[2]
        if field in (*_PLACES, *_PERHAPS_PLACES) and field not in (*_WRITTEN, "directory"):
            path = value.removeprefix("file://")
            if os.path.isabs(path):
                found.append((name, path))
    return found


def _leaves(data: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted name and value of every text in plain data."""
    if isinstance(data, str):
        yield prefix, data
    elif isinstance(data, dict):
        for name, value in data.items():
            yield from _leaves(value, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(data, list | tuple):
        for value in data:
            name, equals, given = value.partition("=") if prefix == "set" and isinstance(value, str) else ("", "", "")
            yield from _leaves(given, f"set.{name.replace('-', '_')}") if equals else _leaves(value, prefix)
