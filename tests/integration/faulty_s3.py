"""A proxy on loopback in front of a real S3 server that makes its answers go wrong, as those of a busy store do.

It knows nothing of S3 but the texts of its errors, and stands before the emulator of Google's store as well. Signatures
stay valid: the Host header goes on as the client signed it. Which request goes wrong is drawn by a seed.
"""

import asyncio
import multiprocessing
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from multiprocessing.managers import BaseManager
from typing import NamedTuple

import aiohttp
from aiohttp import web
from yarl import URL

HOST = "127.0.0.1"
NOT_PASSED_ON = {"connection", "keep-alive", "transfer-encoding", "te", "upgrade", "expect"}
CHUNK_BYTES = 2**16


@dataclass(frozen=True, kw_only=True)
class Faults:
    """Shares of requests that go wrong, each in one way; together at most 1."""

    slow_down: float = 0.0
    """503 SlowDown, any request."""
    internal_error: float = 0.0
    """500 InternalError, any request."""
    bad_gateway: float = 0.0
    """502, any request, which the client does not repeat by itself."""
    stall: float = 0.0
    """No byte for ``stall_s`` in the middle of the answer, any request."""
    reset: float = 0.0
    """A GET's connection is reset in the middle of the body."""
    cut: float = 0.0
    """A GET's connection is closed in the middle of the body."""
    short: float = 0.0
    """A GET's body is half of what was asked for, and its Content-Length says so too."""
    garble: float = 0.0
    """A GET's body has the right length and wrong bytes."""
    stall_s: float = 2.0
    expired: bool = False
    """The credentials have expired: every request is answered 403 ExpiredToken."""
    only: str = ""
    """Only requests go wrong whose method and path, as in ``GET /bucket/key``, hold this."""
    at_most: int = 2**31
    """As many of each kind, as `FaultyS3.counts` has them."""

    KINDS = ("slow_down", "internal_error", "bad_gateway", "stall", "reset", "cut", "short", "garble")


class Get(NamedTuple):
    """A GET that was answered whole."""

    path: str
    range: str
    num_bytes: int


