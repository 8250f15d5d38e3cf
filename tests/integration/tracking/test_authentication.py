"""MLflow's own authentication: runs and models of users with passwords, and what those without one are told."""

import base64
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from mlflow.server.auth.client import AuthServiceClient
from servers import MlflowServer

import bit_ray
from bit_ray.cli.main import main
from bit_ray.errors import TrackingError
from bit_ray.models.resnet import ResNetV2
from bit_ray.models.zoo import model_config
from bit_ray.tracking.config import TrackingConfig
from bit_ray.tracking.registry import pull, register, resolve
from bit_ray.tracking.runs import TrackedRun
from bit_ray.weights.package import ModelSpec, save_package

pytestmark = pytest.mark.cluster

ADMIN, PASSWORD, READER = "PLANTED-admin-password", "PLANTED-trainers-password", "PLANTED-readers-password"
BASIC = base64.b64encode(f"trainer:{PASSWORD}".encode())
SPEC = ModelSpec(
    model="R1-1-1-1x0.5",
    num_classes=2,
    class_names=("a", "b"),
    multi_label=False,
    resize_mode="square",
    resize_size=32,
    crop_size=32,
)


def log_in(monkeypatch: pytest.MonkeyPatch, user: str, password: str) -> None:
    for name, value in (("MLFLOW_TRACKING_USERNAME", user), ("MLFLOW_TRACKING_PASSWORD", password)):
        if value:
            monkeypatch.setenv(name, value)
        else:
            monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"), admin_password=ADMIN)
    server.start()
    with pytest.MonkeyPatch.context() as environment:
        log_in(environment, "admin", ADMIN)
        users = AuthServiceClient(server.uri)
        users.create_user("trainer", PASSWORD)
        users.create_user("reader", READER)
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def as_trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log_in(monkeypatch, "trainer", PASSWORD)
    monkeypatch.setenv("BIT_RAY_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("package") / "model"
    save_package(directory, ResNetV2(model_config(SPEC.model, SPEC.num_classes)), SPEC)
    return directory


def open_run(uri: str, storage: Path) -> TrackedRun:
    config = TrackingConfig(uri=uri, experiment="guarded")
    return TrackedRun.open(config, run_name="a", storage=str(storage), params={"lr": 0.1}, tags={}, kind="pretrain")


def test_a_run_is_tracked_registered_and_pulled_with_a_password_that_stands_nowhere(
    server: MlflowServer,
    package: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = open_run(server.uri, tmp_path / "runs")
    run.log_metrics({"loss": 2.0}, step=1)
    run.log_text("a note", "note.txt")
    register(str(package), name="guarded", alias="best", tracking_uri=server.uri, run_id=run.run_id)
    assert run.close(timeout_s=60) == 0

    client = MlflowClient(tracking_uri=server.uri)
    recorded = client.get_run(run.run_id)
    assert (recorded.info.status, recorded.data.metrics, recorded.data.params) == (
        "FINISHED",
        {"loss": 2.0},
        {"lr": "0.1"},
    )
    assert [path.read_text() for path in server.artifacts.rglob("note.txt")] == ["a note"]
    log_in(monkeypatch, "reader", READER)  # MLflow's default: everybody with a password may read
    pull("models:/guarded@best", tmp_path / "pulled", server.uri)
    assert bit_ray.load_model(str(tmp_path / "pulled")).spec.class_names == ("a", "b")
    assert bit_ray.load_model("models:/guarded@best", tracking_uri=server.uri).spec.class_names == ("a", "b")
    with pytest.raises(TrackingError, match="^guarded: cannot be registered .*Permission denied") as caught:
        register(str(package), name="guarded", alias="mine", tracking_uri=server.uri)
    assert "\n" not in str(caught.value)

    out, err = capfd.readouterr()
    assert "PLANTED" not in out + err + caplog.text
    files = [path for place in (tmp_path, server.directory, package) for path in place.rglob("*") if path.is_file()]
    assert {"server.db", "server.log", "basic_auth.db", "model.json", "note.txt"} <= {path.name for path in files}
    marks = (b"PLANTED", BASIC.rstrip(b"=")[:-1])
    assert [path for path in files if any(mark in path.read_bytes() for mark in marks)] == []


@pytest.mark.parametrize(("user", "password"), [("trainer", "PLANTED-wrong"), ("nobody", PASSWORD), ("", "")])
def test_a_wrong_or_missing_password_is_told_in_one_line(
    server: MlflowServer,
    package: Path,
    tmp_path: Path,
    user: str,
    password: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log_in(monkeypatch, user, password)
    calls: list[Callable[[], Any]] = [
        lambda: open_run(server.uri, tmp_path),
        lambda: register(str(package), name="guarded", alias="best", tracking_uri=server.uri),
        lambda: resolve("models:/guarded@best", server.uri),
    ]
    expected = (
        f"tracking.uri: {server.uri}: access refused (HTTP 401); set MLFLOW_TRACKING_USERNAME and "
        "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
    )
    for call in calls:
        with pytest.raises(TrackingError) as caught:
            call()
        assert str(caught.value) == expected


def test_a_command_without_a_password_ends_with_one_line(
    server: MlflowServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log_in(monkeypatch, "trainer", "PLANTED-wrong")
    assert main(["models", "list", "--tracking.uri", server.uri]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert "access refused (HTTP 401); set MLFLOW_TRACKING_USERNAME" in printed.err
    assert "PLANTED" not in printed.out + printed.err
