"""What is registered, without MLflow, whose import takes seconds: of an embedded store by reading its tables."""

import logging
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime

from bit_ray.tracking.address import sqlite_file

log = logging.getLogger(__name__)

_WORKSPACE = "default"
_DELETED = "Deleted_Internal"  # stage of a version that is deleted; its row stays


@dataclass(frozen=True, kw_only=True)
class ListedModel:
    """One version in a listing of the registry; ``parent`` is the registered model or run that it was trained from."""

    name: str
    version: int
    aliases: tuple[str, ...]
    model: str
    num_classes: int
    num_bytes: int
    parent: str
    created: datetime
    weights_uri: str


def listed(
    name: str, version: int, aliases: Mapping[tuple[str, int], list[str]], tags: Mapping[str, str], created_ms: int
) -> ListedModel | None:
    """Return a version as it is listed; None if bit_ray did not register it, or its tags are damaged."""
    if "bit_ray.weights_uri" not in tags:
        return None
    try:
        return ListedModel(
            name=name,
            version=version,
            aliases=tuple(sorted(aliases.get((name, version), ()))),
            model=tags["bit_ray.model"],
            num_classes=int(tags["bit_ray.num_classes"]),
            num_bytes=int(tags["bit_ray.num_bytes"]),
            parent=tags.get("bit_ray.parent", ""),
            created=datetime.fromtimestamp(created_ms / 1000, UTC),
            weights_uri=tags["bit_ray.weights_uri"],
        )
    except (KeyError, ValueError) as error:
        log.warning("models:/%s/%s: left out, its tags are damaged: %s", name, version, error)
        return None


def in_order(rows: list[ListedModel]) -> list[ListedModel]:
    """Return versions by name, newest first."""
    return sorted(rows, key=lambda row: (row.name, -row.version))


def read_embedded(uri: str) -> list[ListedModel] | None:
    """Return all versions that bit_ray registered in an embedded store, by name, newest first.

    The tables are those of MLflow 3. None if the URI names no SQLite file, or anything in it is not as expected: then
    MLflow is to be asked, which also says what is wrong.
    """
    if not uri.startswith("sqlite:"):
        return None
    try:
        with closing(sqlite3.connect(f"{sqlite_file(uri).as_uri()}?mode=ro", uri=True, timeout=5)) as connection:
            connection.execute("BEGIN")  # one state of all tables
            versions, tags, aliases = (
                connection.execute(f"SELECT {columns}, workspace FROM {table}").fetchall()
                for table, columns in (
                    ("model_versions", "name, version, creation_time, current_stage"),
                    ("model_version_tags", "name, version, key, value"),
                    ("registered_model_aliases", "name, version, alias"),
                )
            )
    except sqlite3.Error:
        return None
    if any(row[-1] != _WORKSPACE for row in (*versions, *tags, *aliases)):
        return None
    tags_of: dict[tuple[str, int], dict[str, str]] = {}
    for name, version, key, value, _ in tags:
        tags_of.setdefault((name, version), {})[key] = value
    aliases_of: dict[tuple[str, int], list[str]] = {}
    for name, version, alias, _ in aliases:
        aliases_of.setdefault((name, version), []).append(alias)
    try:
        rows = [
            listed(name, int(version), aliases_of, tags_of.get((name, version), {}), created)
            for name, version, created, stage, _ in versions
            if stage != _DELETED
        ]
    except (TypeError, ValueError, OverflowError):
        return None
    return in_order([row for row in rows if row is not None])
