"""The accuracy of a support vector machine on the pixels of thumbnails: a useful network is better."""

import numpy as np
import numpy.typing as npt
from sklearn.svm import SVC

from bit_ray.data.images.resize import resize
from bit_ray.data.shards.manifest import Manifest
from bit_ray.data.shards.scan import read_views, row_groups, single_labels

SIDE = 16
# The machine's time grows with the square of the images.
_MOST_IMAGES = 2_000


def thumbnail_accuracy(train: tuple[str, Manifest], val: tuple[str, Manifest], *, seed: int) -> float:
    """Top-1, a fraction of 1, of a machine that is fitted to training images, on validation images.

    Args:
        train: Shards and manifest; of more than 2,000 images some are drawn.
        val: The same.
        seed: Of the draw.

    Raises:
        DataError: A shard is missing or damaged, or an image cannot be decoded.
    """
    count = train[1].num_examples
    drawn = np.sort(np.random.default_rng(seed).permutation(count)[:_MOST_IMAGES])
    pixels, labels = _read(*train, drawn if len(drawn) < count else None)
    machine = SVC(C=10).fit(pixels, labels)
    return float(machine.score(*_read(*val, None)))


def _read(
    shards: str, manifest: Manifest, indices: npt.NDArray[np.int64] | None
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Pixels ``[N, 768]`` in 0..1 and labels ``[N]``."""
    pixels, labels = [], []
    for _, views, found in read_views(shards, manifest, row_groups(manifest, indices), lambda i: resize(i, SIDE, SIDE)):
        pixels.append(np.stack(views).reshape(len(views), -1).astype(np.float32) / 255)
        labels.append(single_labels(found))
    return np.concatenate(pixels), np.concatenate(labels)
