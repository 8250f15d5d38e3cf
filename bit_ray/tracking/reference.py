"""What the registry holds in place of a model: ``reference.json``, in an MLflow logged model of a few kilobytes."""

import json
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bit_ray.errors import ModelError, TrackingError
from bit_ray.models.package import ModelSpec, parse_description
from bit_ray.tracking import server
from bit_ray.tracking.server import one_line
from bit_ray.uris import shown

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
PYFUNC_LOADER = "bit_ray.evaluation.serving"
"""Module that makes an MLflow ``python_function`` of the reference; imported by MLflow, where a model is to serve."""


@dataclass(frozen=True, kw_only=True)
class ModelReference:
    """What a version points at: a package directory and what must be found in it."""

    name: str
    version: int
    weights_uri: str
    sha256: str
    num_bytes: int
    description_sha256: str
    spec: ModelSpec

    @property
    def uri(self) -> str:
        """What messages call it."""
        return f"models:/{self.name}/{self.version}" if self.version else f"models:/{self.name}"


def log_reference(
    client: MlflowClient, name: str, spec: ModelSpec, reference: dict[str, Any], run_id: str | None
) -> str:
    """Make an MLflow logged model whose only content is the reference; return its id."""
    run = client.get_run(run_id) if run_id is not None else None
    experiment = run.info.experiment_id if run is not None else server.experiment_id(client, "bit_ray")
    params = {"model": spec.model, "num_classes": str(spec.num_classes), "crop_size": str(spec.crop_size)}
    # MLflow takes a dot in the name of a registered model, but not in that of a logged one.
    logged = client.create_logged_model(
        experiment, name.replace(".", "_"), source_run_id=run_id, params=params, model_type="classifier"
    )
    try:
        with tempfile.TemporaryDirectory() as directory:
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
            # Ties the model to its run in MLflow's pages, with the run's last values as its metrics.
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
        # Where the artifacts go past the server, this is the store's own kind of error.
        place = shown(logged.artifact_location)
        raise TrackingError(f"{name}: cannot be registered: {place}: {one_line(error)}") from None
    return str(logged.model_id)


def read_reference(client: MlflowClient, name: str, version: str) -> ModelReference:
    """Return what a version points at.

    Raises:
        ModelError: bit_ray did not register it, or its artifacts cannot be read.
    """
    try:
        location = client.get_model_version_download_uri(name, version)
        with tempfile.TemporaryDirectory() as directory:
            source = f"{location.rstrip('/')}/{REFERENCE_FILE}"
            path = download_artifacts(source, dst_path=directory, tracking_uri=client.tracking_uri)
            data = Path(path).read_bytes()
        return parse_reference(data, name, int(version))
    except Exception as error:  # where artifacts do not come through the server, it is their store's own kind of error
        if isinstance(error, ModelError):
            raise
        raise _unreadable(f"models:/{name}/{version}", error) from None


def parse_reference(data: bytes, name: str = "", version: int = 0) -> ModelReference:
    """Read the bytes of a ``reference.json``; name and version are for messages, the name by default its own.

    Raises:
        ModelError: they are none.
    """
    try:
        reference = json.loads(data)
        name = name or str(reference.get("name", "unnamed"))
        package_uri, digest = str(reference["package_uri"]), str(reference["description_sha256"])
        description = json.dumps(reference["description"]).encode()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(f"models:/{name}/{version}", error) from None
    spec, weights = parse_description(description, f"models:/{name}/{version}")
    return ModelReference(
        name=name,
        version=version,
        weights_uri=package_uri,
        sha256=weights.sha256,
        num_bytes=weights.num_bytes,
        description_sha256=digest,
        spec=spec,
    )


def _unreadable(uri: str, error: Exception) -> ModelError:
    return ModelError(
        f"{uri}: has no readable {REFERENCE_FILE} ({one_line(error)}); accepted: models that bit_ray registered; load "
        f"others with mlflow"
    )


def _signature() -> ModelSignature:
    """Encoded images in; the best class, and the ``top_k`` best, with their probabilities out."""
    several = [ColSpec(Array(DataType.string), "classes"), ColSpec(Array(DataType.double), "probabilities")]
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, "image")]),
        outputs=Schema([ColSpec(DataType.string, "class"), ColSpec(DataType.double, "probability"), *several]),
        params=ParamSchema([ParamSpec("top_k", DataType.long, 5), ParamSpec("convert", DataType.boolean, False)]),
    )
