"""Compare an exported program with the model it was made from: different answers, and the loss of accuracy."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from bit_ray.data.images.decode import ImageError, decode_image
from bit_ray.data.shards.manifest import Manifest, read_manifest
from bit_ray.data.shards.read import read_tables
from bit_ray.errors import ConfigError, DataError
from bit_ray.inference.classifier import Classifier
from bit_ray.weights.export import Exported


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Results of an exported program and of the model on the same images."""

    num_examples: int
    """Images compared."""
    agreement: float
    """Share of them with the same most probable class."""
    mean_difference: float
    """Mean absolute difference of the logits."""
    largest_difference: float
    """Largest absolute difference of the logits."""
    spread: float
    """Standard deviation of the model's logits, the scale to judge a difference by."""
    top_1: tuple[float, float] | None
    """Accuracy of the model and of the program; None if the set has other classes than the model, or several per
    image."""


def compare(
    classifier: Classifier, exported: Exported, shards: str, num_examples: int, batch_size: int = 32
) -> Comparison:
    """Run a model and the program made from it on the first images of a shard set.

    Raises:
        ConfigError: ``num_examples`` is less than 1.
        DataError: A shard is missing or damaged, or an image cannot be decoded.
    """
    if num_examples < 1:
        raise ConfigError.of("num_examples", num_examples, "at least 1", "for example 1000")
    manifest = read_manifest(shards)
    low, high = classifier.spec.input_range
    ours, theirs, labels = [], [], []
    examples = _views(classifier, shards, manifest, num_examples)
    while batch := list(islice(examples, batch_size)):
        views = np.stack([view for view, _ in batch])
        labels += [label for _, label in batch]
        ours.append(classifier.logits(views).cpu().numpy())
        pixels = views.transpose(0, 3, 1, 2).astype(np.float32) * np.float32((high - low) / 255) + np.float32(low)
        theirs.append(exported.logits(np.ascontiguousarray(pixels)))
    a, b = np.concatenate(ours), np.concatenate(theirs)
    difference = np.abs(a - b)
    same = not manifest.multi_label and manifest.class_names == classifier.spec.class_names
    best_a, best_b = a.argmax(axis=1), b.argmax(axis=1)
    return Comparison(
        num_examples=len(a),
        agreement=float((best_a == best_b).mean()),
        mean_difference=float(difference.mean()),
        largest_difference=float(difference.max()),
        spread=float(a.std()),
        top_1=(float((best_a == labels).mean()), float((best_b == labels).mean())) if same else None,
    )


def _views(
    classifier: Classifier, shards: str, manifest: Manifest, num_examples: int
) -> Iterator[tuple[npt.NDArray[np.uint8], int]]:
    seen = 0
    for table in read_tables(shards, manifest):
        for name, image, labels in zip(*(table[c].to_pylist() for c in ("id", "image", "labels")), strict=True):
            if seen == num_examples:
                return
            seen += 1
            try:
                pixels = decode_image(image, convert=manifest.convert_images)
            except ImageError as error:
                raise DataError(f"{shards}: example {name}: {error}; run bit-ray shards verify {shards}") from None
            yield classifier.view(pixels), labels[0] if labels else -1
