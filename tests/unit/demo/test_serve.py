import asyncio
import base64
import io
import json

import numpy as np
import pytest
from aiohttp import ClientSession, web
from PIL import Image

from bit_ray.demo import answer as answers
from bit_ray.demo.serve import application
from bit_ray.inference.classifier import Classifier
from bit_ray.models.zoo import create_model
from bit_ray.weights.package import ModelSpec

MODEL = "R1-1-1-1x0.5"
BYTES = {"Content-Type": "application/octet-stream"}


@pytest.fixture(scope="module")
def model():
    names = ("<script>alert(1)</script>", "b", "c")
    spec = ModelSpec(
        model=MODEL, num_classes=3, class_names=names, multi_label=False, resize_mode="square", resize_size=32,
        crop_size=32,
    )  # fmt: skip
    return Classifier(create_model(MODEL, 3), spec)


def ask(model, method="POST", path="/classify", data=b"", headers=BYTES, host=""):
    """Status, headers and text of the answer to one request."""

    async def talk():
        runner = web.AppRunner(application("<b>photos</b>", model), access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port = runner.addresses[0][1]
        named = {"Host": host.format(port=port)} if host else {}
        try:
            async with ClientSession() as session:
                url = f"http://127.0.0.1:{port}{path}"
                sent = {key: value.format(port=port) for key, value in headers.items()}
                async with session.request(method, url, data=data, headers={**sent, **named}) as response:
                    return response.status, dict(response.headers), await response.text()
        finally:
            await runner.cleanup()

    return asyncio.run(talk())


def encoded(size=(50, 40), mode="RGB", kind="PNG"):
    content = io.BytesIO()
    Image.new(mode, size).save(content, kind)
    return content.getvalue()


@pytest.mark.parametrize("image", [encoded(), encoded(mode="L"), encoded(mode="RGBA"), encoded(kind="JPEG")])
def test_an_image_of_any_kind_gets_classes_with_pictures(model, image):
    status, headers, text = ask(model, data=image)
    assert status == 200
    found = json.loads(text)
    assert sorted(one["name"] for one in found["classes"]) == sorted(model.spec.class_names)
    assert sum(one["probability"] for one in found["classes"]) == pytest.approx(1)
    for uri in (found["picture"], *(one["heat"] for one in found["classes"])):
        kind, _, content = uri.partition(",")
        assert kind == "data:image/jpeg;base64"
        assert Image.open(io.BytesIO(base64.b64decode(content))).size == (400, 320)  # a whole factor, its own shape


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", "zero bytes"),
        (b"no image", "not an image of a known format"),
        (encoded()[:60], "damaged"),
        (encoded((9000, 9000), "1"), "9000 x 9000 pixels, a decompression bomb"),
    ],
)
def test_what_is_no_image_is_a_sentence(model, image, message):
    status, _, text = ask(model, data=image)
    assert status == 400
    assert message in json.loads(text)["error"]


def test_an_upload_is_bounded(model, monkeypatch):
    monkeypatch.setattr("bit_ray.demo.serve.MAX_BYTES", 1000)
    status, _, text = ask(model, data=b"x" * 1001)
    assert status == 413
    assert "accepted: a smaller image file" in json.loads(text)["error"]


@pytest.mark.parametrize("host", ["evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "localhost.evil.example:{port}"])
@pytest.mark.parametrize(("method", "path"), [("GET", "/"), ("POST", "/classify"), ("GET", "/nothing")])
def test_another_name_than_the_loopbacks_is_refused(model, host, method, path):
    status, _, text = ask(model, method, path, host=host)
    assert status == 403
    assert text == "This demo answers to 127.0.0.1 and localhost only.\n"


@pytest.mark.parametrize(
    "headers",
    [
        {**BYTES, "Origin": "http://evil.example"},
        {**BYTES, "Origin": "null"},
        {**BYTES, "Origin": "http://localhost:{port}"},  # another origin than the host asked for
        {"Content-Type": "text/plain"},
        {"Content-Type": "multipart/form-data; boundary=x"},
    ],
)
def test_images_come_from_its_own_page_only(model, headers):
    status, sent, _ = ask(model, data=encoded(), headers=headers)
    assert status == 403
    assert not [name for name in sent if name.lower().startswith("access-control")]


def test_its_own_page_may_ask_by_both_names(model):
    for name in ("127.0.0.1", "localhost"):
        headers = {**BYTES, "Origin": f"http://{name}:{{port}}"}
        assert ask(model, data=encoded(), headers=headers, host=f"{name}:{{port}}")[0] == 200


def test_the_page_allows_its_own_script_alone_and_escapes_names(model):
    status, headers, first = ask(model, "GET", "/")
    assert status == 200
    assert headers["X-Frame-Options"] == "DENY"
    assert "<b>photos" not in first
    assert "&lt;b&gt;photos" in first
    nonce = first.split("script-src 'nonce-")[1].split("'")[0]
    assert f'<script nonce="{nonce}">' in first
    assert first.count("<script") == 1
    assert nonce not in ask(model, "GET", "/")[2]
    assert ask(model, "GET", "/nothing")[0] == 404


def test_a_crop_is_shown_as_the_model_sees_it():
    spec = ModelSpec(
        model=MODEL, num_classes=2, class_names=("a", "b"), multi_label=False, resize_mode="shorter_side",
        resize_size=36, crop_size=32,
    )  # fmt: skip
    picture = answers.answer(Classifier(create_model(MODEL, 2), spec), encoded((90, 40)))["picture"]
    shown = np.array(Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))))
    assert shown.shape == (448, 448, 3)
