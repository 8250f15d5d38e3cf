"""The metadata service of a cloud's machines, as far as it says that a spot machine will be taken away."""

import http.server
import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest


class Metadata(http.server.ThreadingHTTPServer):
    """Answers as AWS's service (IMDSv2 only) and as Google's; `aws` and `gcp` are what they say."""

    aws: bytes | None = None
    gcp = "FALSE"
    num_asked = 0
    fails = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Metadata

    def do_PUT(self) -> None:
        wanted = self.path == "/latest/api/token" and self.headers.get("X-aws-ec2-metadata-token-ttl-seconds")
        self.answer(200 if wanted else 400, b"a-token")

    def do_GET(self) -> None:
        self.server.num_asked += 1
        if self.server.fails:
            self.answer(503, b"")
        elif self.path == "/latest/meta-data/spot/instance-action":
            if self.headers.get("X-aws-ec2-metadata-token") != "a-token":
                self.answer(401, b"")
            else:
                self.answer(404 if self.server.aws is None else 200, self.server.aws or b"")
        elif self.path == "/computeMetadata/v1/instance/preempted":
            self.answer(200 if self.headers.get("Metadata-Flavor") == "Google" else 403, self.server.gcp.encode())
        else:
            self.answer(404, b"")

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def metadata() -> Iterator[Metadata]:
    with Metadata(("127.0.0.1", 0), Handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield web
        web.shutdown()


def notice(seconds: float) -> bytes:
    """Return AWS's notice of a machine's end in so many seconds."""
    end = datetime.now(UTC) + timedelta(seconds=seconds)
    return json.dumps({"action": "terminate", "time": end.strftime("%Y-%m-%dT%H:%M:%SZ")}).encode()
