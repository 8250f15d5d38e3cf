"""The embedded MLflow store under processes that start at once, are killed, or bring another version of MLflow."""

import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from forked import forked
from mlflow.store import db_migrations
from mlflow.store.db.utils import _get_latest_schema_revision
from mlflow.store.tracking.dbmodels.initial_models import Base as InitialBase
from sqlalchemy import create_engine

from bit_ray.errors import BitRayError, TrackingError
from bit_ray.locks import locked
from bit_ray.tracking import embedded
from bit_ray.tracking.server import connect, experiment_id

OLDER = "5b0e9adcef9c"


def open_stores(names: Connection) -> None:
    """In a process of its own: open each store whose file it is told, and say what is in it."""
    names.send("ready")
    while True:
        try:
            client = connect(f"sqlite:///{names.recv()}")
            experiment_id(client, f"of {os.getpid()}")  # gone if another process makes the file once more
            names.send(f"shared {experiment_id(client, 'shared')}")
        except EOFError:
            return
        except Exception as error:
            names.send(f"failed: {error}")


@contextmanager
def opener() -> Iterator[tuple[BaseProcess, Connection]]:
    """A process that has imported all it needs, and waits for names of stores to open."""
    here, there = Pipe()
    process = forked().Process(target=open_stores, args=(there,), daemon=True)
    process.start()
    there.close()
    try:
        assert here.recv() == "ready"
        yield process, here
    finally:
        process.kill()
        process.join()


def query(path: Path, sql: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(sql).fetchall()


def size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that is not changed."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    connect(f"sqlite:///{path}")
    return path


def test_processes_that_open_a_new_store_at_once_all_get_the_same_good_one(tmp_path: Path) -> None:
    num_processes, num_rounds = 4, 10
    with ExitStack() as stack:
        processes, openers = zip(*(stack.enter_context(opener()) for _ in range(num_processes)), strict=True)
        expected = [("Default",), *sorted((f"of {process.pid}",) for process in processes), ("shared",)]
        for number in range(num_rounds):
            folder = tmp_path / str(number)
            for names_of in openers:
                names_of.send(str(folder / "mlflow.db"))
            [answer] = {names_of.recv() for names_of in openers}
            assert answer.startswith("shared "), f"round {number}: {answer}"
            assert names(folder) == ["mlflow.db"]
            path = folder / "mlflow.db"
            assert query(path, "PRAGMA integrity_check") == [("ok",)]
            assert query(path, "SELECT version_num FROM alembic_version") == [(_get_latest_schema_revision(),)]
            assert query(path, "SELECT name FROM experiments ORDER BY name") == expected


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_a_process_that_is_killed_while_it_makes_the_store_leaves_nothing_in_the_way(
    tmp_path: Path, store: Path, share: float
) -> None:
    wanted = share * size(store)
    with opener() as (process, names_of):
        names_of.send(str(tmp_path / "mlflow.db"))
        deadline = time.monotonic() + 60
        while not any(size(path) >= wanted for path in tmp_path.rglob("*mlflow.db")):
            assert time.monotonic() < deadline
            assert process.is_alive()
        process.kill()
        process.join()
    assert not (tmp_path / "mlflow.db").exists()
    left = names(tmp_path)
    assert ".mlflow.db.lock" in left
    client = connect(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert experiment_id(client, "after") == "1"
    assert names(tmp_path) == ["mlflow.db"]


def test_who_waits_too_long_for_the_store_is_told_for_whom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "WAIT_S", 0.2)
    path = tmp_path / "mlflow.db"
    with locked(tmp_path / ".mlflow.db.lock", "x", remedy="y"), pytest.raises(BitRayError) as caught:
        connect(f"sqlite:///{path}")
    text = str(caught.value)
    assert text.startswith(f"tracking.uri: {path} is being set up by PID {os.getpid()} of ")
    assert text.endswith("(waited for 0 s); wait for it, or stop it")
    assert not path.exists()


def test_a_whole_store_is_opened_without_a_lock(tmp_path: Path, store: Path) -> None:
    path = shutil.copy(store, tmp_path / "mlflow.db")
    with locked(tmp_path / ".mlflow.db.lock", "x", remedy="y"):
        assert connect(f"sqlite:///{path}").get_experiment("0").name == "Default"


def make_older(path: Path) -> None:
    """A store as MLflow made it before it had workspaces, webhooks and more tables."""
    config = Config()
    config.set_main_option("script_location", db_migrations.__path__[0])
    config.set_main_option("sqlalchemy.url", f"sqlite:///{path}")
    engine = create_engine(f"sqlite:///{path}")
    InitialBase.metadata.create_all(engine)
    command.upgrade(config, OLDER)
    engine.dispose()


def test_an_older_store_is_not_changed_until_the_user_has_a_copy(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    make_older(path)
    before = path.read_bytes()
    with pytest.raises(TrackingError) as caught:
        connect(f"sqlite:///{path}")
    text = str(caught.value)
    assert text.startswith(f"tracking.uri: {path}: made by an older MLflow (schema {OLDER}, this one has ")
    assert "\n" not in text
    assert path.read_bytes() == before
    advice = text.split(" and upgrade it: ")[1]
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(advice, shell=True, check=True, timeout=120, env={**os.environ, "PATH": programs})
    assert Path(f"{path}.bak").read_bytes() == before
    assert connect(f"sqlite:///{path}").get_experiment("0").name == "Default"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("UPDATE alembic_version SET version_num = 'fffffff'", "made by a newer MLflow (schema fffffff); install"),
        (
            f"CREATE TABLE _alembic_tmp_tags (a); UPDATE alembic_version SET version_num = '{OLDER}'",
            "incomplete, as after an MLflow that was killed while it made the file; res",
        ),
        (
            "DELETE FROM alembic_version",
            "incomplete, as after an MLflow that was killed while it made the file; restore a",
        ),
    ],
)
def test_a_store_that_cannot_be_used_says_what_to_do(tmp_path: Path, store: Path, change: str, said: str) -> None:
    path = shutil.copy(store, tmp_path / "mlflow.db")
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(change)
    before = path.read_bytes()
    with pytest.raises(TrackingError) as caught:
        connect(f"sqlite:///{path}")
    assert str(caught.value).startswith(f"tracking.uri: {path}: {said}")
    assert path.read_bytes() == before


def test_a_file_that_is_no_database_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("notes, long enough to be taken for the header of a database file of SQLite" * 20)
    before = path.read_bytes()
    with pytest.raises(
        TrackingError, match=r"notes.txt: cannot be used \(file is not a database\); name a SQLite file"
    ):
        connect(f"sqlite:///{path}")
    assert path.read_bytes() == before
    assert names(tmp_path) == ["notes.txt"]
