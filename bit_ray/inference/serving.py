"""A registered model as MLflow's ``python_function``: image bytes in, classes and probabilities out.

MLflow finds this module by the ``loader_module`` of the MLmodel file that registering writes, and hands it the
``reference.json`` next to that file. So ``mlflow.pyfunc.load_model("models:/NAME@ALIAS")``, ``mlflow models serve`` and
``mlflow models predict`` work wherever bit_ray is installed and the weights can be read. Nothing is unpickled; but
MLflow executes any module that an MLmodel file names, so it should serve only from a trusted registry
(docs/serving.md).
"""

import base64
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from mlflow.exceptions import MlflowException

from bit_ray.config import read_document
from bit_ray.errors import BitRayError, ConfigError, DataError, brief
from bit_ray.inference.classifier import Classifier
from bit_ray.tracking.fetch import fetch
from bit_ray.tracking.reference import parse_reference
from bit_ray.weights.package import load_package

COLUMN = "image"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of one request; each is set by ``BIT_RAY_SERVING_`` and its name, in capitals."""

    max_pixels: int = 25_000_000
    """Pixels of an image: a photograph of 24 megapixels passes. Decoding takes 0.6 GB, at worst 1 GB."""
    max_images: int = 100
    """Images of a request."""
    max_image_bytes: int = 20_000_000
    """Encoded bytes of an image."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise ConfigError.of(_variable(field.name), getattr(self, field.name), "at least 1", "raise it")

    @classmethod
    def from_environment(cls) -> "Limits":
        """Read the limits that are set.

        Raises:
            ConfigError: One of them is not an integer of at least 1.
        """
        given = {}
        for field in fields(cls):
            text = os.environ.get(_variable(field.name), "")
            if text and not (text.isascii() and text.isdigit() and len(text) < 19):
                raise ConfigError.of(_variable(field.name), brief(text), "a whole number of at least 1")
            if text:
                given[field.name] = int(text)
        return cls(**given)


def _variable(name: str) -> str:
    return f"BIT_RAY_SERVING_{name.upper()}"


class ServedClassifier:
    """The object that ``mlflow.pyfunc`` calls."""

    def __init__(self, classifier: Classifier, limits: Limits | None = None) -> None:
        self.classifier = classifier
        self.limits = limits or Limits()

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Classify images, which are decoded one at a time.

        Args:
            model_input: The column ``image``, encoded bytes; in JSON requests MLflow takes them as base64.
            params: ``top_k``, classes to name for each image (default 5), and ``convert``, to convert images that are
                not plain 8-bit RGB (default false).

        Returns:
            A row for each image: ``class`` and ``probability`` of the best, ``classes`` and ``probabilities`` of the
            ``top_k`` best as lists.

        Raises:
            MlflowException: The request is not as above or exceeds a limit, or an image cannot be read; the message
                says which. A server answers with status 400.
        """
        params = params or {}
        try:
            predictions = self.classifier.predict(
                self._encoded(self._column(model_input)),
                params.get("top_k", 5),
                convert=params.get("convert", False),
                max_pixels=self.limits.max_pixels,
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

    def _column(self, frame: pd.DataFrame) -> Iterable[Any]:
        if not isinstance(frame, pd.DataFrame) or list(frame.columns).count(COLUMN) != 1:
            raise DataError(f"request: not a table with one column {COLUMN!r}; accepted: encoded images in that column")
        if not 1 <= len(frame) <= self.limits.max_images:
            raise DataError(
                f"request: {len(frame)} images; accepted: 1 to {self.limits.max_images}; send several requests, or set "
                f"{_variable('max_images')} on the server"
            )
        column: Iterable[Any] = frame[COLUMN]
        return column

    def _encoded(self, column: Iterable[Any]) -> Iterator[bytes]:
        """Return the bytes of images that may still be base64: MLflow decodes frames in JSON, but not ``inputs``.

        No image file has only characters of base64, so the two cannot be confused.
        """
        for index, image in enumerate(column):
            where = f"images[{index}]"
            if not isinstance(image, (bytes, bytearray, str)):
                raise DataError(f"{where}: {type(image).__name__}; accepted: the bytes of an image file, or its base64")
            try:
                image = base64.b64decode(image, validate=True)
            except ValueError:
                if isinstance(image, str):
                    raise DataError(
                        f"{where}: text that is not base64; accepted: the base64 of an image file"
                    ) from None
            if len(image) > self.limits.max_image_bytes:
                raise DataError(
                    f"{where}: {len(image)} bytes; accepted: at most {self.limits.max_image_bytes}; send a smaller "
                    f"file, or set {_variable('max_image_bytes')} on the server"
                )
            yield bytes(image)


def _load_pyfunc(path: str) -> ServedClassifier:
    """Load the model that a ``reference.json`` names.

    It goes to the device that ``MLFLOW_DEFAULT_PREDICTION_DEVICE`` says, else to a GPU where there is one.

    Raises:
        ModelError: Its package does not exist any more, or is not the registered one.
        ConfigError: A limit that the environment sets is not a number.
    """
    limits = Limits.from_environment()
    reference = parse_reference(read_document(Path(path)))
    model, spec = load_package(fetch(reference))
    device = os.environ.get("MLFLOW_DEFAULT_PREDICTION_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    return ServedClassifier(Classifier(model.to(device), spec, reference.sha256), limits)
