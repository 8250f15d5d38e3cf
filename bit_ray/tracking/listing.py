"""What is registered, without MLflow, whose import takes seconds: of an embedded store by reading its tables."""

import difflib
import logging
import re
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from bit_ray.errors import ModelError
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


class _Tables(NamedTuple):
    """What an embedded store knows of registered models."""

    names: list[str]
    versions: list[tuple[str, int, Any, str]]
    """Name, number, time of creation in milliseconds, and where MLflow's files of it are; deleted ones left out."""
    tags: dict[tuple[str, int], dict[str, str]]
    aliases: dict[tuple[str, int], list[str]]


def read_embedded(uri: str) -> list[ListedModel] | None:
    """Return all versions that bit_ray registered in an embedded store, by name, newest first.

    The tables are those of MLflow 3. None if the URI names no SQLite file, or anything in it is not as expected: then
    MLflow is to be asked, which also says what is wrong.
    """
    if (tables := _read_tables(uri)) is None:
        return None
    try:
        rows = [
            listed(name, number, tables.aliases, tables.tags.get((name, number), {}), created)
            for name, number, created, _ in tables.versions
        ]
    except (TypeError, ValueError, OverflowError):
        return None
    return in_order([row for row in rows if row is not None])


class Located(NamedTuple):
    """A version in an embedded store."""

    name: str
    version: int
    source: str
    """Folder of MLflow's files of it."""


def find_embedded(registry: str, uri: str) -> Located | None:
    """Return the version that ``models:/NAME@ALIAS`` and the like name; None where `read_embedded` has none.

    Raises:
        ModelError: the store has no such name, alias or version, or this is no name of a version.
    """
    name, _, _ = parsed(uri)
    if (tables := _read_tables(registry)) is None:
        return None
    if name not in tables.names:
        raise no_such_name(uri, tables.names)
    aliases = {alias: number for (of, number), known in tables.aliases.items() if of == name for alias in known}
    sources = {number: source for of, number, _, source in tables.versions if of == name}
    number = int(chosen(uri, aliases, list(sources)))
    return Located(name, number, sources[number]) if sources.get(number) else None


def parsed(uri: str) -> tuple[str, str | None, str | None]:
    """Return name, alias and version of ``models:/NAME@ALIAS``, ``models:/NAME/VERSION`` or ``models:/NAME``.

    Raises:
        ModelError: it is none of them.
    """
    match = re.fullmatch(r"models:/([^/:@]+)(?:@([^/@]+)|/([0-9]{1,18}))?", uri)
    if match is None:
        raise ModelError(f"{uri}: accepted: models:/NAME@ALIAS, models:/NAME/VERSION or models:/NAME; correct it")
    return match[1], match[2], match[3]


def chosen(uri: str, aliases: Mapping[str, Any], numbers: Sequence[Any]) -> str:
    """Return the number of the version that a URI names.

    Args:
        uri: As for `parsed`.
        aliases: Of its name, with their versions.
        numbers: Its versions; not needed for an alias.

    Raises:
        ModelError: there is no such version; it lists those that there are.
    """
    _, alias, number = parsed(uri)
    if alias is not None:
        if alias not in aliases:
            raise ModelError(f"{uri}: no such alias; {_choices(alias, list(aliases))}")
        return str(aliases[alias])
    known = sorted(map(str, numbers), key=int, reverse=True)
    if not known or (number is not None and str(int(number)) not in known):
        raise ModelError(f"{uri}: no such version; {_choices('', known)}")
    return known[0] if number is None else str(int(number))


def no_such_name(uri: str, names: Sequence[str]) -> ModelError:
    """The error that lists the names that there are."""
    return ModelError(f"{uri}: no model of that name; {_choices(parsed(uri)[0], names)}")


def _choices(given: str, known: Sequence[str]) -> str:
    if not known:
        return "there are none yet; register one first"
    nearest = difflib.get_close_matches(given, known, n=10, cutoff=0) if given else known[:10]
    more = f" and {len(known) - len(nearest)} more" if len(known) > len(nearest) else ""
    return f"accepted: {', '.join(nearest)}{more}; see bit-ray models list"


def _read_tables(uri: str) -> _Tables | None:
    if not uri.startswith("sqlite:"):
        return None
    try:
        with closing(sqlite3.connect(f"{sqlite_file(uri).as_uri()}?mode=ro", uri=True, timeout=5)) as connection:
            connection.execute("BEGIN")  # one state of all tables
            names, versions, tags, aliases = (
                connection.execute(f"SELECT {columns}, workspace FROM {table}").fetchall()
                for table, columns in (
                    ("registered_models", "name"),
                    (
                        "model_versions",
                        "name, version, creation_time, COALESCE(storage_location, source), current_stage",
                    ),
                    ("model_version_tags", "name, version, key, value"),
                    ("registered_model_aliases", "name, version, alias"),
                )
            )
    except sqlite3.Error:
        return None
    if any(row[-1] != _WORKSPACE for row in (*names, *versions, *tags, *aliases)):
        return None
    tags_of: dict[tuple[str, int], dict[str, str]] = {}
    for name, version, key, value, _ in tags:
        tags_of.setdefault((name, version), {})[key] = value
    aliases_of: dict[tuple[str, int], list[str]] = {}
    for name, version, alias, _ in aliases:
        aliases_of.setdefault((name, version), []).append(alias)
    try:
        kept = [
            (name, int(version), created, str(source or ""))
            for name, version, created, source, stage, _ in versions
            if stage != _DELETED
        ]
    except (TypeError, ValueError, OverflowError):
        return None
    return _Tables([name for name, _ in names], kept, tags_of, aliases_of)
