"""What the network looks at: how much each region of an image speaks for a class.

The features of a BiT network are the mean of a map, and its head is linear. So a class's logit is its bias plus the
mean of a value for each cell of the map: the class activation map (Zhou et al. 2016, arXiv 1512.04150), exact here. A
cell is 32 pixels wide. Where a view has fewer than 3 x 3 cells, as those of 32 and 64 pixels, each region is covered
instead, and what the logit loses is its value (occlusion: Zeiler and Fergus 2014, arXiv 1311.2901).
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bit_ray.inference.classifier import Classifier

_LEAST_CELLS = 3
# Covered squares: their side as a share of the view's, and how many there are in a row.
_COVER, _NUM_COVERS = 0.3, 8


@torch.inference_mode()
def heat_maps(classifier: Classifier, view: npt.NDArray[np.uint8], classes: Sequence[int]) -> npt.NDArray[np.float32]:
    """Return what each region of an image adds to the logits of some classes.

    With one label per image a logit counts relative to the mean logit of all classes, which is what decides a softmax.

    Args:
        classifier: Its network is used as it is.
        view: ``[crop_size, crop_size, 3] uint8``, as `Classifier.view` makes it.
        classes: K class indices.

    Returns:
        ``[K, crop_size, crop_size]``; only the differences within a map have a meaning.
    """
    cells = class_activation(classifier, view, classes)
    heat = _occlusion(classifier, view, list(classes)) if cells is None else _spread(cells, len(view))
    return heat.float().cpu().numpy()


@torch.inference_mode()
def class_activation(classifier: Classifier, view: npt.NDArray[np.uint8], classes: Sequence[int]) -> Tensor | None:
    """Return class activation maps ``[K, h, w]``, whose mean is the logit (as in `heat_maps`) less its bias.

    None if the network has too few cells for it, or no map.
    """
    try:
        features = classifier.feature_map(view[None])[0]
    except NotImplementedError:
        return None
    if min(features.shape[1:]) < _LEAST_CELLS:
        return None
    weights = _relative(classifier, classifier.model.head.weight.float())[list(classes)]
    return torch.einsum("kd,dhw->khw", weights, features)


def _spread(cells: Tensor, side: int) -> Tensor:
    """Return cells ``[K, n, n]`` over the pixels ``[K, side, side]``.

    BiT's padding is the same on both sides whatever the size, so cell i looks at pixel 32 i and its surroundings.
    """
    last = cells.shape[1] - 1
    stride = 2 ** math.ceil(math.log2(side / (last + 1)))
    position = (torch.arange(side, device=cells.device) / stride).clamp(max=last)
    # [side, n]: linear between two cells, constant beyond the last.
    share = (1 - (position[:, None] - torch.arange(last + 1, device=cells.device)).abs()).clamp(min=0)
    return share @ cells @ share.T


def _occlusion(classifier: Classifier, view: npt.NDArray[np.uint8], classes: list[int]) -> Tensor:
    """Mean loss of the logits under the squares that cover a pixel, ``[K, H, W]``."""
    side = view.shape[0]
    cover = max(1, round(_COVER * side))
    starts = np.unique(np.linspace(0, side - cover, _NUM_COVERS).round().astype(int))
    squares = [(slice(y, y + cover), slice(x, x + cover)) for y in starts for x in starts]
    covered = np.repeat(view[None], len(squares) + 1, axis=0)
    for image, (rows, columns) in zip(covered[1:], squares, strict=True):
        image[rows, columns] = view.mean(axis=(0, 1))
    logits = _relative(classifier, classifier.logits(covered).T).T[:, classes]
    total = logits.new_zeros((len(classes), side, side))
    count = logits.new_zeros((side, side))
    for lost, (rows, columns) in zip(logits[0] - logits[1:], squares, strict=True):
        total[:, rows, columns] += lost[:, None, None]
        count[rows, columns] += 1
    return total / count


def _relative(classifier: Classifier, values: Tensor) -> Tensor:
    """Return values ``[C, ...]`` of the classes, less their mean where they compete."""
    return values if classifier.spec.multi_label else values - values.mean(dim=0)
