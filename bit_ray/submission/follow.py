"""Follow a job to its end over connections that drop: every character of its log once, and its exit status."""

import asyncio
import re
import sys
import time

import aiohttp
from ray.job_submission import JobDetails, JobStatus

from bit_ray.progress import console
from bit_ray.submission.server import JobServer, UnreachableError, token_header

STOPPED_STATUS = 143
"""Exit status of a job that was stopped: Ray ends it with SIGTERM, and does not record with what it ended."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 15.0
_GIVE_UP_S = 600.0
# After so long without a line the connection counts as dropped, as a middlebox may have forgotten it without a word.
_SILENT_S = 60.0
_CLOSE = aiohttp.ClientWSTimeout(ws_close=0.1)
_OF_RAY = re.compile(r"Running entrypoint for job |\d{4}-\d\d-\d\d [\d:,]+\t(INFO|WARNING) |\((\w+ )?pid=")


class Follower:
    """Prints a job's log. Ray has no offset into a log, so what was printed is skipped when it is read again."""

    def __init__(self, server: JobServer, job: str, *, quiet: bool = False) -> None:
        """Prepare to follow a job by its id; quiet: without the lines of Ray's own."""
        self._server, self._job, self._quiet = server, job, quiet
        self._printed = 0
        """Characters of the log."""

    def follow(self) -> int:
        """Print the log until the job has ended; return its exit status.

        Raises:
            BitRayError: The server has not answered for ten minutes, or refuses.
        """
        pause, answered_at, lost = _FIRST_PAUSE_S, time.monotonic(), False
        ended: JobDetails | None = None
        while True:
            before = self._printed
            try:
                details = self._server.get_job_info(self._job)
                answered_at = time.monotonic() if ended is None else answered_at
                if details.status.is_terminal():
                    ended = details
                    self._show(self._server.get_job_logs(self._job), from_start=True)
                    return self._status(details)
                if lost:
                    print(f"bit-ray: connected again to {self._server.given}", file=sys.stderr)
                    lost = False
                if details.status == JobStatus.RUNNING:
                    asyncio.run(self._tail())
            except UnreachableError as error:
                silent_s = time.monotonic() - answered_at
                if ended is not None and silent_s > _SILENT_S:  # the node of its driver may be gone
                    print(f"bit-ray: the end of the log cannot be read: {error}", file=sys.stderr)
                    return self._status(ended)
                if silent_s > _GIVE_UP_S:
                    raise
                if not lost:
                    print(f"bit-ray: {error}; the job goes on, trying again", file=sys.stderr)
                    lost = True
            pause = _FIRST_PAUSE_S if self._printed > before else min(2 * pause, _LONGEST_PAUSE_S if lost else 2.0)
            time.sleep(pause)

    async def _tail(self) -> None:
        """Print the log as it grows, until the connection ends for whatever reason."""
        address = f"{self._server.given}/api/jobs/{self._job}/logs/tail"
        seen = 0
        try:
            async with (
                aiohttp.ClientSession(headers=token_header()) as session,
                # Ray's server does not answer when a connection is closed.
                session.ws_connect(address, max_msg_size=0, timeout=_CLOSE) as socket,
            ):
                while True:
                    # Not `wait_for`: in Python 3.11 a Ctrl-C is lost in it when the next message is there already.
                    async with asyncio.timeout(_SILENT_S):
                        message = await socket.receive()
                    if message.type != aiohttp.WSMsgType.TEXT:
                        return
                    start = max(0, self._printed - seen)
                    seen += len(message.data)
                    self._show(message.data[start:])
        except (aiohttp.ClientError, TimeoutError, OSError):
            return

    def _show(self, text: str, *, from_start: bool = False) -> None:
        new = text[self._printed :] if from_start else text
        self._printed += len(new)
        if self._quiet:
            new = "".join(line for line in new.splitlines(keepends=True) if not _OF_RAY.match(line))
        sys.stdout.write(new)
        sys.stdout.flush()

    def _status(self, details: JobDetails) -> int:
        if details.status == JobStatus.STOPPED:
            console.print(f"{self._job} was stopped")
            return STOPPED_STATUS
        if details.status == JobStatus.SUCCEEDED:
            return 0
        if details.driver_exit_code is None:  # it did not get as far as its command
            reason = (details.message or "no reason").strip().splitlines()
            print(f"error: {self._job} failed: {' '.join(reason[-1:])[:500]}", file=sys.stderr)
        return details.driver_exit_code or 1
