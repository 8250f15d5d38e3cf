"""Encoded image bytes to a training view, written into the batch: the only function that a stream decodes with.

Most photographs are JPEG files of one common kind; only the part that the view needs is decoded, without the GIL. All
other files, and files in which the fast path finds an error, are decoded whole by `decode_image`; only that function
decides what is refused. Pixels are the same either way, so neither the machine nor the path changes what is trained on.
The fast path does not read what is below the box. So damage there, in a file with an intact header, markers and end, is
not noticed until a view needs it.
"""

from typing import Literal

import numpy as np

from bit_ray.data.images.decode import MAX_PIXELS, decode_image
from bit_ray.data.images.resize import placed_view
from bit_ray.data.images.views import Placement, TrainView, place_view

try:
    from bit_ray.data.images import _jpeg
except ImportError:  # no compiler or no libjpeg-turbo when this was installed
    FAST_PATH = False
else:
    FAST_PATH = True
DECODER = "compiled" if FAST_PATH else "plain"
"""Name of what decodes photographs here."""

DecodePath = Literal["partial", "indexed", "full"]
"""How a view was decoded: rows down to the last of its box; restart intervals under its box; or whole."""


def decode_train_view(
    data: bytes, view: TrainView, u: np.ndarray, out: np.ndarray, *, convert: bool
) -> tuple[DecodePath, Placement]:
    """Decode one random training view. Any number of threads may do so at once.

    Args:
        data: An encoded image.
        view: What to draw.
        u: ``[23] float64`` from `uniforms`.
        out: ``[crop_size, crop_size, 3] uint8``, contiguous, for the view; undefined after an error.
        convert: Whether what is not 8-bit RGB is converted instead of refused.

    Returns:
        The path that was taken, and where in the image the view is.

    Raises:
        ImageError: As for `decode_image`.
    """
    if FAST_PATH:
        header = _jpeg.header(data)
        if header is not None and header[0] * header[1] <= MAX_PIXELS:
            placement = place_view(view, header[0], header[1], u)
            try:
                return ("indexed" if _jpeg.view(data, *placement, out) else "partial"), placement
            except ValueError:
                pass
    image = decode_image(data, convert=convert)
    placement = place_view(view, image.shape[0], image.shape[1], u)
    out[:] = placed_view(image, placement, view.crop_size)
    return "full", placement
