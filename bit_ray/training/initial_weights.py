"""Weights to start a training from."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from bit_ray.errors import ModelError
from bit_ray.inference.classifier import load_model
from bit_ray.weights.location import foreign_path
from bit_ray.weights.read import read_weights


@dataclass(frozen=True)
class InitialWeights:
    """A network to start from."""

    model: str
    """Its name."""
    tensors: Mapping[str, torch.Tensor]
    """Its tensors by name."""
    digest: str
    """SHA-256 of the file they came from."""
    parent: str
    """Name of the parent in a registered model."""


def read_init(uri: str, tracking_uri: str | None) -> InitialWeights:
    """Read weights to start from: a saved model, or those of another program (see `bit_ray.weights.read`).

    Raises:
        ModelError: They do not exist, are damaged, or are for other input.
    """
    if foreign := foreign_path(uri):
        weights = read_weights(foreign)
        low, high = weights.spec.get("input_range", (-1.0, 1.0))
        parent = (
            Path(foreign).stem if os.path.exists(os.path.expanduser(uri.removeprefix("file://"))) else uri
        )  # by its name
        init = InitialWeights(weights.model, weights.tensors, weights.sha256, parent)
    else:
        classifier = load_model(uri, tracking_uri=tracking_uri)
        low, high = classifier.spec.input_range
        parent = uri if uri.startswith("models:/") else classifier.spec.provenance.get("run_name", uri)
        init = InitialWeights(classifier.spec.model, classifier.model.state_dict(), classifier.sha256, parent)
    if (low, high) != (-1.0, 1.0):  # the range of `bit_ray.training.device.normalize`
        raise ModelError(
            f"{uri}: made for pixels from {low:g} to {high:g}; accepted: -1 to 1, as for all BiT weights; "
            "choose other weights"
        )
    return init
