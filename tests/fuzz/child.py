"""What a child process does: try one input after the other, saying which before it begins."""

import faulthandler
import importlib
import math
import os
import resource
import shutil
import signal
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from fuzz.kind import Attempt, Case, Kind
from fuzz.mutate import generator
from fuzz.report import cause_of, ours, record
from fuzz.sandbox import SEEDS, Sandbox

STATE = 7
"""Numbers that parent and child share, at these places: the input that is tried, and when it began in seconds of
computing and of the clock; seconds spent on all, inputs accepted and refused, most seconds of computing for one."""
NUMBER, CPU, WALL, SPENT, ACCEPTED, REFUSED, LIMIT = range(STATE)
_RESERVED = 2 * 2**30


def work(module: str, folder: Path, saved: Path, seed: int, seconds: float, numbers: Sequence[int], state: Any) -> None:
    """Try the inputs of these numbers until the seconds are spent."""
    log, trace = (os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_APPEND) for name in ("log", "trace"))
    for stream in (1, 2):
        os.dup2(log, stream)
    faulthandler.enable(trace)
    faulthandler.register(signal.SIGUSR1, trace)
    kind: Kind = importlib.import_module(module).Kind(folder / SEEDS)
    sandbox = Sandbox(folder, kind.canaries)
    state[LIMIT] = kind.cpu_s
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Allocators reserve more than they use, so the bound is on what is used; this one only keeps the machine alive.
    reserved = psutil.Process().memory_info().data + kind.memory + _RESERVED
    resource.setrlimit(resource.RLIMIT_DATA, (reserved, resource.RLIM_INFINITY))
    most = _peak() + kind.memory
    spent, start = state[SPENT], time.monotonic()
    for number in numbers:
        if state[SPENT] >= seconds:
            break
        for file in (log, trace):
            os.ftruncate(file, 0)
        state[CPU], state[WALL] = time.process_time(), time.monotonic()
        state[NUMBER] = number
        case = kind.case(generator(seed, number))
        place = sandbox.lay(number, case.files)
        attempt = Attempt()
        cause, message, text = _tried(case, place, attempt)
        if _peak() > most:
            most = math.inf  # it is said once: the peak does not go down again
            cause = cause or f"more than {kind.memory >> 20} MiB of memory"
        if time.process_time() - state[CPU] > kind.cpu_s:
            cause = cause or f"more than {kind.cpu_s:g} s of computing"
        if changed := sandbox.changed():
            cause, message = "something changed outside its folder", f"{', '.join(changed[:4])} {message}"
        if cause:
            record(saved, place, number, cause, message, text)
        else:
            state[REFUSED if attempt.refused else ACCEPTED] += 1
        state[SPENT] = spent + time.monotonic() - start
        shutil.rmtree(place, ignore_errors=True)
    os._exit(0)  # threads of libraries are not waited for


def _tried(case: Case, place: Path, attempt: Attempt) -> tuple[str, str, str]:
    """Try an input; return cause, message and trace of what went wrong, empty if nothing did."""
    try:
        attempt(case.check, place, attempt)
    except BaseException as error:
        name = type(error).__name__
        frames = [(frame.filename, frame.name) for frame in traceback.extract_tb(error.__traceback__)][::-1]
        # What a kind asserts says by itself what was found.
        cause = str(error) if name == "AssertionError" and not ours(frames) else cause_of(name, frames)
        return cause, f"{name}: {error}", "".join(traceback.format_exception(error))
    return "", "", ""


def _peak() -> float:
    """Most bytes of memory that this process has used so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
