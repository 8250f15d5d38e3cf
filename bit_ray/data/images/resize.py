"""The pixels of a view: torch's antialiased resize, and the crops around it."""

import numpy as np
import torch
from torch.nn.functional import interpolate

from bit_ray.data.images.views import Placement, TrainView, place_view
from bit_ray.models.inputs import ResizeMode

_LINE = 100  # longer side over shorter side from which an image counts as a line


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Antialiased bilinear resize of ``[H, W, 3] uint8``: columns before rows, rounding to 8 bits after each.

    It is torch's own for uint8, which torchvision's resize calls as well, but not on every CPU. `_resize.h` repeats
    torch's result on CPUs with AVX2 bit for bit; without AVX2, torch gives other bits.
    """
    if image.shape[:2] == (height, width):
        return image
    pixels = torch.from_numpy(np.require(image, requirements=("C", "W"))).permute(2, 0, 1)[None]
    resized = interpolate(pixels, (height, width), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def train_view(image: np.ndarray, view: TrainView, u: np.ndarray) -> np.ndarray:
    """Return one random training view.

    Args:
        image: ``[H, W, 3] uint8``.
        view: What to draw.
        u: ``[23] float64`` from `uniforms`.

    Returns:
        ``[crop_size, crop_size, 3] uint8``.
    """
    return placed_view(image, place_view(view, image.shape[0], image.shape[1], u), view.crop_size)


def placed_view(image: np.ndarray, placement: Placement, crop_size: int) -> np.ndarray:
    """Return the view at a placement, ``[crop_size, crop_size, 3] uint8``, of an image ``[H, W, 3] uint8``."""
    (top, left, height, width), resized, window, flip = placement
    image = resize(image[top : top + height, left : left + width], *resized)
    image = image[window[0] : window[0] + crop_size, window[1] : window[1] + crop_size]
    return image[:, ::-1] if flip else image


def eval_view(image: np.ndarray, *, resize_mode: ResizeMode, resize_size: int, crop_size: int) -> np.ndarray:
    """Return the fixed view for evaluation.

    ``square`` resizes straight to crop_size x crop_size; it ignores the aspect and crops nothing (BiT-HyperRule, paper
    §3.3; big_transfer:bit_pytorch/train.py). ``shorter_side`` resizes the shorter side to resize_size and crops the
    centre (upstream evaluation, big_vision:configs/bit_i21k.py).

    Args:
        image: ``[H, W, 3] uint8``.
        resize_mode: ``square`` or ``shorter_side``.
        resize_size: Shorter side after the resize, pixels; without effect for ``square``.
        crop_size: Side of the result, pixels.

    Returns:
        ``[crop_size, crop_size, 3] uint8``.
    """
    if resize_mode == "square":
        return resize(image, crop_size, crop_size)
    longest = _LINE * min(image.shape[:2])
    if max(image.shape[:2]) > longest:  # resized whole, a line would take gigabytes; only its middle is kept
        top, left = (max(0, side - longest) // 2 for side in image.shape[:2])
        image = image[top : top + longest, left : left + longest]
    height, width = image.shape[:2]
    scale = resize_size / min(height, width)
    image = resize(image, max(crop_size, round(height * scale)), max(crop_size, round(width * scale)))
    top, left = (image.shape[0] - crop_size) // 2, (image.shape[1] - crop_size) // 2
    return image[top : top + crop_size, left : left + crop_size]
