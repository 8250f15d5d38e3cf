"""The demo's answer to one image: the most probable classes, each with a picture of what supports it."""

from typing import Any

from bit_ray.inference.classifier import Classifier
from bit_ray.inference.heat import heat_maps
from bit_ray.plots.heat import heat_picture
from bit_ray.plots.lines import plain
from bit_ray.plots.page import data_uri, fitted

MAX_BYTES = 20_000_000
MAX_PIXELS = 25_000_000
"""As in `bit_ray.inference.serving`, whose module would load MLflow: decoding takes 0.6 GB, at worst 1 GB."""
_PIXELS = 448
_TOP_K = 5


def answer(classifier: Classifier, data: bytes) -> dict[str, Any]:
    """Classify an encoded image of whatever kind.

    Returns:
        Plain data: ``picture``, a data URI, and ``classes``, the best first, each with ``name``, ``probability``,
        ``percent`` and ``heat``, a data URI.

    Raises:
        ImageError: It is no image that can be read.
    """
    pixels = classifier.decode(data, convert=True, max_pixels=MAX_PIXELS)
    view = classifier.view(pixels)
    best, classes = classifier.best(classifier.logits(view[None]), _TOP_K)
    heats = heat_maps(classifier, view, classes[0].tolist())
    # A view of the whole image is shown in the image's own shape, a crop as it is.
    shown = fitted(pixels if classifier.spec.resize_mode == "square" else view, _PIXELS)
    return {
        "picture": data_uri(shown),
        "classes": [
            {
                "name": plain(classifier.spec.class_names[index]),
                "probability": probability,
                "percent": f"{probability:.1%}",
                "heat": data_uri(heat_picture(shown, heat)),
            }
            for index, probability, heat in zip(classes[0].tolist(), best[0].tolist(), heats, strict=True)
        ],
    }
