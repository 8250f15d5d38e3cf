"""A registry whose content anybody may have written, in a real SQLite store: nothing here is at its mercy."""

import json
import logging
import shutil
import socket
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
import yaml
from mlflow import MlflowClient

import bit_ray
from bit_ray.errors import BitRayError, ConfigError, ModelError
from bit_ray.inference.classifier import Classifier
from bit_ray.models.zoo import create_model
from bit_ray.tracking.listing import read_embedded
from bit_ray.tracking.reference import find
from bit_ray.tracking.registry import list_models, register, resolve
from bit_ray.training.config import FinetuneConfig, PretrainConfig
from bit_ray.training.finetune import finetune
from bit_ray.training.pretrain import pretrain
from bit_ray.weights.fetch import cached_path
from bit_ray.weights.package import ModelSpec, save_package

SPEC = ModelSpec(
    model="R1-1-1-1x0.5",
    num_classes=3,
    class_names=("ant", "bee", "cat"),
    multi_label=False,
    resize_mode="square",
    resize_size=32,
    crop_size=32,
)
MARKER = """
from pathlib import Path
Path(__file__).with_suffix(".executed").touch()
from bit_ray.inference.serving import _load_pyfunc
"""


@dataclass
class Registry:
    """A store with one registered model, ``models:/m@best``, and the folder of what MLflow holds of it."""

    uri: str
    package: Path
    artifacts: Path

    def edit(self, change: Callable[[dict[str, Any]], object]) -> None:
        path = self.artifacts / "reference.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    folder = tmp_path_factory.mktemp("registry")
    torch.manual_seed(0)
    save_package(folder / "package", create_model(SPEC.model, 3), SPEC)
    uri = f"sqlite:///{folder}/mlflow.db"
    register(str(folder / "package"), name="m", alias="best", tracking_uri=uri)
    [reference] = folder.rglob("reference.json")
    return Registry(uri, folder / "package", reference.parent)


@pytest.fixture
def registry(made: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """The registry, put back in order afterwards, and a cache of its own."""
    monkeypatch.setenv("BIT_RAY_CACHE", str(tmp_path / "cache"))
    before = {path: path.read_bytes() for path in made.artifacts.iterdir()}
    mlflow.set_tracking_uri(made.uri)
    yield made
    mlflow.set_tracking_uri(None)
    for path, content in before.items():
        path.write_bytes(content)


def load(registry: Registry) -> Classifier:
    return bit_ray.load_model("models:/m@best", tracking_uri=registry.uri)


def refusals(registry: Registry) -> list[str]:
    """What both ways to load the model say."""
    said = []
    for way in (lambda: load(registry), lambda: mlflow.pyfunc.load_model("models:/m@best")):
        with pytest.raises(ModelError) as error:
            way()
        said.append(str(error.value))
        assert "\n" not in said[-1]
    return said


@pytest.mark.parametrize(
    ("sha256", "digest"),
    [("{folder}/my", "project"), ("../my", "project"), ("x/../../my", "project"), ("a" * 64, "b/../..")],
    ids=["absolute", "parent", "up and down", "through the other digest"],
)
def test_digests_that_are_paths_delete_nothing(registry: Registry, tmp_path: Path, sha256: str, digest: str) -> None:
    kept = [tmp_path / "my-project" / "thesis.tex", tmp_path / "cache" / "my-project" / "thesis.tex"]
    kept += [tmp_path / "cache" / "models" / name / "thesis.tex" for name in ("x", f"{'a' * 64}-b")]
    for path in kept:
        path.parent.mkdir(parents=True)
        path.write_text("years of work")

    def change(reference: dict[str, Any]) -> None:
        reference["package_uri"] = "s3://nowhere/x?endpoint_override=127.0.0.1:9&scheme=http&region=r"
        reference["description"]["weights"]["sha256"] = sha256.format(folder=tmp_path)
        reference["description_sha256"] = digest

    registry.edit(change)
    said = refusals(registry)
    assert [path.read_text() for path in kept if path.exists()] == ["years of work"] * 4
    assert all("sha256: given " in line for line in said)


@pytest.mark.parametrize(("sha256", "digest"), [("/etc/x", "y"), ("..", "/x"), ("a", "b/../.."), ("a/b", "c")])
def test_a_package_is_looked_for_in_the_cache_alone(tmp_path: Path, sha256: str, digest: str) -> None:
    with pytest.raises(ModelError, match="outside the cache"):
        cached_path(tmp_path, sha256, digest)
    assert cached_path(tmp_path, "ab" * 32, "cd" * 32) == tmp_path / f"{'ab' * 32}-cdcdcdcd"


def test_nobody_is_called_whom_a_registry_names(registry: Registry) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        place = "{}:{}".format(*listener.getsockname())
        uri = f"s3://bucket/x?endpoint_override={place}&scheme=http&region=us-east-1"
        registry.edit(lambda reference: reference.update(package_uri=uri))
        for said in refusals(registry):
            assert "package_uri: " in said
            assert "set AWS_ENDPOINT_URL instead" in said
        listener.settimeout(0)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_a_password_in_a_registered_uri_is_refused_and_not_shown(registry: Registry) -> None:
    registry.edit(lambda reference: reference.update(package_uri="s3://AK:PLAN/TED@bucket/x"))
    for said in refusals(registry):
        assert "package_uri: s3://***@bucket/x: a key or a password" in said
        assert "TED" not in said


def test_code_that_a_registry_names_is_not_executed_by_load_model(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hostile_loader.py").write_text(MARKER)
    monkeypatch.syspath_prepend(tmp_path)
    mlmodel = registry.artifacts / "MLmodel"
    content = yaml.safe_load(mlmodel.read_text())
    content["flavors"]["python_function"]["loader_module"] = "hostile_loader"
    mlmodel.write_text(yaml.safe_dump(content))

    [prediction] = load(registry).predict(np.zeros((40, 40, 3), np.uint8))
    assert len(prediction) == 3
    executed = tmp_path / "hostile_loader.executed"
    assert not executed.exists()
    mlflow.pyfunc.load_model("models:/m@best")  # as docs/serving.md says of MLflow
    assert executed.exists()


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (
            "s3://bucket/x?endpoint_override=127.0.0.1:9&scheme=http",
            "leave the query out, and set AWS_ENDPOINT_URL instead",
        ),
        ("s3://bucket#x/y", "the name of a bucket"),
        ("s3://AK:SECRET@bucket/x", "a key or a password in a URI"),
    ],
)
def test_what_no_registry_gives_out_is_not_registered(registry: Registry, uri: str, message: str) -> None:
    with pytest.raises(BitRayError, match=message):
        register(uri, name="refused", alias="best", tracking_uri=registry.uri)
    assert {row.name for row in list_models(registry.uri)} == {"m"}


