"""Requests to a served model: frames of anything, with any parameters."""

import base64
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from fuzz.kind import Attempt, Case
from fuzz.mutate import VALUES, Rng, chance, damaged, pick
from fuzz.seeds import CLASSES, encoded, flat_png, network, picture, spec
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, ErrorCode

from bit_ray.errors import DataError
from bit_ray.inference.classifier import Classifier
from bit_ray.inference.serving import ServedClassifier

_REFUSED = ErrorCode.Name(INVALID_PARAMETER_VALUE)
_ODD = (*VALUES, b"", b"x", 2.5, math.nan, [b"x"], {"b": 1}, np.float64("nan"), np.zeros(3), pd.NaT, pd.NA, "====", "ü")


class Kind:
    """What MLflow gives the model, with nothing of MLflow's checks before it."""

    cpu_s, memory, canaries = 5.0, 2**30, {}

    def __init__(self, folder: Path) -> None:
        self.served = ServedClassifier(Classifier(network().float(), spec()))
        rgb = picture(40, 30)
        kinds = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
        self.images = [encoded(rgb, kind, "P" if kind == "GIF" else "RGB") for kind in kinds]
        self.images.append(encoded(rgb, "PNG", "L"))

    def case(self, rng: Rng) -> Case:
        """A frame of a few rows."""
        image, params = [self._image(rng) for _ in range(int(rng.integers(4)))], self._params(rng)
        return Case({"request.txt": repr((image, params)).encode()[:100_000]}, partial(self._predict, image, params))

    def _image(self, rng: Rng) -> Any:
        if chance(rng, 0.2):
            return pick(rng, _ODD)
        if chance(rng, 0.005):
            return flat_png(int(rng.integers(1, 10_000)), int(rng.integers(1, 10_000)))
        data = pick(rng, self.images)
        if chance(rng, 0.5):
            data = damaged(rng, data, self.images, 0, pick(rng, (len(data), 64)))
        if chance(rng, 0.5):
            return data
        text = base64.b64encode(data).decode()
        return damaged(rng, text.encode()).decode(errors="surrogateescape") if chance(rng, 0.2) else text

    def _params(self, rng: Rng) -> dict[str, Any] | None:
        if chance(rng, 0.3):
            return None
        params: dict[str, Any] = {"top_k": pick(rng, (1, 2, 3, 5, 10**6)), "convert": chance(rng, 0.5)}
        if chance(rng, 0.3):
            params[pick(rng, ("top_k", "top_k", "convert", "x"))] = pick(rng, _ODD)
        return params

    def _predict(self, images: list[Any], params: dict[str, Any] | None, place: Path, attempt: Attempt) -> None:
        frame = pd.DataFrame({"image": pd.Series(images, dtype=object)})
        try:
            answer = self.served.predict(frame, params)
        except MlflowException as error:
            if error.error_code != _REFUSED:
                raise
            raise DataError(str(error)) from None
        assert len(answer) == len(images), "not a row for each image"
        assert set(answer["class"]) <= set(CLASSES), "other classes"
        for probabilities in answer["probabilities"]:
            assert 0 < len(probabilities) <= len(CLASSES), "no probabilities"
            assert all(0 <= p <= 1 for p in probabilities), "no probabilities"
