"""The registry by reference: a real MLflow server, packages in a real S3 store and in local folders."""

import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from mlflow.models import get_model_info
from s3_server import Bucket
from servers import MlflowServer

from bit_ray import store
from bit_ray.errors import ConfigError, ModelError, TrackingError
from bit_ray.models.resnet import ResNetV2
from bit_ray.models.zoo import model_config
from bit_ray.tracking.config import TrackingConfig
from bit_ray.tracking.fetch import fetch
from bit_ray.tracking.registry import check_name, list_models, pull, register, resolve
from bit_ray.tracking.runs import TrackedRun
from bit_ray.weights.package import ModelSpec, load_package, save_package

pytestmark = pytest.mark.cluster

SPEC = ModelSpec(
    model="R1-1-1-1x0.5",
    num_classes=3,
    class_names=("zero", "one", "two"),
    multi_label=False,
    resize_mode="square",
    resize_size=32,
    crop_size=32,
    provenance={"manifest_digest": "ab12", "config_digest": "cd34", "code_revision": "ef56", "parent": "models:/up/1"},
)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("run") / "checkpoint"
    save_package(directory, ResNetV2(model_config(SPEC.model, SPEC.num_classes)), SPEC)
    (directory / "optimizer.safetensors").write_bytes(b"not part of the model")
    return directory


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BIT_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def upload(package: Path, uri: str) -> str:
    for path in package.iterdir():
        store.upload_file(path, store.join(uri, path.name))
    return uri


def copy(package: Path, directory: Path) -> Path:
    directory.mkdir()
    for path in package.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    return directory


def num_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def test_a_user_with_only_the_tracking_uri_loads_the_model(
    mlflow_server: MlflowServer, s3: Bucket, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    uri = upload(package, s3.uri("runs/a/checkpoint_000500"))
    config = TrackingConfig(uri=mlflow_server.uri, experiment="registry")
    run = TrackedRun.open(config, run_name="a", storage=str(tmp_path), params={"lr": 1}, tags={}, kind="pretrain")
    run.log_metrics({"test/top1": 91.5}, step=500)
    assert run.close() == 0
    registered = register(uri, name="glyphs", alias="best", tracking_uri=mlflow_server.uri, run_id=run.run_id)
    assert (registered.version, registered.weights_uri) == (1, uri)
    assert registered.sha256 == hashlib.sha256((package / "model.safetensors").read_bytes()).hexdigest()

    code = """
import sys
from bit_ray.weights.package import load_package
from bit_ray.tracking.fetch import fetch
from bit_ray.tracking.registry import resolve
directory = fetch(resolve("models:/glyphs@best"))
model, spec = load_package(directory)
print(directory, spec.class_names, sep="|")
assert "ray" not in sys.modules
"""
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "MLFLOW_TRACKING_URI": mlflow_server.uri}
    environment |= s3.environment
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    directory, names = out.stdout.strip().split("|")
    assert names == "('zero', 'one', 'two')"
    s3.client.delete_object(Bucket=s3.bucket, Key="runs/a/checkpoint_000500/model.safetensors")
    monkeypatch.setenv("BIT_RAY_CACHE", str(tmp_path / ".cache" / "bit_ray"))
    again = fetch(resolve("models:/glyphs@best", mlflow_server.uri))  # another process, and now from the cache
    assert str(again) == directory
    assert load_package(again)[1].class_names == ("zero", "one", "two")
    assert Path(directory).is_relative_to(tmp_path / ".cache" / "bit_ray" / "models")
    assert sorted(path.name for path in Path(directory).iterdir()) == ["model.json", "model.safetensors"]

    client = MlflowClient(tracking_uri=mlflow_server.uri)
    version = client.get_model_version_by_alias("glyphs", "best")
    assert version.run_id == run.run_id
    assert version.tags["bit_ray.manifest_digest"] == "ab12"
    assert version.tags["bit_ray.sha256"] == registered.sha256
    assert version.tags["bit_ray.num_bytes"] == str((package / "model.safetensors").stat().st_size)
    model_id = version.source.removeprefix("models:/")
    logged = client.get_logged_model(model_id)
    assert logged.source_run_id == run.run_id
    assert {metric.key: metric.value for metric in logged.metrics} == {"test/top1": 91.5}
    assert client.get_run(run.run_id).outputs.model_outputs[0].model_id == model_id
    assert [metric.value for metric in client.get_metric_history(run.run_id, "test/top1")] == [91.5]


