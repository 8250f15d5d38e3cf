"""What the registry has instead of a model: ``reference.json``, in an MLflow logged model of a few kilobytes."""

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bit_ray import store
from bit_ray.config import check_digest, check_num_bytes, from_json, is_plain, read_document
from bit_ray.errors import ConfigError, DataError, ModelError, TrackingError
from bit_ray.locks import scratch_directory
from bit_ray.tracking import server
from bit_ray.tracking.server import one_line
from bit_ray.uris import shown
from bit_ray.weights.package import Description, ModelSpec

# isort: split
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import LoggedModelOutput, Metric
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.pyfunc import add_to_model
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Array

REFERENCE_FILE = "reference.json"
PYFUNC_LOADER = "bit_ray.inference.serving"
"""Module that makes an MLflow ``python_function`` from the reference; MLflow imports it to serve a model."""

_MAX_URI = 4096  # Linux's limit for a path; a store's limit for a key is 1,024 bytes


@dataclass(frozen=True, kw_only=True)
class ModelReference:
    """What a version points to: a package directory and the content that it must have."""

    name: str
    version: int
    weights_uri: str
    sha256: str
    num_bytes: int
    description_sha256: str
    spec: ModelSpec

    def __post_init__(self) -> None:
        check_digest("sha256", self.sha256)
        check_digest("description_sha256", self.description_sha256)
        check_num_bytes("num_bytes", self.num_bytes)
        check_package_uri(self.weights_uri)

    @property
    def uri(self) -> str:
        """Its name in messages."""
        return f"models:/{self.name}/{self.version}" if self.version else f"models:/{self.name}"


@dataclass(frozen=True, kw_only=True)
class _Document:
    """The content of ``reference.json``."""

    name: str = "unnamed"
    package_uri: str
    description_sha256: str
    description: Description

    def __post_init__(self) -> None:
        # Characters that MLflow refuses in the name of a model, or that would break the line of a message.
        if not self.name.strip() or {"/", ":"} & {*self.name} or len(self.name) > 256 or not is_plain(self.name):
            raise ConfigError.of("name", f"given {self.name[:80]!r}", "the name of a registered model")


def check_package_uri(uri: str, field: str = "package_uri") -> None:
    """Refuse what may not be in a registry as the URI of a package; ``field`` is its name in the message.

    A user who loads a version reads from this URI with his own keys. So it may contain no keys, which all could read,
    and no query, which could name another server to send the user's keys to.

    Raises:
        ConfigError: It is neither an absolute local path nor a bucket and a path in it, or has other parts.
    """
    if len(uri) > _MAX_URI:
        raise ConfigError.of(field, f"{len(uri):,} characters", f"at most {_MAX_URI:,}")
    given = f"given {shown(uri)!r}"
    if not is_plain(uri):
        raise ConfigError.of(field, given, "text without control characters")
    if uri.startswith(("/", "file:///")):
        return
    match = re.fullmatch(r"(?:s3|gs)://([^/?]+)(?:/[^?]*)?(\?.*)?", uri)
    if match is None:
        raise ConfigError.of(field, given, "an absolute local path, s3://bucket/path or gs://bucket/path")
    try:
        store.check_uri(uri)
    except DataError as error:
        raise ConfigError(str(error)).about(field) from None
    if match[2]:
        accepted, remedy = "a URI without a query", "leave the query out, and set AWS_ENDPOINT_URL instead"
        raise ConfigError.of(field, given, accepted, remedy)
    if not re.fullmatch(r"(?:anonymous@)?[\w.-]+", match[1], re.ASCII):
        raise ConfigError.of(field, given, "the name of a bucket, of letters, digits, . _ and -")


