"""A registered model as MLflow's ``python_function``: image bytes in, classes and probabilities out.

MLflow finds this module by the ``loader_module`` of the MLmodel file that registering writes, and hands it the
``reference.json`` beside that file. So ``mlflow.pyfunc.load_model("models:/NAME@ALIAS")``, ``mlflow models serve`` and
``mlflow models predict`` work wherever bit_ray is installed and the weights can be read. Nothing is unpickled; but
MLflow executes whatever module an MLmodel file names, so it should serve from a registry that is trusted
(docs/serving.md).
"""

import base64
import os
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from mlflow.exceptions import MlflowException

from bit_ray.config import read_document
from bit_ray.errors import BitRayError
from bit_ray.evaluation.classifier import Classifier
from bit_ray.models.package import load_package
from bit_ray.tracking.fetch import fetch
from bit_ray.tracking.reference import parse_reference


class ServedClassifier:
    """What ``mlflow.pyfunc`` calls."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Classify images.

        Args:
            model_input: The column ``image``, encoded bytes; in JSON requests MLflow takes them as base64.
            params: ``top_k``, classes to name for each image (default 5), and ``convert``, to turn what is not plain
                8-bit RGB into it (default false).

        Returns:
            A row for each image: ``class`` and ``probability`` of the best, ``classes`` and ``probabilities`` of the
            ``top_k`` best as lists.

        Raises:
            MlflowException: An image cannot be read; the message says which. A server answers 400 with it.
        """
        params = params or {}
        images = [_decoded(image) for image in model_input["image"]]
        try:
            predictions = self.classifier.predict(
                images, int(params.get("top_k", 5)), convert=bool(params.get("convert", False))
            )
        except BitRayError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        return pd.DataFrame(
            {
                "class": [best[0][0] for best in predictions],
                "probability": [best[0][1] for best in predictions],
                "classes": [[name for name, _ in best] for best in predictions],
                "probabilities": [[probability for _, probability in best] for best in predictions],
            }
        )


def _decoded(image: bytes | str) -> bytes:
    """Return the bytes of an image that may still be base64: MLflow decodes frames in JSON, but not ``inputs``.

    No image file consists of the characters of base64 alone, so the two cannot be mistaken for each other.
    """
    try:
        return base64.b64decode(image, validate=True)
    except ValueError:
        return image.encode() if isinstance(image, str) else bytes(image)


def _load_pyfunc(path: str) -> ServedClassifier:
    """Load the model that a ``reference.json`` names.

    It goes to the device that ``MLFLOW_DEFAULT_PREDICTION_DEVICE`` says, else to a GPU where there is one.

    Raises:
        ModelError: Its package is gone, or is not what was registered.
    """
    reference = parse_reference(read_document(Path(path)))
    model, spec = load_package(fetch(reference))
    device = os.environ.get("MLFLOW_DEFAULT_PREDICTION_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    return ServedClassifier(Classifier(model.to(device), spec, reference.sha256))
