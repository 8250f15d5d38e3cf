"""Tries inputs of one kind in child processes, which may crash, hang or grow, and says what went wrong with which.

An input is a pure function of (seed, number), so any of them can be tried again alone. Each must end in a value or in
a `BitRayError` of one line, in bounded time and memory, and must leave alone whatever lies outside its own folder.
"""

import faulthandler
import importlib
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import psutil
from fuzz.mutate import CANARY, Rng, generator

import bit_ray
from bit_ray.errors import BitRayError

_PACKAGE = os.path.dirname(bit_ray.__file__)

IDLE_S = 20.0
"""Seconds without computing after which an input is said to wait for something that will not come."""
_MOST_CRASHES = 50
_RESERVED = 2 * 2**30
_NUMBER, _CPU, _WALL, _SPENT, _ACCEPTED, _REFUSED, _LIMIT = range(7)

# Imported once, in the process that the children are forked from; it has no threads of its own that compute.
_PRELOAD = ["bit_ray.evaluation.serving", "bit_ray.data.write", "bit_ray.training.config", "scipy.io", "torch._dynamo"]


class Attempt:
    """Calls what may refuse its input; a refusal must have one line."""

    def __init__(self) -> None:
        self.refused = False

    def __call__(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Return what the function returns, None where it refuses."""
        try:
            return function(*args, **options)
        except BitRayError as error:
            if len(str(error).splitlines()) != 1:
                raise NotOneLine(repr(str(error))).with_traceback(error.__traceback__) from None
            self.refused = True
            return None


class NotOneLine(Exception):
    """A refusal whose message has several lines, or none."""


class Case(NamedTuple):
    """One input."""

    files: Mapping[str, bytes | Path]
    """What it consists of, by path in its folder; a Path is linked."""
    check: Callable[[Path, Attempt], object]
    """Gives the folder to the code, and asserts what must hold of the results."""


class Kind(Protocol):
    """A module ``fuzz.kinds.NAME`` has a class ``Kind`` like this."""

    cpu_s: float
    """Most seconds of computing for one input."""
    memory: int
    """Most bytes that one input may make the process grow by."""
    canaries: Mapping[str, bytes]
    """Files that hostile inputs point at, by path below the canary folder."""

    def __init__(self, folder: Path) -> None:
        """Make valid inputs, in the folder if they are large, or find there what an earlier process made."""

    def case(self, rng: Rng) -> Case:
        """One damaged input."""


@dataclass
class Finding:
    """Inputs that went wrong in the same way."""

    first: int
    message: str
    files: str
    count: int = 0


@dataclass
class Report:
    """What became of the inputs of one kind."""

    kind: str
    seed: int
    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    findings: dict[str, Finding] = field(default_factory=dict)

    @property
    def tried(self) -> int:
        """Inputs in all."""
        return self.accepted + self.refused + sum(finding.count for finding in self.findings.values())

    def __str__(self) -> str:
        """Return what is to be done about it."""
        lines = [f"{self.kind}: {len(self.findings)} causes in {self.tried} inputs of seed {self.seed}"]
        for cause, finding in sorted(self.findings.items(), key=lambda item: -item[1].count):
            replay = f"pytest tests/fuzz --fuzz-seed {self.seed} --fuzz-input {self.kind}:{finding.first}"
            lines += [f"\n{cause}: {finding.count} inputs", f"  {finding.message}"]
            lines += [f"  again: {replay}", f"  files and trace: {finding.files}"]
        return "\n".join(lines)


def fuzz(module: str, saved: Path, *, seed: int, seconds: float, numbers: Sequence[int] = range(2**40)) -> Report:
    """Try inputs of the kind in a module until the seconds, or the numbers, are used up; keep those that went wrong."""
    # Each input has a folder of its own, and removing one takes milliseconds on some disks.
    memory = Path("/dev/shm")
    fast = memory.is_dir() and shutil.disk_usage(memory).free > 4 * 2**30
    with tempfile.TemporaryDirectory(prefix="bit-ray-fuzz-", dir=memory if fast else None) as folder:
        return _fuzz(module, Path(folder), saved, seed, seconds, numbers)


def _fuzz(module: str, folder: Path, saved: Path, seed: int, seconds: float, numbers: Sequence[int]) -> Report:
    report = Report(module.rpartition(".")[2], seed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    state = context.RawArray("d", 7)
    crashes = 0
    while True:
        state[_NUMBER] = -1
        arguments = module, folder, saved, seed, seconds, numbers, state
        child = context.Process(target=_work, args=arguments, daemon=True)
        child.start()
        cause = _watch(child, state)
        number = int(state[_NUMBER])
        if cause is None:
            break
        if number < 0:
            raise RuntimeError(f"{module}: {cause} before the first input: {(folder / 'log').read_text()}")
        trace = (folder / "trace").read_text(errors="replace")
        log = (folder / "log").read_text(errors="replace")
        cause = _cause(cause, _frames_of(trace))
        said = log.strip().rpartition("\n")[2]
        _record(saved, folder / "box" / str(number), number, cause, said, f"{trace}{log[-4000:]}")
        crashes += 1
        numbers = [n for n in numbers if n > number] if len(numbers) < 1000 else range(number + 1, numbers[-1] + 1)
        if not numbers or crashes == _MOST_CRASHES or state[_SPENT] >= seconds:
            break
    report.accepted, report.refused, report.seconds = int(state[_ACCEPTED]), int(state[_REFUSED]), state[_SPENT]
    for line in (saved / "findings").read_text().splitlines() if (saved / "findings").exists() else ():
        found = json.loads(line)
        known = report.findings.setdefault(found["cause"], Finding(found["number"], found["message"], found["files"]))
        known.count += 1
    return report


def _watch(child: Any, state: Any) -> str | None:
    """Wait for a child; None if it came to its end, else what it died of, or was killed for."""
    while child.exitcode is None:
        child.join(0.1)
        number, since, spent = state[_NUMBER], time.monotonic() - state[_WALL], -state[_CPU]
        try:
            spent += sum(psutil.Process(child.pid).cpu_times()[:2])
        except psutil.NoSuchProcess:
            continue
        if number < 0 or number != state[_NUMBER]:  # not begun, or done meanwhile
            continue
        busy = spent > state[_LIMIT]
        if busy or (since > IDLE_S and spent < 1.0):
            os.kill(child.pid, signal.SIGUSR1)  # it says where it is
            child.join(1.0)
            child.kill()
            child.join()
            state[_SPENT] += since
            return f"more than {state[_LIMIT]:g} s of computing" if busy else f"waits for more than {IDLE_S:g} s"
    if child.exitcode == 0:
        return None
    state[_SPENT] += time.monotonic() - state[_WALL]
    return signal.Signals(-child.exitcode).name if child.exitcode < 0 else f"exit status {child.exitcode}"


def _work(
    module: str, folder: Path, saved: Path, seed: int, seconds: float, numbers: Sequence[int], state: Any
) -> None:
    """Try inputs: what a child does."""
    log = os.open(folder / "log", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    trace = os.open(folder / "trace", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    faulthandler.enable(trace)
    faulthandler.register(signal.SIGUSR1, trace)
    box, canary = folder / "box", folder / "canary"
    os.environ |= {"HOME": str(canary / "home"), "BIT_RAY_CACHE": str(canary / "home/cache"), "TMPDIR": str(box)}
    seeds = folder / "seeds"
    kind: Kind = importlib.import_module(module).Kind(seeds)
    state[_LIMIT] = kind.cpu_s
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Allocators reserve more than they use, so the bound is on what is used; this one only keeps the machine alive.
    reserved = psutil.Process().memory_info().data + kind.memory + _RESERVED
    resource.setrlimit(resource.RLIMIT_DATA, (reserved, resource.RLIM_INFINITY))
    most = _peak() + kind.memory
    untouched = _build(canary, kind.canaries)
    spent, start = state[_SPENT], time.monotonic()
    for number in numbers:
        if state[_SPENT] >= seconds:
            break
        case = kind.case(generator(seed, number))
        place = box / str(number)
        tempfile.tempdir = str(place)
        _write(place, case.files, canary)
        os.chdir(box)
        os.ftruncate(log, 0)
        os.ftruncate(trace, 0)
        state[_CPU], state[_WALL] = time.process_time(), time.monotonic()
        state[_NUMBER] = number
        cause, message, trace_text, attempt = "", "", "", Attempt()
        try:
            attempt(case.check, place, attempt)
        except BaseException as error:
            frames = [(frame.filename, frame.name) for frame in traceback.extract_tb(error.__traceback__)]
            cause = _cause(type(error).__name__, frames[::-1])
            if type(error) is AssertionError and not _ours(frames):
                cause = str(error)  # of a check: says by itself what was found
            message, trace_text = f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error))
        if _peak() > most:
            most = math.inf  # it is said once: the peak does not go down again
            cause = cause or f"more than {kind.memory >> 20} MiB of memory"
        if (found := _listed(folder)) != untouched:
            changed = sorted(found.items() ^ untouched.items())
            cause, message = "something changed outside its folder", f"{[path for path, _ in changed][:4]} {message}"
            for path in {Path(path) for path, _ in changed} - {Path(path) for path in untouched}:
                shutil.rmtree(folder / path, ignore_errors=True)
            shutil.rmtree(canary, ignore_errors=True)
            untouched = _build(canary, kind.canaries)
        if cause:
            _record(saved, place, number, cause, message, trace_text)
        else:
            state[_REFUSED if attempt.refused else _ACCEPTED] += 1
        state[_SPENT] = spent + time.monotonic() - start
        shutil.rmtree(place, ignore_errors=True)
    os._exit(0)  # threads of libraries are not waited for


def _peak() -> float:
    """Most bytes of memory that this process has used so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def _write(place: Path, files: Mapping[str, bytes | Path], canary: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    for name, data in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(data, Path):
            (place / name).symlink_to(data)
        else:
            (place / name).write_bytes(data.replace(CANARY.encode(), str(canary).encode()))


def _build(canary: Path, extra: Mapping[str, bytes]) -> dict[str, tuple[int, int, int]]:
    """Make the files that nothing may touch; return what must be found of them and of the rest."""
    files = {"home/.bashrc": b"x", "home/cache/models/kept/x": b"x", "project/a.txt": b"x", **extra}
    for name, data in files.items():
        (canary / name).parent.mkdir(parents=True, exist_ok=True)
        (canary / name).write_bytes(data)
    if not (canary / "fifo").exists():
        os.mkfifo(canary / "fifo")
    return _listed(canary.parent)


def _listed(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What lies in the folder of a kind, but its working files: path to mode, size and time of change."""
    found = {}
    pending = [e for e in os.scandir(folder) if e.name not in ("box", "log", "trace")]
    while pending:
        entry = pending.pop()
        status = entry.stat(follow_symlinks=False)
        directory = entry.is_dir(follow_symlinks=False)
        size = (0, 0) if directory else (status.st_size, status.st_mtime_ns)
        found[os.path.relpath(entry.path, folder)] = (status.st_mode, *size)
        if directory:
            pending += os.scandir(entry.path)
    return found


def _record(saved: Path, place: Path, number: int, cause: str, message: str, trace: str) -> None:
    """Note what went wrong, and keep the files of the first input of its kind."""
    kept = saved / "".join(c if c.isalnum() else "-" for c in cause)[:80]
    if not kept.exists():
        shutil.copytree(place, kept) if place.exists() else kept.mkdir()
        (kept / "trace.txt").write_text(trace, errors="backslashreplace")
    found = {"cause": cause, "number": number, "message": message[:300], "files": str(kept)}
    with open(saved / "findings", "a") as file:
        file.write(json.dumps(found) + "\n")


def _frames_of(trace: str) -> list[tuple[str, str]]:
    """Files and functions in what faulthandler writes, the innermost first; of the thread that failed, if it says."""
    text = trace.partition("Current thread")[2] or trace
    lines = [line for line in text.split("\n\n")[0].splitlines() if line.startswith('  File "')]
    return [(line.split('"')[1], line.rpartition(" in ")[2]) for line in lines]


def _cause(what: str, frames: Sequence[tuple[str, str]]) -> str:
    """Name a failure by its kind and the innermost function of bit_ray that it came out of, or else of all."""
    for file, function in _ours(frames):
        return f"{what} in {os.path.relpath(file, _PACKAGE)} {function}"
    return f"{what} in {os.path.basename(frames[0][0])} {frames[0][1]}" if frames else what


def _ours(frames: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [frame for frame in frames if frame[0].startswith(f"{_PACKAGE}{os.sep}")]
