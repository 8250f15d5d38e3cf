"""Run a command and print its wall time, CPU time, peak memory and exit status, over all processes it starts.

python benchmarks/measure.py python jobs/quickstart.py

Memory is the proportional set size (a page that n processes share counts 1/n in each), sampled every half second;
where the system does not tell it, the resident set size, which counts shared pages once per process.
"""

import ctypes
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

INTERVAL_S = 0.5
GB = 1e9
_PR_SET_CHILD_SUBREAPER = 36


def cpu_seconds(root: psutil.Process) -> float:
    """CPU seconds of a process, all its living descendants, and those of them that have ended and been waited for."""
    total = 0.0
    for process in [root, *root.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.Error:  # ended since it was listed
            continue
        total += times.user + times.system + getattr(times, "children_user", 0) + getattr(times, "children_system", 0)
    return total


def memory_bytes(process: psutil.Process) -> int:
    """Proportional set size of one process, or its resident set size; 0 when it has ended."""
    try:
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


def reap_orphans(me: psutil.Process, command_pid: int) -> None:
    """Wait for ended processes that have come to this one, so that their CPU time is counted."""
    for child in me.children():
        try:
            if child.pid != command_pid and child.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(child.pid, os.WNOHANG)
        except (psutil.Error, ChildProcessError):
            continue


def main(command: list[str]) -> int:
    if not command:
        print("usage: python benchmarks/measure.py COMMAND [ARGUMENT...]", file=sys.stderr)
        return 2
    if sys.platform == "linux":
        # Descendants that lose their parent, such as daemons, become children of this process instead of init's.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # The command gets Ctrl-C as well, and decides what comes of it.
    interrupt = signal.signal(signal.SIGINT, lambda *_: None)
    me = psutil.Process()
    peak, num_processes = 0, 0
    started = time.perf_counter()
    try:
        child = subprocess.Popen(command)
    except OSError as error:
        print(f"error: {command[0]}: {error.strerror}; accepted: a command; check the spelling", file=sys.stderr)
        return 127
    while True:
        try:
            status = child.wait(INTERVAL_S)
            break
        except subprocess.TimeoutExpired:
            reap_orphans(me, child.pid)
            found = me.children(recursive=True)
            peak = max(peak, sum(memory_bytes(process) for process in found))
            num_processes = max(num_processes, len(found))
    wall = time.perf_counter() - started
    signal.signal(signal.SIGINT, interrupt)
    reap_orphans(me, child.pid)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    living = me.children(recursive=True)
    cpu = ended.ru_utime + ended.ru_stime + sum(cpu_seconds(process) for process in me.children())
    print(
        f"wall {wall:.1f} s, CPU {cpu:.1f} s, peak memory {peak / GB:.2f} GB in up to {num_processes} processes, "
        f"exit status {status}" + (f", still running: {len(living)} processes" if living else "")
    )
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
