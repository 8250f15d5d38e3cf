"""Views of an image: random ones for training, a fixed one for evaluation. Pure functions of their arguments.

Randomness is counter-based: the numbers that decide the crop and the flip of an example depend only on (seed, epoch,
example id), so a view is the same on any number of workers, in any order, and after any restart.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal, NamedTuple

import numpy as np

from bit_ray.errors import ConfigError
from bit_ray.models.inputs import MIN_IMAGE_SIZE

_NUM_CROP_ATTEMPTS = 10
_NUM_UNIFORMS = 2 * _NUM_CROP_ATTEMPTS + 3  # (aspect, height) per attempt, then top, left, flip


@dataclass(frozen=True, kw_only=True)
class TrainView:
    """How a training image is cropped and flipped."""

    crop: Literal["inception", "resize_crop", "resize"]
    """``inception``: a random box of the area and aspect below (upstream); ``resize_crop``: resize to a square, then a
    random crop (BiT-HyperRule); ``resize``: straight to the crop size (tasks in which position matters)."""
    crop_size: int
    """Side of the square that the network sees, pixels."""
    resize_size: int = 0
    """Side of the square before the crop, pixels; ``resize_crop`` only."""
    area_range: tuple[float, float] = (0.05, 1.0)
    """Share of the image area that an Inception crop covers (big_vision:pp/ops_image.py; torchvision starts at 8 %)."""
    aspect_range: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of an Inception crop."""
    random_flip: bool = True
    """Mirror left and right with probability 1/2."""

    def __post_init__(self) -> None:
        if self.crop_size < MIN_IMAGE_SIZE:
            accepted, reason = f"at least {MIN_IMAGE_SIZE} pixels", "the network halves its input five times"
            raise ConfigError.of("crop_size", self.crop_size, accepted, reason)
        if self.crop == "resize_crop" and self.resize_size < self.crop_size:
            raise ConfigError.of("resize_size", self.resize_size, f"at least crop_size ({self.crop_size})", "raise it")
        for name, (low, high), limit in (
            ("area_range", self.area_range, 1.0),
            ("aspect_range", self.aspect_range, 1e3),
        ):
            if not 0 < low <= high <= limit:
                accepted = f"0 < low <= high <= {limit:g}"
                raise ConfigError.of(name, f"({low}, {high})", accepted, "give the smaller value first")


def example_keys(ids: Sequence[str]) -> np.ndarray:
    """Stable 64-bit keys of example ids.

    Args:
        ids: N example ids.

    Returns:
        ``[N] uint64``, the first eight bytes of BLAKE2b of each id.
    """
    digests = b"".join(blake2b(i.encode(), digest_size=8).digest() for i in ids)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer (Steele et al. 2014): a bijection of 64-bit words whose outputs pass BigCrush."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(seed: int, epoch: np.ndarray | int, keys: np.ndarray, count: int = _NUM_UNIFORMS) -> np.ndarray:
    """Random numbers that depend only on (seed, epoch, example).

    Args:
        seed: Seed of the run.
        epoch: Epoch number, one for all or ``[N]``.
        keys: ``[N] uint64`` from `example_keys`.
        count: Numbers per example.

    Returns:
        ``[N, count] float64`` in [0, 1).
    """
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        state = _mix(np.asarray(seed, np.uint64) * golden + golden)
        state = _mix(state + np.asarray(epoch, np.uint64) * golden + np.uint64(1))
        state = _mix(state ^ keys)
        words = _mix(np.atleast_1d(state)[:, None] + np.arange(1, count + 1, dtype=np.uint64) * golden)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def inception_box(
    height: int,
    width: int,
    u: Sequence[float] | np.ndarray,
    area_range: tuple[float, float],
    aspect_range: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Return the box of an Inception crop, drawn as TensorFlow draws it.

    The aspect is uniform, and then the *height* is uniform between the heights that give the smallest and the largest
    permitted area (tensorflow:core/kernels/image/sample_distorted_bounding_box_op.cc, which BiT's input used).
    torchvision draws the area uniformly instead, which makes crops larger on average.

    Args:
        height: Image height, pixels.
        width: Image width, pixels.
        u: 22 uniforms or more, float64.
        area_range: Smallest and largest share of the area.
        aspect_range: Smallest and largest width/height.

    Returns:
        (top, left, height, width) in pixels; the whole image when no attempt fits.
    """
    area = height * width
    for attempt in range(_NUM_CROP_ATTEMPTS):
        aspect = aspect_range[0] + (aspect_range[1] - aspect_range[0]) * u[2 * attempt]
        low = round(math.sqrt(area_range[0] * area / aspect))
        high = round(math.sqrt(area_range[1] * area / aspect))
        high = min(high, height, int((width + 0.5 - 1e-7) / aspect))
        low = min(low, high)
        h = low + int(u[2 * attempt + 1] * (high - low + 1))
        w = round(h * aspect)
        # Rounding can move a box just past a bound: one row more or less is tried before the attempt fails.
        if w * h < area_range[0] * area:
            h, w = h + 1, round((h + 1) * aspect)
        if w * h > area_range[1] * area:
            h, w = h - 1, round((h - 1) * aspect)
        if area_range[0] * area <= w * h <= area_range[1] * area and 0 < w <= width and 0 < h <= height:
            top = int(u[-3] * (height - h + 1))
            left = int(u[-2] * (width - w + 1))
            return top, left, h, w
    return 0, 0, height, width


class Placement(NamedTuple):
    """Where a training view comes from: a window of a resized box of the image, possibly mirrored. All in pixels."""

    box: tuple[int, int, int, int]
    """(top, left, height, width) in the image."""
    resized: tuple[int, int]
    """(height, width) that the box is resized to."""
    window: tuple[int, int]
    """(top, left) of the crop_size x crop_size pixels of it that are kept."""
    flip: bool
    """Whether they are mirrored left and right."""


def place_view(view: TrainView, height: int, width: int, u: np.ndarray) -> Placement:
    """Draw where the training view of an image comes from; this needs only the image's size.

    Args:
        view: What to draw.
        height: Image height, pixels.
        width: Image width, pixels.
        u: ``[23] float64`` from `uniforms`.
    """
    size = view.crop_size
    numbers: list[float] = u.tolist()  # NumPy's scalars give the same, ten times slower
    flip = view.random_flip and numbers[-1] < 0.5
    if view.crop == "inception":
        box = inception_box(height, width, numbers, view.area_range, view.aspect_range)
        return Placement(box, (size, size), (0, 0), flip)
    whole = (0, 0, height, width)
    if view.crop == "resize":
        return Placement(whole, (size, size), (0, 0), flip)
    slack = view.resize_size - size + 1
    window = int(numbers[-3] * slack), int(numbers[-2] * slack)
    return Placement(whole, (view.resize_size, view.resize_size), window, flip)
