"""The embedded MLflow store, a SQLite file: if several processes open it, exactly one makes it, and none migrates it.

MLflow itself makes the tables in the opened file by running all of its migrations, which takes a second or two. Two
processes that do so at once, or one that is killed meanwhile, leave a file that cannot be used any more.
"""

import os
import sqlite3
from contextlib import closing
from functools import cache
from pathlib import Path

from bit_ray.errors import TrackingError
from bit_ray.locks import locked, partial

# Far longer than making the store takes on a busy machine.
WAIT_S = 120.0


def prepare_store(path: Path) -> None:
    """Make the store if there is none, completely or not at all, and make sure that this MLflow can use it.

    Raises:
        TrackingError: It belongs to another version of MLflow, or is incomplete; or it cannot be made.
        ConfigError: Another process has been making it for two minutes.
    """
    if not _holds_something(path):
        lock = path.with_name(f".{path.name}.lock")
        remedy = "wait for it, or stop it"
        with locked(lock, f"{path} is being set up", field="tracking.uri", remedy=remedy, wait_s=WAIT_S):
            if not _holds_something(path):
                _make(path)
    _check(path)


def _holds_something(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False


def _make(path: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with partial(path, directory=True) as folder:  # a directory, as SQLite has a second file next to the first
        store = SqlAlchemyStore(f"sqlite:///{folder / path.name}", str(path.parent / "mlruns"))
        store.engine.dispose()
        os.replace(folder / path.name, path)


def _check(path: Path) -> None:
    """Read the schema's revision; MLflow would migrate some older stores without asking, and refuse others."""
    given = f"tracking.uri: {path}"
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=20)) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            revision = ""
            if "alembic_version" in tables:
                revision = next((row[0] for row in connection.execute("SELECT version_num FROM alembic_version")), "")
    except sqlite3.Error as error:
        raise TrackingError(f"{given}: cannot be used ({error}); name a SQLite file of MLflow, or a new one") from None
    head, known = _revisions()
    if revision == head:
        return
    if not revision or any(name.startswith("_alembic_tmp_") for name in tables):
        raise TrackingError(
            f"{given}: incomplete, as after an MLflow that was killed while it made the file; restore a copy of it, or "
            "move it away to begin a new one"
        )
    if revision not in known:
        raise TrackingError(
            f"{given}: made by a newer MLflow (schema {revision}); install that version, or name another file"
        )
    raise TrackingError(
        f"{given}: made by an older MLflow (schema {revision}, this one has {head}); stop what uses it, copy it, and "
        f"upgrade it: cp {path} {path}.bak && mlflow db upgrade sqlite:///{path}"
    )


@cache
def _revisions() -> tuple[str, frozenset[str]]:
    """Return the revision of the schema that the installed MLflow uses, and all that it knows."""
    from alembic.script import ScriptDirectory
    from mlflow.store import db_migrations

    script = ScriptDirectory(str(Path(db_migrations.__path__[0])))
    head = script.get_current_head()
    assert head is not None
    return head, frozenset(revision.revision for revision in script.walk_revisions())
