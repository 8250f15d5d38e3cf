"""What a registered model is to MLflow: a card, a pyfunc, and a server that takes image bytes."""

import base64
import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from PIL import Image
from s3_server import Bucket
from servers import MlflowServer, free_port

from bit_ray import store
from bit_ray.inference.classifier import load_model
from bit_ray.models.zoo import create_model
from bit_ray.tracking.card import MARK
from bit_ray.tracking.config import TrackingConfig
from bit_ray.tracking.registry import register
from bit_ray.tracking.runs import TrackedRun
from bit_ray.weights.package import ModelSpec, save_package

pytestmark = pytest.mark.cluster

SPEC = ModelSpec(
    model="R1-1-1-1x0.5",
    num_classes=7,
    class_names=("zero", "one", "two", "drei", "vier", "fünf", "six"),
    multi_label=False,
    resize_mode="square",
    resize_size=32,
    crop_size=32,
    provenance={"manifest_digest": "ab12"},
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BIT_RAY_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def package(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = create_model(SPEC.model, SPEC.num_classes)
    torch.nn.init.normal_(model.head.weight)
    save_package(tmp_path / "run" / "checkpoint", model, SPEC)
    return tmp_path / "run" / "checkpoint"


def pictures(count: int = 3) -> list[bytes]:
    generator = np.random.default_rng(0)
    found = []
    for _ in range(count):
        pixels = generator.integers(0, 256, (6, 5, 3)).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).resize((50, 40)).save(buffer, "JPEG")
        found.append(buffer.getvalue())
    return found


def gray() -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (40, 40), 99).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def tracking(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Sets MLflow's own idea of where it is, and takes it back."""

    def use(uri: str) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        mlflow.set_tracking_uri(uri)

    yield use
    mlflow.set_tracking_uri(None)


def check(frame: pd.DataFrame, package: Path, images: list[bytes], top_k: int = 5) -> None:
    """Compare what came out with what the classifier says."""
    expected = load_model(package).predict(images, top_k)
    assert frame["class"].tolist() == [best[0][0] for best in expected]
    assert frame["probability"].tolist() == pytest.approx([best[0][1] for best in expected], rel=1e-4)
    assert [list(row) for row in frame["classes"]] == [[name for name, _ in best] for best in expected]
    for row, best in zip(frame["probabilities"], expected, strict=True):
        assert list(row) == pytest.approx([probability for _, probability in best], rel=1e-4)
    assert len(set(frame["class"])) > 1


@pytest.mark.parametrize("kind", ["server", "sqlite", "s3"])
def test_mlflow_itself_loads_a_registered_model(
    kind: str, mlflow_server: MlflowServer, package: Path, tmp_path: Path, request: pytest.FixtureRequest, tracking
):
    uri = f"sqlite:///{tmp_path}/mlflow.db" if kind == "sqlite" else mlflow_server.uri
    place = str(package)
    if kind == "s3":
        bucket: Bucket = request.getfixturevalue("s3")
        place = bucket.uri("runs/served")
        for path in package.iterdir():
            store.upload_file(path, store.join(place, path.name))
    register(place, name=f"served-{kind}", alias="best", tracking_uri=uri)
    tracking(uri)
    model = mlflow.pyfunc.load_model(f"models:/served-{kind}@best")
    images = pictures()
    frame = pd.DataFrame({"image": images})
    check(model.predict(frame), package, images)
    check(model.predict(frame, params={"top_k": 2}), package, images, top_k=2)
    converted = model.predict(pd.DataFrame({"image": [gray()]}), params={"convert": True})
    assert converted["class"].tolist() == [load_model(package).predict(gray(), convert=True)[0][0][0]]
    with pytest.raises(MlflowException, match=r"images\[1\]: grayscale; accepted: 8-bit RGB"):
        model.predict(pd.DataFrame({"image": [images[0], gray()]}))
    with pytest.raises(MlflowException, match=r"Model is missing inputs \['image'\]"):
        model.predict(pd.DataFrame({"pixels": images}))


def test_a_changed_package_is_not_served(mlflow_server: MlflowServer, package: Path, tracking):
    register(str(package), name="changed", alias="best", tracking_uri=mlflow_server.uri)
    tracking(mlflow_server.uri)
    text = (package / "model.json").read_text()
    (package / "model.json").write_text(text.replace("zero", "null"))
    with pytest.raises(Exception, match=r"models:/changed: .*model.json has SHA-256 .*, as registered; "):
        mlflow.pyfunc.load_model("models:/changed@best")


@contextmanager
def serving(model: str, environment: dict[str, str], directory: Path) -> Iterator[str]:
    """``mlflow models serve`` in a process of its own; what it prints is shown where it fails."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", model, "--env-manager", "local"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    log = directory / "serve.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env=environment, cwd=directory, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{url}/ping", timeout=2).close()
                break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]  # noqa: PT018
                time.sleep(0.2)
        yield url
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the group that it leads, started above
        process.wait()


def post(url: str, body: bytes, kind: str = "application/json") -> tuple[int, Any]:
    request = urllib.request.Request(f"{url}/invocations", body, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_a_real_server_answers_a_real_request(mlflow_server: MlflowServer, package: Path, tmp_path: Path, s3: Bucket):
    place = s3.uri("runs/over-http")
    for path in package.iterdir():
        store.upload_file(path, store.join(place, path.name))
    register(place, name="over-http", alias="champion", tracking_uri=mlflow_server.uri)
    images = pictures()
    texts = [base64.b64encode(image).decode() for image in images]
    environment = {**os.environ, **s3.environment, "MLFLOW_TRACKING_URI": mlflow_server.uri, "HOME": str(tmp_path)}
    environment["BIT_RAY_SERVING_MAX_IMAGES"] = "3"
    # As in an environment that is activated: MLflow starts uvicorn by its name.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    with serving("models:/over-http@champion", environment, tmp_path) as url:
        for body in (
            {"dataframe_split": {"columns": ["image"], "data": [[text] for text in texts]}},
            {"dataframe_records": [{"image": text} for text in texts]},
            {"inputs": {"image": texts}},
        ):
            status, answer = post(url, json.dumps(body).encode())
            assert status == 200, answer
            check(pd.DataFrame(answer["predictions"]), package, images)
        body = {"dataframe_records": [{"image": text} for text in texts], "params": {"top_k": 1}}
        status, answer = post(url, json.dumps(body).encode())
        assert [len(row["classes"]) for row in answer["predictions"]] == [1, 1, 1]

        buffer = io.BytesIO()  # without base64
        pd.DataFrame({"image": images}).to_parquet(buffer)
        status, answer = post(url, buffer.getvalue(), "application/vnd.apache.parquet")
        assert status == 200, answer
        check(pd.DataFrame(answer["predictions"]), package, images)

        bad = base64.b64encode(b"no image").decode()
        status, answer = post(url, json.dumps({"dataframe_records": [{"image": texts[0]}, {"image": bad}]}).encode())
        assert status == 400
        assert "images[1]: not an image of a known format" in answer["message"]
        status, answer = post(url, json.dumps({"dataframe_records": [{"photo": texts[0]}]}).encode())
        assert status == 400
        assert "Model is missing inputs ['image']" in answer["message"]

        # None of these is the server's fault, whether MLflow or we find it.
        for body, said in (
            ({"inputs": {"image": [texts[0], "no base64!"]}}, "images[1]: not an image of a known format"),
            ({"inputs": {"image": [texts[0]] * 4}}, "request: 4 images; accepted: 1 to 3"),
            ({"inputs": {"image": []}}, ""),
            ({"dataframe_records": [{"image": None}]}, ""),
            ({"dataframe_records": [{"image": 7}]}, ""),
            ({"dataframe_records": [{"image": "\ud800"}]}, ""),
            (
                {"inputs": {"image": [texts[0]]}, "params": {"top_k": 0}},
                "top_k: 0; accepted: a whole number of at least 1",
            ),
            ({"inputs": {"image": [texts[0]]}, "params": {"top_k": "x"}}, ""),
        ):
            status, answer = post(url, json.dumps(body).encode())
            assert status == 400, (body, answer)
            assert said in answer["message"]


def test_the_card_lies_beside_the_weights_and_describes_the_version(
    mlflow_server: MlflowServer, package: Path, tmp_path: Path
):
    config = TrackingConfig(uri=mlflow_server.uri, experiment="cards")
    run = TrackedRun.open(
        config, run_name="a", storage=str(tmp_path), params={"shards": "data/x"}, tags={}, kind="finetune"
    )
    run.log_metrics({"test/top_1": 0.5, "test/num_examples": 10}, step=1)
    run.close()
    register(str(package), name="carded", alias="best", tracking_uri=mlflow_server.uri, run_id=run.run_id)
    card = (package / "README.md").read_text()
    assert card.startswith(f"{MARK}\n# carded\n")
    assert "| top-1 | 50.00% |" in card
    assert "Training shards: `data/x`." in card
    version = MlflowClient(tracking_uri=mlflow_server.uri).get_model_version_by_alias("carded", "best")
    assert version.description.startswith(f"{SPEC.num_classes} classes, 50.0% top-1. Image classifier: ")
    assert card.endswith(version.description)
    load_model(package)  # which a further file in its folder does not disturb


def test_somebody_elses_readme_is_left_as_it_is(
    mlflow_server: MlflowServer, package: Path, caplog: pytest.LogCaptureFixture
):
    (package / "README.md").write_text("# Mine\n")
    register(str(package), name="readme", alias="best", tracking_uri=mlflow_server.uri)
    assert (package / "README.md").read_text() == "# Mine\n"
    assert "is not a card of bit_ray" in caplog.text
    version = MlflowClient(tracking_uri=mlflow_server.uri).get_model_version_by_alias("readme", "best")
    assert version.description.startswith(f"{SPEC.num_classes} classes. Image classifier: ")


def test_a_model_of_several_labels_is_served_with_its_sigmoids(mlflow_server: MlflowServer, tmp_path: Path, tracking):
    torch.manual_seed(1)
    model = create_model(SPEC.model, SPEC.num_classes)
    torch.nn.init.normal_(model.head.weight)
    save_package(tmp_path / "several", model, replace(SPEC, multi_label=True))
    register(str(tmp_path / "several"), name="several", alias="best", tracking_uri=mlflow_server.uri)
    tracking(mlflow_server.uri)
    images = pictures(8)
    served = mlflow.pyfunc.load_model("models:/several@best").predict(pd.DataFrame({"image": images}))
    check(served, tmp_path / "several", images)
