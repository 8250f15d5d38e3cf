import asyncio
import signal
import threading
import time
from collections.abc import Iterator

import pytest
from aiohttp import web

from bit_ray.submission.follow import Follower
from bit_ray.submission.server import JobServer

LINES = [f"{number}\n" for number in range(20)]


class Server:
    """A job server with one job, whose lines come all at once, as from a slow machine; it ends two seconds later."""

    def __init__(self) -> None:
        self._status = "RUNNING"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        app = web.Application()
        app.add_routes([web.get("/api/version", self.version), web.get("/api/jobs/a", self.job)])
        app.add_routes([web.get("/api/jobs/a/logs/tail", self.tail), web.get("/api/jobs/a/logs", self.logs)])
        self._runner = web.AppRunner(app)

    def __enter__(self) -> str:
        self._loop.run_until_complete(self._runner.setup())
        self._loop.run_until_complete(web.TCPSite(self._runner, "127.0.0.1", 0).start())
        self._thread.start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._runner.cleanup())
        self._loop.close()

    async def version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""})

    async def job(self, _: web.Request) -> web.Response:
        return web.json_response({"type": "SUBMISSION", "submission_id": "a", "status": self._status, "entrypoint": ""})

    async def logs(self, _: web.Request) -> web.Response:
        return web.json_response({"logs": "".join(LINES)})

    async def tail(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        for line in LINES:
            await socket.send_str(line)
        await asyncio.sleep(2)
        self._status = "SUCCEEDED"
        return socket


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    with Server() as address:
        yield address


def test_ctrl_c_is_heard_between_lines_that_came_together(
    address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    follower = Follower(JobServer(address), "a")
    show, num_shown = follower._show, 0

    def interrupted(text: str, **options: bool) -> None:
        nonlocal num_shown
        show(text, **options)
        num_shown += 1
        if num_shown == 1:
            time.sleep(0.3)  # the others arrive meanwhile
        elif num_shown == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(follower, "_show", interrupted)
    with pytest.raises(KeyboardInterrupt):
        follower.follow()
    assert capsys.readouterr().out.startswith("0\n1\n")
