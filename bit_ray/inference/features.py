"""Pooled features of a network, its head's input: of a shard set over the whole cluster, or of images in memory."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch

from bit_ray import store
from bit_ray.cluster.slots import Resources
from bit_ray.cluster.tasks import spread_over_cluster
from bit_ray.data.images.resize import resize
from bit_ray.data.shards.manifest import Manifest, read_manifest
from bit_ray.data.shards.scan import Group, read_views, row_groups, single_labels
from bit_ray.errors import ConfigError
from bit_ray.inference.classifier import Classifier, ClassifierState

_BATCH_SIZE = 64


@dataclass(frozen=True)
class FeatureSet:
    """Features and labels of examples, in the order of their set."""

    features: npt.NDArray[np.float32]
    """``[N, D]``."""
    labels: npt.NDArray[np.int64]
    """``[N]`` class indices."""


class CentreCrop(Classifier):
    """A network that sees the centre of images resized to a square; the view it was saved with does not matter."""

    def __init__(self, classifier: Classifier, resize_size: int, crop_size: int) -> None:
        if not crop_size <= resize_size:
            accepted = f"at most resize ({resize_size})"
            raise ConfigError.of("crop", crop_size, accepted, "big_vision has 256 and 224")
        spec = replace(classifier.spec, resize_mode="square", resize_size=resize_size, crop_size=crop_size)
        super().__init__(classifier.model, spec, classifier.sha256)

    def view(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Resize ``[H, W, 3] uint8`` to a square, aspect ignored, and cut out ``[crop_size, crop_size, 3]``."""
        side, size = self.spec.resize_size, self.spec.crop_size
        start = (side - size) // 2
        return resize(image, side, side)[start : start + size, start : start + size]


def image_features(classifier: Classifier, images: Iterable[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
    """Return features ``[N, D]`` of images in memory, each ``[H, W, 3] uint8`` of any size."""
    views = (classifier.view(image) for image in images)
    parts = []
    while batch := list(islice(views, _BATCH_SIZE)):
        parts.append(classifier.features_and_logits(np.stack(batch))[0].cpu().numpy())
    return np.concatenate(parts) if parts else np.empty((0, classifier.model.num_features), np.float32)


def read_features(
    classifier: Classifier,
    shards: str,
    manifest: Manifest,
    indices: npt.NDArray[np.int64] | None = None,
) -> FeatureSet:
    """Return features of a shard set, or of its examples at some indices, in this process.

    Args:
        classifier: Its network and view are used, its head is not.
        shards: The set.
        manifest: Its manifest.
        indices: ``[N]`` ascending indices in the order of the set; None: all.

    Raises:
        ConfigError: The set is multi-label.
        DataError: A shard is missing or damaged, or an image cannot be decoded.
    """
    check_single_label(manifest, shards)
    return _join([_features_of(classifier, shards, manifest, row_groups(manifest, indices), _BATCH_SIZE)])


def cluster_features(
    classifier: Classifier,
    shards: str,
    manifest: Manifest,
    resources: Resources,
    indices: npt.NDArray[np.int64] | None = None,
    *,
    batch_size: int = _BATCH_SIZE,
) -> FeatureSet:
    """`read_features` on the running cluster: one task per part, with a GPU each if there are GPUs."""
    check_single_label(manifest, shards)
    shards = store.absolute(shards)  # tasks may have another current directory
    shared = (classifier.state(), isinstance(classifier, CentreCrop), shards, manifest.digest, batch_size)
    return _join(spread_over_cluster(_part, row_groups(manifest, indices), resources, *shared))


def check_single_label(manifest: Manifest, shards: str) -> None:
    """Refuse a set whose images have several labels.

    Raises:
        ConfigError: The set is multi-label.
    """
    if manifest.multi_label:
        given, accepted = f"{shards} has several labels per image", "one label per image, for draws and probes"
        raise ConfigError.of("shards", given, accepted, "use a single-label set")


def _part(
    groups: list[Group], state: ClassifierState, centre_crop: bool, shards: str, digest: str, batch_size: int
) -> FeatureSet:
    """Return features of some row groups; runs in a Ray task and may run again."""
    classifier = Classifier.from_state(state, "cuda" if torch.cuda.is_available() else "cpu")
    if centre_crop:
        classifier = CentreCrop(classifier, classifier.spec.resize_size, classifier.spec.crop_size)
    return _features_of(classifier, shards, read_manifest(shards, digest), groups, batch_size)


def _features_of(
    classifier: Classifier, shards: str, manifest: Manifest, groups: Sequence[Group], batch_size: int
) -> FeatureSet:
    features, labels = [], []
    for _, views, found in read_views(shards, manifest, groups, classifier.view):
        for start in range(0, len(views), batch_size):
            batch = np.stack(views[start : start + batch_size])
            features.append(classifier.features_and_logits(batch)[0].cpu().numpy())
        labels.append(single_labels(found))
    return FeatureSet(np.concatenate(features), np.concatenate(labels))


def _join(parts: Sequence[FeatureSet]) -> FeatureSet:
    return FeatureSet(np.concatenate([p.features for p in parts]), np.concatenate([p.labels for p in parts]))