class FaultyS3:
    """The proxy, in a thread of this process; assign ``faults`` at any time, from any thread."""

    def __init__(self, upstream: str, seed: int = 0) -> None:
        self.upstream = upstream
        self.faults = Faults()
        self.counts: Counter[str] = Counter()
        """Requests by method, and faults by kind."""
        self.gets: list[Get] = []
        self.endpoint = ""
        self._random = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="faulty-s3", daemon=True)
        self._started = threading.Event()
        self._stopped: asyncio.Event | None = None

    def start(self) -> None:
        self._thread.start()
        assert self._started.wait(20), "the proxy did not start"

    def stop(self) -> None:
        assert self._stopped is not None
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(20)

    def forget(self) -> None:
        """Count from zero."""
        self.counts, self.gets = Counter(), []

    def set(self, name: str, value: object) -> None:
        """Set an attribute, from another process."""
        setattr(self, name, value)

    def get(self, name: str) -> object:
        """Return an attribute, to another process."""
        return getattr(self, name)

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._stopped = asyncio.Event()
        app = web.Application(client_max_size=2**30)
        app.cleanup_ctx.append(self._session)
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await runner.setup()
        site = web.TCPSite(runner, HOST, 0)
        await site.start()
        self.endpoint = f"http://{HOST}:{runner.addresses[0][1]}"
        self._started.set()
        await self._stopped.wait()
        await runner.cleanup()

    async def _session(self, app: web.Application) -> AsyncIterator[None]:
        self._client = aiohttp.ClientSession(
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None),
            connector=aiohttp.TCPConnector(limit=0),
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        )
        yield
        await self._client.close()

    def _draw(self, request: web.Request) -> str | None:
        faults = self.faults
        if faults.only not in f"{request.method} {request.path}":
            return None
        if faults.expired:
            return "expired"
        number = self._random.random()
        for kind in Faults.KINDS:
            share = getattr(faults, kind)
            if number < share:
                fits = request.method == "GET" or kind in ("slow_down", "internal_error", "bad_gateway", "stall")
                return kind if fits and self.counts[kind] < faults.at_most else None
            number -= share
        return None

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.counts[request.method] += 1
        fault = self._draw(request)
        if fault:
            self.counts[fault] += 1
        if fault in ERRORS:
            await request.read()
            status, code = ERRORS[fault]
            body = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{fault}</Message></Error>'
            return web.Response(status=status, body=body.encode(), content_type="application/xml")
        async with self._client.request(
            request.method,
            URL(self.upstream + request.raw_path, encoded=True),
            headers=[(name, value) for name, value in request.headers.items() if name.lower() not in NOT_PASSED_ON],
            data=await request.read() if request.body_exists else None,
            allow_redirects=False,
        ) as answer:
            return await self._pass_on(request, answer, fault)

    async def _pass_on(
        self, request: web.Request, answer: aiohttp.ClientResponse, fault: str | None
    ) -> web.StreamResponse:
        response = web.StreamResponse(status=answer.status, reason=answer.reason)
        for name, value in answer.headers.items():
            if name.lower() not in NOT_PASSED_ON:
                response.headers.add(name, value)
        if request.method == "HEAD" or answer.status in (204, 304):
            if fault == "stall":
                await asyncio.sleep(self.faults.stall_s)
            await response.prepare(request)
            return response
        if "Content-Length" not in answer.headers:  # a long list of Google's emulator
            await response.prepare(request)
            await response.write(await answer.read())
            await response.write_eof()
            return response
        num_bytes = int(answer.headers["Content-Length"])
        stop = num_bytes // 2 if fault in ("reset", "cut", "short", "stall") else num_bytes
        if fault == "short":
            response.content_length = stop
        await response.prepare(request)
        sent = 0
        async for chunk in answer.content.iter_chunked(CHUNK_BYTES):
            if fault == "garble":
                chunk = bytes(len(chunk))
            if sent + len(chunk) > stop:
                await response.write(chunk[: stop - sent])
                if fault == "stall":
                    await asyncio.sleep(self.faults.stall_s)
                    chunk, sent, stop = chunk[stop - sent :], stop, num_bytes
                else:
                    break
            await response.write(chunk)
            sent += len(chunk)
        if fault in ("reset", "cut"):
            await asyncio.sleep(0.02)  # let what was written leave
            end_connection(request, reset=fault == "reset")
        else:
            await response.write_eof()
            if request.method == "GET" and answer.status in (200, 206) and fault in (None, "stall"):
                self.gets.append(Get(request.path, request.headers.get("Range", ""), num_bytes))
        return response


class Remote(BaseManager):
    """A process for a `FaultyS3`: pyarrow opens files of Google's store with this process's lock held."""


Remote.register("FaultyS3", FaultyS3, exposed=("start", "stop", "forget", "set", "get"))


class FaultyGoogle:
    """The same proxy in a process of its own."""

    def __init__(self, upstream: str) -> None:
        self._remote = Remote(ctx=multiprocessing.get_context("spawn"))
        self._remote.start()
        self._proxy = self._remote.FaultyS3(upstream)  # type: ignore[attr-defined]

    def start(self) -> None:
        self._proxy.start()
        self.endpoint = str(self._proxy.get("endpoint"))

    def stop(self) -> None:
        self._proxy.stop()
        self._remote.shutdown()

    def fail(self, faults: Faults) -> None:
        """Make answers go wrong from now on, and count from zero."""
        self._proxy.forget()
        self._proxy.set("faults", faults)

    @property
    def counts(self) -> Counter[str]:
        return self._proxy.get("counts")


ERRORS = {
    "slow_down": (503, "SlowDown"),
    "internal_error": (500, "InternalError"),
    "bad_gateway": (502, "BadGateway"),
    "expired": (403, "ExpiredToken"),
}


def end_connection(request: web.Request, *, reset: bool) -> None:
    """Close the client's connection, with RST or with FIN."""
    transport = request.transport
    if transport is not None:
        if reset:
            option = struct.pack("ii", 1, 0)
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)
            transport.abort()
        else:
            transport.close()
