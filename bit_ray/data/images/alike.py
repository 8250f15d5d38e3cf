"""Near-duplicates: images that differ only in size, compression, a slight crop or a small change of tone.

Each image is reduced to a thumbnail. Hashes of thumbnails (the signs of their low frequencies, as in pHash and PDQ) say
which pairs are worth a look; a look lays one thumbnail on the other, by a scale and a shift of each axis (Lucas and
Kanade 1981), and compares what they have in common. Mirrored images are not the same: b is not d.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from PIL import Image

from bit_ray.data.images.decode import decode_image, orientation, turn

SIDE = 32
"""Of a thumbnail, pixels."""
_FREQUENCIES = 16
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
# Of 256 bits 128 differ by chance, give or take 8.
_MOST_BITS = 80
# Copies of one image are each other's nearest; so an image that resembles hundreds costs no more than others.
_NEAREST = 4
_CROPPED = (1.0, 0.95, 0.9)
# Differences of what two thumbnails have in common, as a share of the contrast: of the mean of any block of 4 x 4
# pixels, where another object would show, and of single pixels, where another texture would.
_MOST_IN_A_BLOCK, _MOST_OF_PIXELS = 0.3, 0.5
_LEAST_CONTRAST = 4.0  # levels; what is flatter has nothing to compare
_STEPS = 12
_SCALES, _SHIFT = (0.8, 1.25), 0.12
_TOGETHER = 1024

Thumbnails = npt.NDArray[np.uint8]
"""``[N, SIDE, SIDE, 3]``."""


def thumbnail(data: bytes) -> Thumbnails:
    """Return an encoded image, upright and made square, as ``[SIDE, SIDE, 3] uint8``.

    Raises:
        ImageError: As `decode_image` with ``convert``.
    """
    pixels = decode_image(data, convert=True, least=4 * SIDE)
    small = np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    return turn(small, orientation(data))


def near_duplicates(thumbnails: Thumbnails) -> list[tuple[int, int]]:
    """Return the pairs of images that differ only in size, compression or a slight crop; the lower index first.

    Of more than a few copies of one image not every pair is named, but each copy is in one. The work grows with the
    square of the number of images.

    Args:
        thumbnails: ``[N, SIDE, SIDE, 3] uint8``.
    """
    pixels = thumbnails.astype(np.float32)
    known = np.flatnonzero(pixels.std((1, 2)).max(1) > _LEAST_CONTRAST)
    found: list[tuple[int, int]] = []
    if len(known) < 2:
        return found
    for first, second in _candidates(pixels[known] @ _LUMA):
        a, b = known[first], known[second]
        same = _compare(pixels[a], pixels[b])
        found += zip(a[same].tolist(), b[same].tolist(), strict=True)
    return sorted(found)


def _candidates(luma: npt.NDArray[np.float32]) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Yield pairs of indices whose hashes are near, some at a time; also where one is the middle of the other."""
    views = [_hashes(_warp(luma, *(np.full(len(luma), value, np.float32) for value in (s, 0, s, 0)))) for s in _CROPPED]
    seen: set[int] = set()
    pairs: list[int] = []
    for start in range(0, len(luma), _TOGETHER):
        rows = np.arange(start, min(start + _TOGETHER, len(luma)))
        likeness = np.maximum.reduce([views[0][rows] @ view.T for view in views])
        likeness[np.arange(len(rows)), rows] = -np.inf
        nearest = np.argpartition(-likeness, min(_NEAREST, len(luma) - 1), axis=1)[:, :_NEAREST]
        near = np.take_along_axis(likeness, nearest, 1) >= _FREQUENCIES**2 - 2 * _MOST_BITS
        a, b = np.broadcast_to(rows[:, None], nearest.shape)[near], nearest[near]
        new = {int(pair) for pair in np.minimum(a, b) * len(luma) + np.maximum(a, b)} - seen
        seen |= new
        pairs += sorted(new)
        while len(pairs) >= _TOGETHER or (pairs and rows[-1] == len(luma) - 1):
            some, pairs = np.array(pairs[:_TOGETHER]), pairs[_TOGETHER:]
            yield some // len(luma), some % len(luma)


