import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from bit_ray import store
from bit_ray.config_files import write_config
from bit_ray.errors import ConfigError
from bit_ray.locks import describe, locked, partial, remove_abandoned, whole
from bit_ray.models.zoo import create_model
from bit_ray.plots.style import save_figure
from bit_ray.tracking.config import TrackingConfig
from bit_ray.weights.npz import save_npz

HOLD = """
import sys
from pathlib import Path
from bit_ray.locks import locked, partial
place, kind = Path(sys.argv[1]), sys.argv[2]
with locked(place, "x", remedy="y") if kind == "lock" else partial(place, directory=kind == "directory") as made:
    if kind == "directory":
        (made / "half").write_text("half")
    print(made, flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(place: Path, kind: str = "lock", *more: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Another process that holds a lock or a partial file until its input ends, and what it printed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(place), kind, *more], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def test_a_second_process_is_told_who_holds_the_lock(tmp_path: Path) -> None:
    lock = tmp_path / "run" / ".lock"
    with holder(lock, "lock", "--uri", "s3://KEY:SEC/RET@bucket/x") as (process, _):
        with pytest.raises(ConfigError) as caught, locked(lock, "name: run is being trained", remedy="wait for it"):
            raise AssertionError("held twice")
        text = str(caught.value)
        assert re.fullmatch(
            rf"name: run is being trained by PID {process.pid} of \S+ on {re.escape(socket.gethostname())} since "
            rf"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d \S+ \(-c {re.escape(str(lock))} lock --uri s3://\*\*\*@bucket/x\); "
            "wait for it",
            text,
        )
        process.communicate()
    assert not lock.parent.exists()  # neither the lock nor the folder made for it is left


def test_a_lock_is_free_as_soon_as_its_holder_is_killed(tmp_path: Path) -> None:
    with holder(tmp_path / ".lock") as (process, _):
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with locked(tmp_path / ".lock", "x", remedy="y"):
            assert str(os.getpid()) in (tmp_path / ".lock").read_text()
    assert list(tmp_path.iterdir()) == []


def test_whoever_waits_gets_the_lock_when_it_is_given_back(tmp_path: Path) -> None:
    with holder(tmp_path / ".lock") as (process, _):
        before = time.monotonic()
        with pytest.raises(ConfigError, match=r"^busy by PID .* \(waited for 1 s\); do"):
            locked(tmp_path / ".lock", "busy", remedy="do", wait_s=1).__enter__()
        assert 1 <= time.monotonic() - before < 10
        assert process.stdin is not None
        process.stdin.close()
        with locked(tmp_path / ".lock", "busy", remedy="do", wait_s=60):
            assert (tmp_path / ".lock").exists()


def test_one_at_a_time_though_each_removes_the_lock_file_and_its_folder(tmp_path: Path) -> None:
    inside: list[int] = []
    most: list[int] = []

    def work() -> None:
        for _ in range(25):
            with locked(tmp_path / "folder" / ".lock", "x", remedy="y", wait_s=60):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.0005)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 150
    assert not (tmp_path / "folder" / ".lock").exists()


def test_what_is_in_the_folder_stays(tmp_path: Path) -> None:
    with locked(tmp_path / "a" / "b" / ".lock", "x", remedy="y"):
        (tmp_path / "a" / "kept").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "kept"]


def test_a_place_that_cannot_be_locked_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for path in (tmp_path / "file" / ".lock", tmp_path / "link"):
        with pytest.raises(ConfigError, match=rf"^{path}: cannot be written \(.+\); accepted: a writable folder"):
            locked(path, "x", remedy="y").__enter__()
    assert (tmp_path / "file").read_text() == "no folder"


@pytest.mark.parametrize(
    "record",
    [None, 3, [], {}, {"pid": 1}, dict.fromkeys(("pid", "host", "user", "command", "since"), "a\nb\x1b[2J" * 1000)],
)
def test_a_record_is_told_in_one_short_line_whatever_it_is(record: object) -> None:
    text = describe(record)
    assert text.isprintable()
    assert 0 < len(text) < 1100


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_a_killed_process_was_writing_is_removed_and_what_a_living_one_writes_is_not(
    tmp_path: Path, kind: str
) -> None:
    target = tmp_path / "target"
    pipe, foreign = tmp_path / f".pipe.{'0' * 32}.partial", tmp_path / ".kept.tar.partial"
    os.mkfifo(pipe)  # opening one to read it would wait for ever
    foreign.touch()
    with holder(target, kind) as (_, living):
        with holder(target, kind) as (killed, left):
            os.kill(killed.pid, signal.SIGKILL)
            killed.wait()
            assert Path(left).exists()
            remove_abandoned(tmp_path)
            assert not Path(left).exists()
        assert Path(living).exists()
        with partial(target) as mine:
            remove_abandoned(tmp_path)
            assert mine.exists()
            mine.write_text("whole")
            mine.rename(target)
    assert target.read_text() == "whole"
    remove_abandoned(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".kept.tar.partial", "target"]


def test_whoever_writes_the_same_again_removes_what_was_left_of_it(tmp_path: Path) -> None:
    left = [tmp_path / f".{name}.{'0' * 32}.partial" for name in ("target", "other")]
    for path in left:
        path.touch()
    with partial(tmp_path / "target"):
        assert [path.exists() for path in left] == [False, True]


def test_a_directory_that_another_process_removes_before_it_is_locked_is_made_again(tmp_path: Path) -> None:
    """By threads that do nothing but sweep: each directory is there for a moment before its maker holds it."""
    done = threading.Event()

    def sweep() -> None:
        while not done.is_set():
            remove_abandoned(tmp_path)

    threads = [threading.Thread(target=sweep) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(300):
            with partial(tmp_path / "target", directory=True) as made:
                assert made.is_dir()
    finally:
        done.set()
        for thread in threads:
            thread.join()


def test_nothing_is_left_of_a_partial_file_that_failed(tmp_path: Path) -> None:
    for directory in (False, True):
        with pytest.raises(RuntimeError), partial(tmp_path / "target", directory=directory):
            raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def save_small_npz(path: Path) -> None:
    save_npz(create_model("R1-1-1-1x0.5", 2), path)


def write_text(path: Path) -> None:
    with whole(path) as unfinished:
        unfinished.write_text("whole")


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.json", lambda path: write_config(TrackingConfig(), path)),
        ("a.bin", lambda path: store.write_bytes(path, b"whole")),
        ("a.npz", save_small_npz),
        ("a.txt", write_text),
        ("a.png", lambda path: save_figure(Figure(figsize=(1, 1)), path)),
    ],
)
def test_every_writer_removes_what_a_killed_one_has_left(
    tmp_path: Path, name: str, write: Callable[[Path], None]
) -> None:
    (tmp_path / f".{name}.{'0' * 32}.partial").write_bytes(b"half")
    write(tmp_path / name)
    assert os.listdir(tmp_path) == [name]
