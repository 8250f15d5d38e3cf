"""Pixels to PNG, without loss."""

import io

import numpy as np
import numpy.typing as npt
from PIL import Image


def rgb_png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Encode ``[H, W, 3] uint8``, or gray ``[H, W]`` repeated over three channels."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if pixels.ndim == 2:
        image = Image.merge("RGB", (image,) * 3)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
