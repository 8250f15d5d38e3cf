"""What a registry says of a model, and the package that it leads to."""

import hashlib
import json
import os
import threading
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from fuzz.kind import Attempt, Case
from fuzz.mutate import Rng, chance, damaged, damaged_json, pick
from fuzz.seeds import is_digest, network, spec

from bit_ray.data import store
from bit_ray.models.package import DESCRIPTION_FILE, WEIGHTS_FILE, save_package
from bit_ray.tracking.fetch import fetch
from bit_ray.tracking.reference import parse_reference


class Kind:
    """``reference.json`` to a package in a folder or in an object store, and the package's ``model.json``."""

    cpu_s, memory = 8.0, 2**29

    def __init__(self, folder: Path) -> None:
        self.package = folder / "package"
        if not self.package.exists():
            save_package(self.package, network(), spec())
            self._shorten()
        self.data = (self.package / DESCRIPTION_FILE).read_bytes()
        digest = hashlib.sha256(self.data).hexdigest()
        weights_digest = json.loads(self.data)["weights"]["sha256"]
        self.reference = {
            "name": "x",
            "package_uri": "s3://bucket/package",
            "description_sha256": digest,
            "description": json.loads(self.data),
        }
        # Where a path would lead that is made of what a reference says instead of a digest.
        self.canaries = {f"victim-{digest[:8]}/work.txt": b"x", f"home/cache/models/victim-{digest[:8]}/a": b"x"}
        digests = ("0" * 64, "A" * 64, "0" * 63, f"{weights_digest}/x", f"{weights_digest}\n")
        self.words = {
            "sha256": (
                "@canary@/victim",
                "../../../canary/victim",
                "../../../canary/home/cache/models/victim",
                *digests,
            ),
            "description_sha256": (f"{digest[:8]}/../../../canary/project", *digests),
            "file": ("../model.safetensors", "@canary@/project/a.txt", "model.json", "."),
            "num_bytes": (0, -1, 2**63),
            "package_uri": (
                *("@canary@/victim", "file://@canary@/victim", "s3://bucket/hostile", "s3://bucket/../x", "s3://"),
                *("s3://key:secret@bucket/package", "s3://bucket/package?endpoint_override=127.0.0.1:9&scheme=http"),
                *("http://127.0.0.1:9/x", "ftp://x/y", "s3://bucket/package#x"),
            ),
            "name": ("../x", "a\nb"),
        }
        self.all_words = [word for words in self.words.values() for word in words]
        self.store = _Store(self.package)
        os.environ |= {
            "AWS_ENDPOINT_URL": self.store.url,
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def _shorten(self) -> None:
        """Put a few bytes in place of the weights, which nobody reads here."""
        (self.package / WEIGHTS_FILE).write_bytes(b"weights")
        description = json.loads((self.package / DESCRIPTION_FILE).read_bytes())
        description["weights"] |= {"num_bytes": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}
        (self.package / DESCRIPTION_FILE).write_text(json.dumps(description))

    def case(self, rng: Rng) -> Case:
        """Damage the reference, or the description that it leads to and vouches for."""
        reference, hostile = json.loads(json.dumps(self.reference)), self.data
        if chance(rng, 0.3):
            reference["package_uri"] = "@canary@/../seeds/package"
        if chance(rng, 0.2):
            hostile = damaged_json(rng, reference["description"], self.all_words)
            digest = hashlib.sha256(hostile).hexdigest()
            reference |= {"package_uri": "s3://bucket/hostile", "description_sha256": digest}
            with suppress(ValueError, RecursionError):
                reference["description"] = json.loads(hostile)
            data = json.dumps(reference).encode()
        elif chance(rng, 0.3):
            name = pick(rng, list(self.words))
            holder = reference if name in reference else reference["description"]["weights"]
            holder[name] = pick(rng, self.words[name])
            data = json.dumps(reference).encode()
        elif chance(rng, 0.2):
            data = damaged(rng, json.dumps(reference).encode())
        else:
            data = damaged_json(rng, reference, self.all_words)
        return Case({"reference.json": data, "hostile.json": hostile, "cache/kept": b"x"}, partial(self._fetch))

    def _fetch(self, place: Path, attempt: Attempt) -> None:
        self.store.hostile = (place / "hostile.json").read_bytes()
        reference = parse_reference((place / "reference.json").read_bytes())
        local = store.is_local(reference.weights_uri)
        bucket = urlsplit(reference.weights_uri).netloc
        assert local or "?" not in reference.weights_uri, "an address with a query"
        assert local or not {"@", ":"} & set(bucket), "an address with a user"
        directory = fetch(reference, place / "cache")
        for digest in (reference.sha256, reference.description_sha256):
            assert is_digest(digest), "no digest"
        assert local or directory.parent == place / "cache", "outside the cache"
        assert (directory / WEIGHTS_FILE).read_bytes() == b"weights", "other weights"


class _Store:
    """An object store on loopback with the package in ``bucket/package``, and with a hostile one beside it."""

    def __init__(self, package: Path) -> None:
        self.hostile = b""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer._answer(self, package)

            do_HEAD = do_GET

            def log_message(self, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()

    def _answer(self, request: BaseHTTPRequestHandler, package: Path) -> None:
        key = unquote(urlsplit(request.path).path)
        found: dict[str, bytes] = {"/bucket": b"", "/bucket/": b""}
        for folder in ("package", "hostile"):
            found[f"/bucket/{folder}/{DESCRIPTION_FILE}"] = (package / DESCRIPTION_FILE).read_bytes()
            found[f"/bucket/{folder}/{WEIGHTS_FILE}"] = (package / WEIGHTS_FILE).read_bytes()
        found[f"/bucket/hostile/{DESCRIPTION_FILE}"] = self.hostile
        body = found.get(key)
        status = 404 if body is None else 200
        body = b"<Error><Code>NoSuchKey</Code></Error>" if body is None else body
        total = len(body)
        if status == 200 and (wanted := request.headers.get("Range", "")).startswith("bytes="):
            first, last = wanted.removeprefix("bytes=").split("-")
            body, status = body[int(first) : int(last) + 1], 206
        request.send_response(status)
        request.send_header("Content-Length", str(len(body)))
        request.send_header("ETag", '"x"')
        request.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        if status == 206:
            request.send_header("Content-Range", f"bytes {first}-{int(first) + len(body) - 1}/{total}")
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)
