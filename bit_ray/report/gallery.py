"""Single images on the page of a model, each next to what spoke for the predicted class."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bit_ray.data.shards.manifest import Manifest
from bit_ray.data.shards.read import read_tables
from bit_ray.data.shards.scan import Image, read_views, row_groups
from bit_ray.evaluation.evaluate import label_names
from bit_ray.evaluation.worst import WorstPrediction
from bit_ray.inference.classifier import Classifier
from bit_ray.inference.heat import heat_maps
from bit_ray.plots.heat import heat_picture
from bit_ray.plots.page import data_uri, fitted

_PIXELS = 224


@dataclass(frozen=True, kw_only=True)
class Shot:
    """An image with its prediction."""

    picture: str
    """What the network sees, as a data URI."""
    heat: str
    """The same with what speaks for the predicted class, as a data URI."""
    id: str
    true: str
    """Its class, in words."""
    predicted: str
    confidence: float
    right: bool


def gallery(
    classifier: Classifier, shards: str, manifest: Manifest, predictions: Sequence[WorstPrediction]
) -> list[Shot]:
    """Return predictions with their pictures, in their order.

    Args:
        classifier: The model that has made them.
        shards: The set that they are of.
        manifest: Its manifest.
        predictions: They are read again, at the size that the network sees.

    Raises:
        DataError: A shard is missing or damaged.
    """
    if not predictions:
        return []
    wanted = {item.id for item in predictions}
    ids = (name for table in read_tables(shards, manifest, ("id",)) for name in table["id"].to_pylist())
    indices = np.array([index for index, name in enumerate(ids) if name in wanted], np.int64)
    views: dict[str, Image] = {}
    for names, found, _ in read_views(shards, manifest, row_groups(manifest, indices), classifier.view):
        views.update(zip(names, found, strict=True))
    shots = []
    for item in predictions:
        view = views[item.id]
        [heat] = heat_maps(classifier, view, [item.predicted])
        picture = fitted(view, _PIXELS)
        shots.append(
            Shot(
                picture=data_uri(picture),
                heat=data_uri(heat_picture(picture, heat)),
                id=item.id,
                true=label_names(item, manifest.class_names),
                predicted=manifest.class_names[item.predicted],
                confidence=item.confidence,
                right=item.predicted in item.labels,
            )
        )
    return shots
