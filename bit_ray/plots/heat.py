"""Heat over a picture: where it is strong the picture turns orange, elsewhere it pales."""

import numpy as np
import numpy.typing as npt
from PIL import Image

# Okabe and Ito's vermilion, which all kinds of colour vision tell from gray.
_COLOR = np.array([213, 94, 0], np.float32)
_STRONGEST, _PALE = 0.75, 0.55


def heat_picture(picture: npt.NDArray[np.uint8], heat: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    """Draw what speaks for a class over a picture; what speaks against it is drawn as nothing.

    Args:
        picture: ``[H, W, 3] uint8``.
        heat: ``[h, w]``, spread over the whole picture; its largest value is drawn strongest if it is positive.

    Returns:
        ``[H, W, 3] uint8``.
    """
    height, width = picture.shape[:2]
    most = float(heat.max())
    strength = np.clip(heat / most, 0, 1) if most > 0 else np.zeros(heat.shape)
    smooth = Image.fromarray(strength.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    opacity = _STRONGEST * np.clip(np.asarray(smooth), 0, 1)[:, :, None]
    gray = picture.astype(np.float32).mean(axis=2, keepdims=True)
    pale = _PALE * gray + (1 - _PALE) * picture
    return (pale * (1 - opacity) + _COLOR * opacity).round().astype(np.uint8)
