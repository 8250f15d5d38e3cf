"""Weights by name, from servers on this machine that speak as the authors' bucket and the Hugging Face Hub do."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from bit_ray.cli.main import main
from bit_ray.errors import ModelError
from bit_ray.inference.classifier import load_model
from bit_ray.models.zoo import create_model
from bit_ray.training.initial_weights import read_init
from bit_ray.weights.known import fetch_by_name, known_weights
from bit_ray.weights.package import ModelSpec
from bit_ray.weights.write import write_weights

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = "R1-1-1-1x0.5"


class Server(ThreadingHTTPServer):
    """Serves ``files``; counts what is asked, and fails as it is told."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.asked = {}, []
        self.cut_after, self.lie = None, False
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = self.path.partition("?")[0]
        self.server.asked.append((self.command, path, self.headers.get("Range")))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+|/tree/[^/]+)?", path):
            names = [name.split(f"{match[1]}/", 1)[1] for name in self.server.files if name.startswith(f"{match[1]}/")]
            if not names:
                return self.send(
                    404, json.dumps({"error": "Repository not found"}).encode(), body, {"X-Error-Code": "RepoNotFound"}
                )
            if "/tree/" in path:
                tree = [{"type": "file", "path": n, "size": 1, "oid": "0" * 40} for n in names]
                return self.send(200, json.dumps(tree).encode(), body)
            about = {"id": match[1], "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            return self.send(200, json.dumps(about).encode(), body)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            data = self.server.files.get(f"{match[1]}/{match[2]}")
            if data is None:
                return self.send(404, b"", body, {"X-Error-Code": "EntryNotFound"})
            digest = hashlib.sha256(data).hexdigest()
            if self.server.lie and match[2].endswith(".safetensors"):
                digest = "0" * 64
            headers = {
                "ETag": f'"{digest}"',
                "X-Linked-ETag": f'"{digest}"',
                "X-Linked-Size": str(len(data)),
                "X-Repo-Commit": COMMIT,
                "Accept-Ranges": "bytes",
            }
            return self.send(200, data, body, headers)
        data = self.server.files.get(path.strip("/"))
        if data is None:
            return self.send(404, b"", body)
        md5 = hashlib.md5(b"other" if self.server.lie else data).digest()
        headers = {"x-goog-hash": f"crc32c=AAAAAA==,md5={base64.b64encode(md5).decode()}"}
        return self.send(200, data, body, headers)

    def send(self, status, data, body, headers=None):
        start = 0
        if status == 200 and (asked := self.headers.get("Range")):
            start = int(re.match(r"bytes=(\d+)-", asked)[1])
            status = 206 if start < len(data) else 416
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        data = data[start:] if status in (200, 206) else b"" if status == 416 else data
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            cut = self.server.cut_after
            self.wfile.write(data if cut is None else data[:cut])
            if cut is not None:
                self.close_connection = True


@pytest.fixture
def server(tmp_path, monkeypatch):
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("BIT_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("BIT_RAY_WEIGHTS_URL", server.url)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    yield server
    server.shutdown()
    server.server_close()


def test_the_names_are_those_of_the_published_files_with_their_sizes():
    weights = {each.name: each for each in known_weights()}
    assert len(weights) == 18
    assert weights["bit_m_r50x1"].url == "https://storage.googleapis.com/bit_models/BiT-M-R50x1.npz"
    assert weights["bit_m_r152x4_ilsvrc2012"].file == "BiT-M-R152x4-ILSVRC2012.npz"
    assert weights["bit_m_r50x1"].num_classes == 21843
    for each in weights.values():
        if each.name.startswith("bit_s") or each.name == "bit_m_r50x1":
            with torch.device("meta"):
                network = create_model(each.model, each.num_classes)
            assert each.num_bytes == 4 * sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("name", ["bit_m_r50x1", "BiT-M-R50x1"])
def test_a_file_is_fetched_once(server, tmp_path, name):
    server.files["BiT-M-R50x1.npz"] = b"weights" * 100_000
    path = fetch_by_name(name)
    assert path == tmp_path / "cache" / "weights" / "BiT-M-R50x1.npz"
    assert path.read_bytes() == server.files["BiT-M-R50x1.npz"]
    server.files.clear()
    assert fetch_by_name(name) == path
    assert len(server.asked) == 1
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_an_interrupted_download_goes_on_where_it_ended(server):
    data = server.files["BiT-S-R50x1.npz"] = bytes(range(256)) * 20_000
    server.cut_after = 3_000_000
    with pytest.raises(ModelError) as caught:
        fetch_by_name("bit_s_r50x1")
    text = str(caught.value)
    assert text.startswith(f"bit_s_r50x1: cannot be fetched from {server.url}/BiT-S-R50x1.npz (")
    assert text.endswith("weights/BiT-S-R50x1.npz; download it elsewhere and put it there")
    server.cut_after = None
    assert fetch_by_name("bit_s_r50x1").read_bytes() == data
    command, path, part = server.asked[-1]
    assert (command, path, part) == ("GET", "/BiT-S-R50x1.npz", "bytes=3000000-")


def test_bytes_that_are_not_what_the_server_states_are_not_kept(server, tmp_path):
    server.files["BiT-S-R50x1.npz"] = b"weights"
    server.lie = True
    found, stated = (hashlib.md5(data).hexdigest() for data in (b"weights", b"other"))
    with pytest.raises(ModelError, match=f"MD5 {found}; accepted: {stated}, as published; nothing was kept"):
        fetch_by_name("bit_s_r50x1")
    assert list((tmp_path / "cache" / "weights").iterdir()) == []


def test_what_cannot_be_fetched_says_where_it_may_be_put(server, tmp_path, monkeypatch):
    with pytest.raises(ModelError, match=r"^bit_s_r50x1: cannot be fetched from .*404.*; accepted: a connection, or "):
        fetch_by_name("bit_s_r50x1")
    monkeypatch.setenv("BIT_RAY_WEIGHTS_URL", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match="accepted: a connection, or the file at"):
        fetch_by_name("bit_s_r50x1")
    with pytest.raises(ModelError, match="^'bit_m_r50x2': unknown weights; did you mean bit_m_r50x[13]"):
        fetch_by_name("bit_m_r50x2")
    (tmp_path / "bit_s_r50x1").mkdir()
    monkeypatch.chdir(tmp_path)
    for other in ("bit_s_r50x1", "models:/x@champion", str(tmp_path), "glyphs", "s3://bucket/model", "weights.npz"):
        assert fetch_by_name(other) is None


@pytest.fixture
def published(server, tmp_path):
    """A small BiT of known weights, as a repository of the Hub."""
    torch.manual_seed(0)
    model = create_model(MODEL, 3)
    torch.nn.init.normal_(model.head.weight)
    spec = ModelSpec(
        model=MODEL, num_classes=3, class_names=("a", "b", "c"), multi_label=False, resize_mode="square",
        resize_size=32, crop_size=32,
    )  # fmt: skip
    write_weights(model, spec, tmp_path / "published", "huggingface")
    for path in (tmp_path / "published").iterdir():
        server.files[f"lab/small-bit/{path.name}"] = path.read_bytes()
    server.files["lab/small-bit/README.md"] = b"not needed"
    return model


@pytest.mark.parametrize("name", ["hf://lab/small-bit", f"hf://lab/small-bit@{COMMIT}"])
def test_a_model_of_the_hub_is_loaded_by_name_and_again_without_a_connection(server, published, name):
    images = torch.rand(2, 3, 32, 32)
    loaded = load_model(name)
    assert loaded.spec.class_names == ("a", "b", "c")
    assert torch.allclose(loaded.model(images), published.eval()(images), atol=1e-5)
    asked = [path for _, path, _ in server.asked]
    assert not any(path.endswith("README.md") for path in asked)
    init = read_init(name, None)
    assert (init.parent, init.model, init.digest) == (name, MODEL, loaded.sha256)
    server.shutdown()
    server.server_close()
    assert torch.equal(load_model(name).model.head.weight, loaded.model.head.weight)


def test_a_damaged_file_of_the_hub_is_found(server, published):
    server.lie = True
    with pytest.raises(ModelError, match=r"^hf://lab/small-bit: model.safetensors does not have the SHA-256 that "):
        load_model("hf://lab/small-bit")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hf://lab/nothing", "hf://lab/nothing: cannot be fetched from "),
        ("hf://lab", "'hf://lab': not a model of the Hub; accepted: hf://ORG/NAME or hf://ORG/NAME@REVISION"),
        ("hf://../../etc/passwd", "'hf://../../etc/passwd': not a model of the Hub"),
        ("hf://lab/other", "hf://lab/other: no BiT model; accepted: a repository with config.json and one of "),
    ],
)
def test_what_the_hub_does_not_have_is_one_line(server, name, text):
    server.files["lab/other/README.md"] = b"words"
    with pytest.raises(ModelError) as caught:
        fetch_by_name(name)
    assert str(caught.value).startswith(text)
    assert "\n" not in str(caught.value)


def test_the_command_lists_them_and_says_which_are_here(server, tmp_path, capsys):
    server.files["BiT-M-R50x1.npz"] = b"weights"
    fetch_by_name("bit_m_r50x1")
    capsys.readouterr()
    assert main(["models", "known"]) == 0
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│ bit_")]
    assert [row[1].strip() for row in rows if row[7].strip() == "yes"] == ["bit_m_r50x1"]
    assert len(rows) == 18
