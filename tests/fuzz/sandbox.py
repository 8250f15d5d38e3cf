"""Where inputs lie while they are tried, and beside them the files that nothing may touch."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from fuzz.mutate import CANARY

BOX = "box"
"""Has a folder for each input."""
SEEDS = "seeds"
"""What a kind makes its inputs from; nothing may touch it, either."""
_CANARIES = {"home/.bashrc": b"x", "home/cache/models/kept/x": b"x", "project/a.txt": b"x"}


class Sandbox:
    """The folder of one kind."""

    def __init__(self, folder: Path, canaries: Mapping[str, bytes]) -> None:
        self.folder, self.box, self.canary = folder, folder / BOX, folder / "canary"
        self._canaries = {**_CANARIES, **canaries}
        self.box.mkdir(exist_ok=True)
        home = self.canary / "home"
        os.environ |= {"HOME": str(home), "BIT_RAY_CACHE": str(home / "cache"), "TMPDIR": str(self.box)}
        self._build()

    def _build(self) -> None:
        shutil.rmtree(self.canary, ignore_errors=True)
        for name, data in self._canaries.items():
            (self.canary / name).parent.mkdir(parents=True, exist_ok=True)
            (self.canary / name).write_bytes(data)
        os.mkfifo(self.canary / "fifo")
        self._untouched = self._listed()

    def lay(self, number: int, files: Mapping[str, bytes | Path]) -> Path:
        """Write the files of an input into a folder of its own, where temporary ones go, too."""
        place = self.box / str(number)
        for name, data in files.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(data, Path):
                (place / name).symlink_to(data)
            else:
                (place / name).write_bytes(data.replace(CANARY.encode(), str(self.canary).encode()))
        tempfile.tempdir = str(place)
        os.chdir(self.box)
        return place

    def changed(self) -> list[str]:
        """What was created, changed or deleted outside the folders of inputs; it is put back."""
        if (found := self._listed()) == self._untouched:
            return []
        changed = sorted(path for path, _ in found.items() ^ self._untouched.items())
        for path in set(found) - set(self._untouched):
            shutil.rmtree(self.folder / path, ignore_errors=True)
            (self.folder / path).unlink(missing_ok=True)
        self._build()
        return changed

    def _listed(self) -> dict[str, tuple[int, int, int]]:
        """Path to mode, size and time of change."""
        found = {}
        pending = [entry for entry in os.scandir(self.folder) if entry.name not in (BOX, "log", "trace")]
        while pending:
            entry = pending.pop()
            status = entry.stat(follow_symlinks=False)
            directory = entry.is_dir(follow_symlinks=False)
            content = (0, 0) if directory else (status.st_size, status.st_mtime_ns)
            found[os.path.relpath(entry.path, self.folder)] = (status.st_mode, *content)
            if directory:
                pending += os.scandir(entry.path)
        return found
