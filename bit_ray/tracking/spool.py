"""A queue on disk: operations for MLflow survive an outage of the server and the end of the process."""

import json
import shutil
import threading
import uuid
from collections.abc import Iterable
from io import FileIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from bit_ray import store

SEGMENT_OPERATIONS = 1000

Operation = dict[str, Any]


class Spool:
    """Operations in the order in which they were made, as numbered JSONL segments in one directory.

    Every line has reached the operating system when ``append`` returns, so a killed process loses at most the line that
    it was writing. Segments are sent whole and then deleted. One that was sent but not yet deleted is sent again, so
    operations must be repeatable. One process at a time uses a directory.
    """

    def __init__(self, directory: Path):
        """Open the queue in ``directory``, which is made with the first operation; existing operations stay queued."""
        self.directory = directory
        self._lock = threading.Lock()
        self._file: FileIO | None = None
        self._room = 0

    def append(self, operation: Operation) -> None:
        """Add one JSON-able operation (NaN and infinities included).

        Raises:
            OSError: The disk refuses it.
        """
        line = json.dumps(operation).encode() + b"\n"
        with self._lock:
            if self._file is None or not self._room:
                self._start_segment()
            assert self._file is not None
            try:
                if self._file.write(line) != len(line):
                    raise OSError(f"{self._file.name}: only a part of a line could be written")
            except OSError:
                self._close_segment()  # the next line must not continue a torn one
                raise
            self._room -= 1

    def add_file(self, path: Path) -> str:
        """Copy a file or a directory into the queue and return its path there, for use in an operation."""
        relative = Path("files", uuid.uuid4().hex, path.name)
        target = self.directory / relative
        target.parent.mkdir(parents=True)
        if path.is_dir():
            shutil.copytree(path, target)
        else:
            shutil.copyfile(path, target)
        return relative.as_posix()

    def seal(self) -> list[Path]:
        """Return the segments to send, oldest first; the next operation starts a new one."""
        with self._lock:
            self._close_segment()
            return self.segments()

    def segments(self) -> list[Path]:
        """Return the segments that are on disk, oldest first."""
        return sorted(self.directory.glob("[0-9]*.jsonl"))

    def waiting(self) -> list[Operation]:
        """Return all operations that have not been sent."""
        return [operation for segment in self.segments() for operation in read_segment(segment)]

    def refuse(self, operations: Iterable[Operation], reason: str) -> None:
        """Move operations that the server will never accept to ``refused.jsonl``."""
        with open(self.directory / "refused.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps({**operation, "refused": reason}) + "\n" for operation in operations)

    def drop_file(self, relative: str) -> None:
        """Remove a copy made by ``add_file``."""
        shutil.rmtree((self.directory / relative).parent, ignore_errors=True)

    def remove_if_empty(self) -> None:
        """Remove the directory, unless it has waiting or refused operations."""
        if not self.seal() and not (self.directory / "refused.jsonl").exists():
            shutil.rmtree(self.directory, ignore_errors=True)

    def _start_segment(self) -> None:
        self._close_segment()
        self.directory.mkdir(parents=True, exist_ok=True)
        number = max((int(path.stem) for path in self.segments()), default=0) + 1
        self._file = FileIO(self.directory / f"{number:08d}.jsonl", "x")
        self._room = SEGMENT_OPERATIONS

    def _close_segment(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def read_segment(segment: Path) -> list[Operation]:
    """Return a segment's operations, without a line that was torn when the process ended or the disk was full."""
    operations = []
    for line in segment.read_bytes().splitlines():
        try:
            operations.append(json.loads(line))
        except ValueError:
            continue
    return operations


def spool_directory(storage: str, run_id: str) -> Path:
    """Return the folder of a run's queue: in its storage, or for remote storage in the cache of this machine."""
    return (local_path(storage) or store.cache_folder()) / "spool" / run_id


def local_path(uri: str) -> Path | None:
    """Return the absolute local path of a path or ``file://`` URI, and None for anything remote."""
    if uri.startswith("file:"):
        return Path(url2pathname(urlsplit(uri).path)).absolute()
    return None if "://" in uri else Path(uri).expanduser().absolute()