def log_reference(
    client: MlflowClient, name: str, spec: ModelSpec, reference: dict[str, Any], run_id: str | None
) -> str:
    """Make an MLflow logged model whose only content is the reference; return its id."""
    run = client.get_run(run_id) if run_id is not None else None
    experiment = run.info.experiment_id if run is not None else server.experiment_id(client, "bit_ray")
    params = {"model": spec.model, "num_classes": str(spec.num_classes), "crop_size": str(spec.crop_size)}
    # MLflow allows a dot in the name of a registered model, but not in that of a logged one.
    logged = client.create_logged_model(
        experiment, name.replace(".", "_"), source_run_id=run_id, params=params, model_type="classifier"
    )
    try:
        with scratch_directory() as directory:
            mlmodel = Model(
                artifact_path=logged.artifact_location,
                run_id=run_id,
                signature=_signature(),
                model_id=logged.model_id,
                model_uuid=logged.model_id,
            )
            add_to_model(mlmodel, loader_module=PYFUNC_LOADER, data=REFERENCE_FILE)
            mlmodel.add_flavor("bit_ray", reference=REFERENCE_FILE, package_uri=reference["package_uri"])
            mlmodel.save(str(Path(directory, "MLmodel")))
            Path(directory, REFERENCE_FILE).write_text(json.dumps(reference, indent=2) + "\n", encoding="utf-8")
            client.log_model_artifacts(logged.model_id, directory)
        client.finalize_logged_model(logged.model_id, "READY")
        if run is not None:
            # Links the model to its run in MLflow's pages, with the run's last values as its metrics.
            client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
            metrics = [
                Metric(metric.key, metric.value, metric.timestamp, metric.step, model_id=logged.model_id, run_id=run_id)
                for metric in run.to_proto().data.metrics
                if not metric.key.startswith("system/")
            ]
            client.log_batch(run_id, metrics=metrics, synchronous=True)
    except Exception as error:
        with suppress(Exception):
            client.finalize_logged_model(logged.model_id, "FAILED")
        if isinstance(error, MlflowException):
            raise
        # If the artifacts do not go through the server, this is the store's own kind of error.
        artifacts = shown(logged.artifact_location)
        raise TrackingError(f"{name}: cannot be registered: {artifacts}: {one_line(error)}") from None
    return str(logged.model_id)


def read_reference(client: MlflowClient, name: str, version: str) -> ModelReference:
    """Return what a version points to.

    Raises:
        ModelError: bit_ray did not register it, or its artifacts cannot be read.
    """
    try:
        location = client.get_model_version_download_uri(name, version)
        with scratch_directory() as directory:
            source = f"{location.rstrip('/')}/{REFERENCE_FILE}"
            path = download_artifacts(source, dst_path=directory, tracking_uri=client.tracking_uri)
            data = read_document(Path(path))
        return parse_reference(data, name, int(version))
    except Exception as error:  # if artifacts do not come through the server, it is their store's own kind of error
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"models:/{name}/{version}: no readable {REFERENCE_FILE} ({one_line(error)}); accepted: models that "
            f"bit_ray registered; load others with mlflow"
        ) from None


def parse_reference(data: bytes, name: str = "", version: int = 0) -> ModelReference:
    """Read the bytes of a ``reference.json``; name and version are for messages, the name by default its own.

    Raises:
        ModelError: They are not such a file.
    """
    try:
        document = from_json(_Document, data)
        name = name or document.name
        return ModelReference(
            name=name,
            version=version,
            weights_uri=document.package_uri,
            sha256=document.description.weights.sha256,
            num_bytes=document.description.weights.num_bytes,
            description_sha256=document.description_sha256,
            spec=document.description.spec,
        )
    except ConfigError as error:
        raise ModelError(
            f"models:/{name}/{version}: {REFERENCE_FILE} is damaged ({one_line(error)}); accepted: one that bit_ray "
            "wrote; register the model again"
        ) from None


def _signature() -> ModelSignature:
    """Encoded images in; the best class, and the ``top_k`` best, with their probabilities out."""
    several = [ColSpec(Array(DataType.string), "classes"), ColSpec(Array(DataType.double), "probabilities")]
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, "image")]),
        outputs=Schema([ColSpec(DataType.string, "class"), ColSpec(DataType.double, "probability"), *several]),
        params=ParamSchema([ParamSpec("top_k", DataType.long, 5), ParamSpec("convert", DataType.boolean, False)]),
    )
