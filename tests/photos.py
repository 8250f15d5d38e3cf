"""Images that resemble photographs, drawn by a seed."""

import numpy as np
from PIL import Image


def photo(seed):
    """A smooth image with an edge, which survives compression; noise would not."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), np.uint8)).resize((240, 180), Image.Resampling.BICUBIC)
    pixels = np.array(coarse)
    top, left = random.integers(20, 100, 2)
    pixels[top : top + 50, left : left + 60] = random.integers(0, 256, 3)
    return Image.fromarray(pixels)