def test_a_listing_without_mlflow_is_the_same(registry: Registry, tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    shutil.copy(registry.uri.removeprefix("sqlite:///"), path)
    uri = f"sqlite:///{path}"
    client = MlflowClient(uri, uri)
    client.set_registered_model_alias("m", "second", "1")
    for tags in ({}, {"bit_ray.weights_uri": "/x"}, client.get_model_version("m", "1").tags):
        client.create_model_version("m", "source", tags=tags, await_creation_for=0)
    client.delete_model_version("m", "4")
    [row] = found = read_embedded(uri) or []
    assert (row.name, row.version, row.aliases) == ("m", 1, ("best", "second"))
    assert found == list_models(uri)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("ALTER TABLE registered_model_aliases RENAME COLUMN alias TO name_of_alias")
    assert read_embedded(uri) is None  # another MLflow's tables
    path.write_bytes(b"no database")
    assert read_embedded(uri) is None
    assert read_embedded(f"sqlite:///{tmp_path}/absent.db") is None
    assert not (tmp_path / "absent.db").exists()
    assert read_embedded("http://127.0.0.1:9") is None


def test_what_is_found_without_mlflow_is_what_mlflow_finds(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["m@best", "m/1", "m", "m@worst", "m/2", "n", "n@best"]

    def said(look_up: Callable[..., object], name: str) -> object:
        try:
            return look_up(f"models:/{name}", registry.uri)
        except ModelError as error:
            return str(error)

    expected = [said(resolve, name) for name in names]
    assert expected[0] == expected[1] == expected[2] != expected[3]
    monkeypatch.setattr("bit_ray.tracking.registry.resolve", lambda *_: pytest.fail("MLflow was asked"))
    assert [said(find, name) for name in names] == expected


@pytest.mark.parametrize(("function", "config"), [(pretrain, PretrainConfig), (finetune, FinetuneConfig)])
def test_a_storage_that_cannot_be_registered_is_refused_before_anything_is_read(function: Any, config: Any) -> None:
    run = config(name="a", shards="/nowhere", storage="s3://bucket/runs?endpoint_override=127.0.0.1:9")
    with pytest.raises(ConfigError, match="^storage: given 's3://bucket/runs.*set AWS_ENDPOINT_URL instead"):
        function(run)


def test_a_package_that_tells_a_password_is_registered_without_it(registry: Registry, tmp_path: Path) -> None:
    told = "s3://AK:PLANTED@bucket/parent"
    spec = replace(SPEC, recipe={"init": [told]}, provenance={"parent": told})
    save_package(tmp_path / "told", create_model(SPEC.model, 3), spec)
    uri = f"sqlite:///{tmp_path}/own/mlflow.db"
    register(str(tmp_path / "told"), name="told", alias="best", tracking_uri=uri)
    assert bit_ray.load_model("models:/told", tracking_uri=uri).spec == spec
    assert list_models(uri)[0].parent == "s3://***@bucket/parent"
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path != tmp_path / "told" / "model.json"]
    assert {"mlflow.db", "reference.json", "MLmodel", "README.md"} <= {path.name for path in written}
    assert [path for path in written if b"PLANTED" in path.read_bytes()] == []


def test_damaged_tags_leave_a_version_out_of_the_list(registry: Registry, caplog: pytest.LogCaptureFixture) -> None:
    client = MlflowClient(tracking_uri=registry.uri)
    client.create_registered_model("damaged")
    tags = {"bit_ray.weights_uri": "/x", "bit_ray.model": "R50x1", "bit_ray.num_classes": "many"}
    client.create_model_version("damaged", "/x", tags=tags)
    with caplog.at_level(logging.WARNING):
        assert [row.name for row in list_models(registry.uri)] == ["m"]
    assert "models:/damaged/1: left out, its tags are damaged" in caplog.text


@pytest.mark.parametrize("name", ["it's", 'say "x"'])
def test_a_name_with_a_quote_is_found(registry: Registry, name: str) -> None:
    client = MlflowClient(tracking_uri=registry.uri)
    client.create_registered_model(name)
    client.create_model_version(name, "/nowhere")
    with pytest.raises(ModelError, match="/1: no readable reference.json"):
        resolve(f"models:/{name}", registry.uri)


@pytest.mark.parametrize("version", ["9" * 5000, "٣", "1\n"])
def test_a_version_that_is_none_is_refused(registry: Registry, version: str) -> None:
    with pytest.raises(ModelError, match="accepted: models:/NAME@ALIAS"):
        resolve(f"models:/m/{version}", registry.uri)
