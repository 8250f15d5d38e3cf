"""Tries inputs of one kind in child processes, which may crash, hang or grow, and says what went wrong with which.

An input is a pure function of (seed, number), so any of them can be tried again alone. Each must end in a value or in
a `BitRayError` of one line, in bounded time and memory, and must leave alone whatever lies outside its own folder.
"""

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from forked import forked
from fuzz.child import ACCEPTED, CPU, LIMIT, NUMBER, REFUSED, SPENT, STATE, WALL, work
from fuzz.report import Report, cause_of, findings, native_frames, record
from fuzz.sandbox import BOX

IDLE_S = 20.0
"""Seconds without computing after which an input is said to wait for something that will not come."""
ALL = range(2**40)
_MOST_CRASHES = 50


def fuzz(module: str, saved: Path, *, seed: int, seconds: float, numbers: Sequence[int] = ALL) -> Report:
    """Try inputs of the kind in a module until the seconds, or the numbers, are used up; keep those that went wrong."""
    # Each input has a folder of its own, and removing one takes milliseconds on some disks.
    memory = Path("/dev/shm")
    fast = memory.is_dir() and shutil.disk_usage(memory).free > 4 * 2**30
    context = forked()
    state = context.RawArray("d", STATE)
    with tempfile.TemporaryDirectory(prefix="bit-ray-fuzz-", dir=memory if fast else None) as name:
        folder = Path(name)
        for _ in range(_MOST_CRASHES):
            state[NUMBER] = -1
            arguments = module, folder, saved, seed, seconds, numbers, state
            child = context.Process(target=work, args=arguments, daemon=True)
            child.start()
            ended = _watch(child, state)
            if ended is None:
                break
            end, number = ended
            if number != state[NUMBER]:  # it came to an end just before the child was killed, in the one after it
                numbers = numbers[numbers.index(int(state[NUMBER])) :]
                continue
            trace, log = ((folder / file).read_text(errors="replace") for file in ("trace", "log"))
            if number < 0:
                raise RuntimeError(f"{module}: {end} before the first input: {log}")
            said = log.strip().rpartition("\n")[2]
            cause = cause_of(end, native_frames(trace))
            record(saved, folder / BOX / str(number), number, cause, said, f"{trace}{log[-4000:]}")
            numbers = numbers[numbers.index(number) + 1 :]
    kind = module.rpartition(".")[2]
    return Report(kind, seed, int(state[ACCEPTED]), int(state[REFUSED]), findings(saved))


def _watch(child: Any, state: Any) -> tuple[str, int] | None:
    """Wait for a child; None if it came to its end, else what it died of, or was killed for, and at which input."""
    while child.exitcode is None:
        child.join(0.1)
        number, since, spent = state[NUMBER], time.monotonic() - state[WALL], -state[CPU]
        try:
            spent += sum(psutil.Process(child.pid).cpu_times()[:2])
        except psutil.NoSuchProcess:
            continue
        if number < 0 or number != state[NUMBER]:  # not begun, or done meanwhile
            continue
        busy = spent > state[LIMIT]
        if busy or (since > IDLE_S and spent < 1.0):
            os.kill(child.pid, signal.SIGUSR1)  # it says where it is
            child.join(1.0)
            child.kill()
            child.join()
            state[SPENT] += since
            why = f"more than {state[LIMIT]:g} s of computing" if busy else f"waits for more than {IDLE_S:g} s"
            return why, int(number)
    if child.exitcode == 0:
        return None
    state[SPENT] += time.monotonic() - state[WALL]
    code = child.exitcode
    return signal.Signals(-code).name if code < 0 else f"exit status {code}", int(state[NUMBER])
