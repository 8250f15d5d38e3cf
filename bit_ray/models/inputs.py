"""The input of a network, as plain values: no PyTorch."""

from typing import Literal

MIN_IMAGE_SIZE = 32
"""Side of the smallest image, pixels: the network halves its input five times."""
ResizeMode = Literal["square", "shorter_side"]
"""How an image is resized: see `bit_ray.data.images.resize.eval_view`."""