def test_the_logged_model_has_a_signature_and_no_weights(
    mlflow_server: MlflowServer, package: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    before = num_bytes(mlflow_server.artifacts)
    register(str(package), name="signed", alias="best", tracking_uri=mlflow_server.uri)
    assert "will load on this machine only" in caplog.text
    assert 0 < num_bytes(mlflow_server.artifacts) - before < 10_000
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    signature = get_model_info("models:/signed@best").signature
    assert [(column.name, str(column.type)) for column in signature.inputs] == [("image", "DataType.binary")]
    assert [column.name for column in signature.outputs] == ["class", "probability", "classes", "probabilities"]
    assert [(param.name, param.default) for param in signature.params] == [("top_k", 5), ("convert", False)]


def test_registering_gigabytes_takes_seconds_and_moves_nothing(
    mlflow_server: MlflowServer, package: Path, tmp_path: Path
):
    large = copy(package, tmp_path / "large")
    size = 4 * 2**30
    with open(large / "model.safetensors", "wb") as file:
        file.truncate(size)  # sparse
    description = json.loads((large / "model.json").read_text())
    description["weights"] |= {"num_bytes": size, "sha256": "0" * 64}
    (large / "model.json").write_text(json.dumps(description))
    before = num_bytes(mlflow_server.directory)
    begin = time.monotonic()
    register(str(large), name="large", alias="best", tracking_uri=mlflow_server.uri)
    assert time.monotonic() - begin < 10
    assert num_bytes(mlflow_server.directory) - before < 1_000_000
    assert resolve("models:/large", mlflow_server.uri).num_bytes == size


def test_names_aliases_and_versions_resolve(mlflow_server: MlflowServer, package: Path, tmp_path: Path):
    uri = mlflow_server.uri
    other = tmp_path / "other"
    save_package(other, load_package(package)[0], replace(SPEC, class_names=("a", "b", "c")))
    register(str(package), name="digits", alias="first", tracking_uri=uri)
    register(str(other), name="digits", alias="best", tracking_uri=uri)
    again = register(str(package), name="digits", alias="again", tracking_uri=uri)
    assert again.version == 1  # the same package is no new version
    numbers = {name: resolve(f"models:/digits{name}", uri).version for name in ("", "@first", "@best", "/1", "/2")}
    assert numbers == {"": 2, "@first": 1, "@best": 2, "/1": 1, "/2": 2}
    reference = resolve("models:/digits@best", uri)
    assert reference.spec.class_names == ("a", "b", "c")
    assert fetch(reference) == other

    rows = [row for row in list_models(uri) if row.name == "digits"]
    assert [(row.version, row.aliases) for row in rows] == [(2, ("best",)), (1, ("again", "first"))]
    assert {(row.model, row.num_classes, row.parent) for row in rows} == {("R1-1-1-1x0.5", 3, "models:/up/1")}
    assert [row.weights_uri for row in rows] == [str(other), str(package)]


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("models:/known-modle@best", "models:/known-modle@best: no model of that name; accepted: known-model"),
        ("models:/known-model@bset", "models:/known-model@bset: no such alias; accepted: best"),
        ("models:/known-model/7", "models:/known-model/7: no such version; accepted: 1;"),
        ("models:/known-model/Production", "accepted: models:/NAME@ALIAS, models:/NAME/VERSION or models:/NAME"),
        ("models:/not-ours/1", "models:/not-ours/1: no readable reference.json"),
    ],
)
def test_what_is_not_registered_is_told_in_one_line(mlflow_server: MlflowServer, package: Path, uri: str, message: str):
    register(str(package), name="known-model", alias="best", tracking_uri=mlflow_server.uri)
    client = MlflowClient(tracking_uri=mlflow_server.uri)
    if uri.startswith("models:/not-ours"):
        client.create_registered_model("not-ours")
        client.create_model_version("not-ours", "s3://bucket/not-ours")
    with pytest.raises(ModelError) as error:
        resolve(uri, mlflow_server.uri)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_that_are_not_the_registered_ones_are_refused(
    mlflow_server: MlflowServer, s3: Bucket, package: Path, tmp_path: Path
):
    uri = upload(package, s3.uri("runs/b"))
    register(uri, name="tampered", alias="best", tracking_uri=mlflow_server.uri)
    reference = resolve("models:/tampered@best", mlflow_server.uri)
    weights = bytearray((package / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    s3.client.put_object(Bucket=s3.bucket, Key="runs/b/model.safetensors", Body=bytes(weights))
    changed = hashlib.sha256(weights).hexdigest()
    with pytest.raises(ModelError, match=f"(?s){changed[:12]}.*{reference.sha256[:12]}"):
        fetch(reference)
    with pytest.raises(ModelError, match="SHA-256"):
        pull("models:/tampered@best", tmp_path / "pulled", mlflow_server.uri)

    # A whole other package in its place: consistent in itself, and still not what was registered.
    torch.manual_seed(1)
    save_package(tmp_path / "new", ResNetV2(model_config(SPEC.model, SPEC.num_classes)), SPEC)
    upload(tmp_path / "new", uri)
    with pytest.raises(ModelError, match=f"accepted: {reference.sha256[:12]}..., as registered"):
        fetch(reference)
    s3.client.delete_object(Bucket=s3.bucket, Key="runs/b/model.json")
    with pytest.raises(ModelError, match="its package cannot be read: .*no such file"):
        fetch(reference)
    assert not (tmp_path / "pulled").exists()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_local_package_that_changed_or_went_away_is_refused(
    mlflow_server: MlflowServer, package: Path, tmp_path: Path
):
    local = copy(package, tmp_path / "local")
    register(str(local), name="local", alias="best", tracking_uri=mlflow_server.uri)
    reference = resolve("models:/local", mlflow_server.uri)
    description = (local / "model.json").read_text()
    (local / "model.json").write_text(description.replace('"two"', '"three"'))
    with pytest.raises(ModelError, match="model.json has SHA-256 .*, as registered; "):
        fetch(reference)
    (local / "model.json").write_text(description)
    os.truncate(local / "model.safetensors", 1000)
    with pytest.raises(ModelError, match=f"1000 bytes; accepted: {reference.num_bytes}, as registered"):
        fetch(reference)
    (local / "model.json").unlink()
    with pytest.raises(ModelError, match="deleted, or is on another machine"):
        fetch(reference)


def test_a_damaged_cache_is_filled_again(mlflow_server: MlflowServer, s3: Bucket, package: Path):
    register(upload(package, s3.uri("runs/c")), name="cached", alias="best", tracking_uri=mlflow_server.uri)
    reference = resolve("models:/cached", mlflow_server.uri)
    directory = fetch(reference)
    os.truncate(directory / "model.safetensors", 1000)
    assert fetch(reference) == directory
    load_package(directory)  # verifies the digest


def test_what_a_killed_process_had_fetched_is_removed_from_the_cache(
    mlflow_server: MlflowServer, s3: Bucket, package: Path, tmp_path: Path
):
    register(upload(package, s3.uri("runs/e")), name="fetched", alias="best", tracking_uri=mlflow_server.uri)
    left = tmp_path / "cache" / "models" / f".another.{'0' * 32}.partial"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    directory = fetch(resolve("models:/fetched", mlflow_server.uri))
    assert list(left.parent.iterdir()) == [directory]


def test_a_pulled_model_is_a_whole_package(mlflow_server: MlflowServer, s3: Bucket, package: Path, tmp_path: Path):
    register(upload(package, s3.uri("runs/d")), name="pulled", alias="best", tracking_uri=mlflow_server.uri)
    directory = pull("models:/pulled@best", tmp_path / "copies" / "model", mlflow_server.uri)
    assert [path.name for path in directory.parent.iterdir()] == ["model"]
    tensors, expected = load_package(directory)[0].state_dict(), load_package(package)[0].state_dict()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    with pytest.raises(ModelError, match="model: not empty; accepted: a new or empty directory"):
        pull("models:/pulled@best", directory, mlflow_server.uri)


def test_only_whole_packages_are_registered(mlflow_server: MlflowServer, package: Path, tmp_path: Path):
    def refused(directory: Path, message: str) -> None:
        with pytest.raises(ModelError, match=message):
            register(str(directory), name="half", alias="best", tracking_uri=mlflow_server.uri)

    refused(tmp_path / "none", "no readable saved model")
    half = copy(package, tmp_path / "half")
    os.truncate(half / "model.safetensors", 10)
    refused(half, "model.safetensors: 10 bytes; ")
    (half / "model.safetensors").unlink()
    refused(half, "model.safetensors: missing")
    assert "half" not in {row.name for row in list_models(mlflow_server.uri)}


def test_the_embedded_store_is_found_from_the_current_directory(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TrackingError, match="no bit_ray_runs/mlflow.db; .*set MLFLOW_TRACKING_URI"):
        resolve("models:/embedded")
    run = TrackedRun.open(
        TrackingConfig(), run_name="a", storage="bit_ray_runs", params={}, tags={}, kind="finetune", parent_run_id=None
    )
    run.log_metrics({"top1": 90.0}, step=1)
    run.close()
    name = "bit-m R50x1.v2"  # every kind of character that a name may have
    register(os.path.relpath(package), name=name, alias="best", tracking_uri=run.tracking_uri, run_id=run.run_id)
    assert fetch(resolve(f"models:/{name}@best")) == package
    (row,) = list_models()
    assert (row.name, row.version, row.aliases) == (name, 1, ("best",))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bit_ray_runs"]


def test_artifacts_that_cannot_be_written_refuse_a_version_and_say_what_is_complete(package: Path, tmp_path: Path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    (tmp_path / "mlruns").touch()  # where a folder should be
    said = rf"^blocked: cannot be registered \(file://{tmp_path}/mlruns/.*: .*\); {package} is complete: repair what "
    with pytest.raises(TrackingError, match=said) as caught:
        register(str(package), name="blocked", alias="best", tracking_uri=uri)
    assert "\n" not in str(caught.value)
    assert list_models(uri) == []
    (tmp_path / "mlruns").unlink()
    assert register(str(package), name="blocked", alias="best", tracking_uri=uri).version == 1


def test_a_name_that_mlflow_would_refuse_is_refused_before_any_training():
    check_name("bit-m R50x1.v2", "champion")
    for name, alias in [
        ("a/b", "best"),
        ("", "best"),
        ("a:b", "best"),
        ("a", "latest"),
        ("a", "v3"),
        ("a", "7"),
        ("a", ""),
    ]:
        with pytest.raises(ConfigError, match="accepted"):
            check_name(name, alias)