def _hashes(luma: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return whether each low frequency is above the image's median, -1 or 1: ``[N, 256]``."""
    coordinates, frequencies = (np.arange(SIDE) + 0.5) / SIDE, np.arange(1, _FREQUENCIES + 1)
    waves = np.cos(np.pi * frequencies[:, None] * coordinates).astype(np.float32)
    found = (waves @ luma @ waves.T).reshape(len(luma), -1)
    return np.where(found > np.median(found, axis=1, keepdims=True), 1, -1).astype(np.float32)


def _compare(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Return whether each pair ``[P, SIDE, SIDE, 3]`` is the same where they overlap."""
    a, b = (whole - whole.mean((1, 2, 3), keepdims=True) for whole in (a, b))
    a, b = (whole / (whole.std((1, 2, 3), keepdims=True) + 1e-6) for whole in (a, b))
    alignment = np.tile(np.array([1, 0, 1, 0], np.float32), (len(a), 1))
    for factor, steps in ((2, _STEPS), (1, _STEPS // 2)):
        alignment = _aligned(_shrunk(a @ _LUMA, factor), _shrunk(b @ _LUMA, factor), alignment, steps)
    laid = np.stack([_warp(b[..., channel], *alignment.T) for channel in range(3)], axis=-1)
    common = _inside(alignment, SIDE)[..., None]
    num = common.sum((1, 2, 3)) * 3
    difference = (a - laid) * common
    blocks = difference.reshape(len(a), SIDE // 4, 4, SIDE // 4, 4, 3).mean((2, 4))
    mean = (a * common).sum((1, 2), keepdims=True) * 3 / num[:, None, None, None]
    contrast = np.sqrt((((a - mean) * common) ** 2).sum((1, 2, 3)) / num) + 1e-6
    of_pixels = np.sqrt((difference**2).sum((1, 2, 3)) / num)
    in_a_block = np.abs(blocks).max((1, 2, 3))
    return (in_a_block < _MOST_IN_A_BLOCK * contrast) & (of_pixels < _MOST_OF_PIXELS * contrast)


def _aligned(
    a: npt.NDArray[np.float32], b: npt.NDArray[np.float32], alignment: npt.NDArray[np.float32], steps: int
) -> npt.NDArray[np.float32]:
    """Return for each pair of ``[P, S, S]`` the scales and shifts that lay b on a: ``[P, 4]``, in shares of S."""
    side = a.shape[1]
    coordinates = _coordinates(side)
    down, right = np.gradient(a, 1 / side, axis=(1, 2))
    slopes = np.stack([down * coordinates[:, None], down, right * coordinates, right], axis=-1).reshape(len(a), -1, 4)
    squares = slopes.transpose(0, 2, 1) @ slopes
    damped = squares + 1e-3 * np.trace(squares, axis1=1, axis2=2)[:, None, None] * np.eye(4, dtype=np.float32) + 1e-6
    solve = np.linalg.inv(damped) @ slopes.transpose(0, 2, 1)
    best, least = alignment, np.full(len(a), np.inf, np.float32)
    low, high = np.array([_SCALES[0], -_SHIFT] * 2), np.array([_SCALES[1], _SHIFT] * 2)
    for _ in range(steps):
        common = _inside(alignment, side)
        error = (a - _warp(b, *alignment.T)) * common
        mean = (error**2).sum((1, 2)) / np.maximum(common.sum((1, 2)), 1)
        best = np.where((mean < least)[:, None], alignment, best)
        least = np.minimum(mean, least)
        step = (solve @ error.reshape(len(a), -1, 1))[..., 0]
        alignment = np.clip(alignment + np.clip(step, -0.05, 0.05), low, high).astype(np.float32)
    return best


def _shrunk(pixels: npt.NDArray[np.float32], factor: int) -> npt.NDArray[np.float32]:
    side = pixels.shape[1] // factor
    return pixels.reshape(len(pixels), side, factor, side, factor).mean((2, 4))


def _coordinates(side: int) -> npt.NDArray[np.float32]:
    """Middles of pixels, -0.5 to 0.5."""
    return ((np.arange(side) + 0.5) / side - 0.5).astype(np.float32)


def _inside(alignment: npt.NDArray[np.float32], side: int) -> npt.NDArray[np.bool_]:
    """Return where an image that is laid on another covers it: ``[P, S, S]``."""
    down, right = (
        np.abs(alignment[:, i, None] * _coordinates(side) + alignment[:, i + 1, None]) <= 0.5 for i in (0, 2)
    )
    return down[:, :, None] & right[:, None, :]


def _warp(
    pixels: npt.NDArray[np.float32],
    down: npt.NDArray[np.float32],
    from_top: npt.NDArray[np.float32],
    right: npt.NDArray[np.float32],
    from_left: npt.NDArray[np.float32],
) -> npt.NDArray[np.float32]:
    """Return ``[P, S, S]`` at scales and shifts of each axis, linear between pixels, the border's beyond it."""
    side = pixels.shape[1]

    def weights(scale: npt.NDArray[np.float32], shift: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        at = (scale[:, None] * _coordinates(side) + shift[:, None] + 0.5) * side - 0.5
        nearness = 1 - np.abs(np.clip(at, 0, side - 1)[:, :, None] - np.arange(side))
        return np.maximum(0, nearness).astype(np.float32)

    laid = weights(down, from_top) @ pixels @ weights(right, from_left).transpose(0, 2, 1)
    return laid.astype(np.float32, copy=False)
