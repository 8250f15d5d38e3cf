"""The MLflow logged model of a few kilobytes that has ``reference.json``: written at registration, read to look up."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from bit_ray.config import read_document
from bit_ray.errors import ModelError, one_line
from bit_ray.locks import scratch_directory
from bit_ray.tracking import server
from bit_ray.tracking.reference import REFERENCE_FILE, ModelReference, parse_reference
from bit_ray.uris import shown
from bit_ray.weights.package import ModelSpec

# isort: split
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import LoggedModelOutput, Metric
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.pyfunc import add_to_model
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Array

PYFUNC_LOADER = "bit_ray.inference.serving"
"""Module that makes an MLflow ``python_function`` from the reference; MLflow imports it to serve a model."""


def log_reference(
    client: MlflowClient, name: str, spec: ModelSpec, reference: dict[str, Any], run_id: str | None
) -> str:
    """Make an MLflow logged model whose only content is the reference; return its id.

    Raises:
        MlflowException: The server cannot be reached or refuses, or the store of its artifacts does.
    """
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
        raise MlflowException(f"{artifacts}: {one_line(error)}") from None
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


def _signature() -> ModelSignature:
    """Encoded images in; the best class, and the ``top_k`` best, with their probabilities out."""
    several = [ColSpec(Array(DataType.string), "classes"), ColSpec(Array(DataType.double), "probabilities")]
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, "image")]),
        outputs=Schema([ColSpec(DataType.string, "class"), ColSpec(DataType.double, "probability"), *several]),
        params=ParamSchema([ParamSpec("top_k", DataType.long, 5), ParamSpec("convert", DataType.boolean, False)]),
    )
