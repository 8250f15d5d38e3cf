"""An object store on loopback, with as much of S3 as it takes to read."""

import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class ObjectStore:
    """Objects in the bucket ``bucket``; whoever makes one has its ``s3://`` URIs answered by it."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        """By key."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer._answer(self)

            do_HEAD = do_GET

            def log_message(self, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        bucket, _, key = unquote(urlsplit(request.path).path).removeprefix("/").partition("/")
        body = self.objects.get(key) if key else b""
        status, body = (404, b"<Error><Code>NoSuchKey</Code></Error>") if body is None else (200, body)
        headers = {"ETag": '"x"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
        wanted = request.headers.get("Range", "")
        if status == 200 and wanted.startswith("bytes="):
            first, last = wanted.removeprefix("bytes=").split("-")
            part = body[int(first) : int(last or len(body)) + 1]
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(body)}"
            status, body = (206, part) if part else (416, b"<Error><Code>InvalidRange</Code></Error>")
        request.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)
