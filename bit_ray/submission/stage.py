"""What a job is uploaded as: a folder with its own files, and one with this package as it is imported here.

Ray names an upload by a digest of its content, so what was sent before is not sent again. The package goes as a folder
and not as a wheel, whose name would stay the same when the code changes, and with its compiled decoder, which a plain
``--working-dir`` leaves behind since git ignores it.
"""

import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import bit_ray
from bit_ray.errors import ConfigError

MOST_BYTES = 100 * 2**20
"""Most bytes of an upload: what Ray's job server takes."""
_NUM_NAMED = 3
_BIT_RAY = ("python", "-m", "bit_ray.cli.main")
_SECRET_SUFFIXES = (".pem", ".key", ".p12", ".pfx")


@dataclass(frozen=True, kw_only=True)
class Staged:
    """Folders that are ready to be uploaded, and the command that runs there."""

    working_dir: Path
    """With the job's files."""
    package: Path
    """A copy of this package; its name is that of the package."""
    job: str
    """The job's file below ``working_dir``, or the name of a command."""
    settings: tuple[str, ...]
    """Of the job, with the paths that its files have there."""
    num_bytes: int
    """Of both folders, before they are packed."""

    @property
    def command(self) -> str:
        """The command that runs the job in ``working_dir``."""
        start = ("python", self.job) if self.job.endswith(".py") else (*_BIT_RAY, *self.job.split())
        return shlex.join((*start, *self.settings))

    @property
    def preflight(self) -> str:
        """The command that looks whether the job would run."""
        return shlex.join((*_BIT_RAY, "preflight", self.job, "--", *self.settings))


@contextmanager
def staged(job: str, settings: Sequence[str], *, extension: bool) -> Iterator[Staged]:
    """Copy what a job needs into two new folders, which are deleted at the end.

    Args:
        job: A file, whose folder goes with it; or the name of a command.
        settings: Of the job; a ``--config FILE`` goes along.
        extension: Whether the cluster's Python can load the compiled decoder.

    Raises:
        ConfigError: A file is missing, or all of it is larger than what Ray's job server takes.
    """
    with TemporaryDirectory(prefix="bit_ray-submit-") as folder:
        working_dir, package = Path(folder, "job"), Path(folder, "package", "bit_ray")
        working_dir.mkdir()
        arguments = _with_config(settings, working_dir / "configs")
        path = Path(job)
        if path.suffix == ".py":
            name = path.absolute().parent.name or "jobs"
            _copy(path.absolute().parent, working_dir / name)
            job = f"{name}/{path.name}"
        _copy(Path(bit_ray.__file__).parent, package, leave=() if extension else (".so",))
        yield Staged(
            working_dir=working_dir,
            package=package,
            job=job,
            settings=tuple(arguments),
            num_bytes=sum(map(_size, (working_dir, package))),
        )


def _with_config(settings: Sequence[str], folder: Path) -> list[str]:
    """Copy the files of ``--config`` into a folder; return the settings with their new paths."""
    changed = list(settings)
    for i, setting in enumerate(settings):
        if setting == "--config" and i + 1 < len(settings):
            place, path = i + 1, settings[i + 1]
        elif setting.startswith("--config="):
            place, path = i, setting.removeprefix("--config=")
        else:
            continue
        folder.mkdir(exist_ok=True)
        target = folder / Path(path).name
        try:
            shutil.copyfile(path, target)
        except OSError as error:
            raise ConfigError.of("config", f"{path}: {error.strerror}", "a JSON or YAML file", "correct it") from None
        changed[place] = f"{'--config=' if place == i else ''}configs/{target.name}"
    return changed


def _copy(source: Path, target: Path, leave: tuple[str, ...] = ()) -> None:
    """Copy a folder, without hidden files, byte code, C sources and what looks like a key.

    Raises:
        ConfigError: It is too large.
    """

    def left(name: str) -> bool:
        return (
            name.startswith(".")
            or name == "__pycache__"
            or name.endswith((".pyc", ".c", ".h", *_SECRET_SUFFIXES, *leave))
        )

    files: list[Path] = []
    sizes: dict[str, int] = {}
    total = 0
    for folder, folders, names in os.walk(source):
        folders[:] = sorted(name for name in folders if not left(name))
        for name in sorted(names):
            path = Path(folder, name)
            if left(name) or not path.is_file():
                continue
            relative = path.relative_to(source)
            files.append(relative)
            total += path.stat().st_size
            part = relative.parts[0]
            sizes[part] = sizes.get(part, 0) + path.stat().st_size
    if total > MOST_BYTES:
        largest = sorted(sizes, key=lambda part: -sizes[part])[:_NUM_NAMED]
        named = ", ".join(f"{part} ({sizes[part] / 2**20:,.1f} MiB)" for part in largest)
        raise ConfigError.of(
            "job",
            f"{source} has {total / 2**20:,.1f} MiB, most of it in {named}",
            f"at most {MOST_BYTES // 2**20} MiB in the folder of a job, all of which is uploaded",
            "move the job's file into a folder of its own, and data into a store",
        )
    for relative in files:
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / relative, target / relative)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
