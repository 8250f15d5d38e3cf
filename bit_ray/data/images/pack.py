"""Ways to pack images so that they read faster: restart markers, without loss, or fewer pixels.

A JPEG file's entropy-coded bits can only be read from its beginning, or from a restart marker. A seekable file has a
marker about every 96 pixels. A reader finds the markers by one quick pass over the bytes, joins the intervals under its
crop into a small file, and decodes that. No index is stored, and any JPEG decoder reads the file as before.
"""

from types import ModuleType

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from bit_ray.data.images.decode import ImageError, decode_image
from bit_ray.errors import ConfigError

QUALITY = 90
_TURNED_QUALITY = 95


def extension() -> ModuleType:
    """Return the C extension.

    Raises:
        ConfigError: It was not built when bit_ray was installed.
    """
    try:
        from bit_ray.data.images import _jpeg
    except ImportError as error:
        given = f"the JPEG extension is missing ({error})"
        accepted = "a C compiler and the headers of Python and libjpeg-turbo when bit-ray is installed"
        packages = "gcc libc6-dev python3-dev libjpeg-dev"
        remedy = f"install them (Debian: apt-get install {packages}) and then bit-ray again, or leave out --seekable"
        raise ConfigError.of("seekable", given, accepted, remedy) from None
    return _jpeg


def make_seekable(data: bytes, pixels: npt.NDArray[np.uint8]) -> bytes | None:
    """Transcode a JPEG file to baseline with restart markers and optimal Huffman tables, without loss.

    EXIF, colour profile and all other markers are kept. The result has been decoded and compared.

    Args:
        data: An encoded image.
        pixels: ``[H, W, 3] uint8``, the result of `decode_image`.

    Returns:
        The new file, or None if it is not a colour JPEG in YCbCr with whole, half or quarter chroma, or the pixels
        would differ, as may happen with a progressive file that ends early.

    Raises:
        ConfigError: The C extension is missing.
    """
    jpeg = extension()
    if data[:2] != b"\xff\xd8":
        return None
    try:
        packed: bytes = jpeg.make_seekable(data)
        same = jpeg.header(packed) is not None and np.array_equal(decode_image(packed), pixels)
    except (ValueError, ImageError):
        return None
    return packed if same else None


def encode_turned(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Encode an image ``[H, W, 3] uint8`` that was turned: JPEG, quality 95, chroma in full resolution."""
    encoded: bytes = simplejpeg.encode_jpeg(pixels, quality=_TURNED_QUALITY, colorsubsampling="444", fastdct=False)
    return encoded


def shrink(pixels: npt.NDArray[np.uint8], shorter_side: int) -> bytes | None:
    """Re-encode an image with fewer pixels: JPEG, quality 90, chroma in quarter resolution. This loses detail.

    The trade-off: fewer bytes to read and less to decode, but crops have fewer pixels. A small crop of the small image
    is enlarged where one of the original would be reduced, so training no longer sees the paper's input. The loss of
    accuracy depends on the crop size; measure it. 256 to 512 pixels are usual for crops of 224.

    Args:
        pixels: ``[H, W, 3] uint8``.
        shorter_side: Shorter side of the result, pixels.

    Returns:
        The new file, or None if the image is not larger.
    """
    height, width = pixels.shape[:2]
    if min(height, width) <= shorter_side:
        return None
    scale = shorter_side / min(height, width)
    size = max(shorter_side, round(width * scale)), max(shorter_side, round(height * scale))
    small = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
    encoded: bytes = simplejpeg.encode_jpeg(small, quality=QUALITY, colorsubsampling="420", fastdct=False)
    return encoded
