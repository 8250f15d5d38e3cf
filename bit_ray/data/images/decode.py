"""Encoded image bytes to pixels, strictly: what is not a whole 8-bit RGB image is refused by name, or converted.

With ``convert=True`` a grayscale image is repeated over three channels, 16 bits keep their high byte, and Pillow
converts CMYK and other colour spaces to RGB. Transparent pixels are put over white, palettes are looked up, and an
animation gives its first frame. Colour profiles are ignored, as usual for these sets, and so is the EXIF orientation,
which `orientation` reads and `turn` applies.
"""

import io
import re

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

from bit_ray.data.images.bombs import jpeg_bomb, other_bomb, png_bomb
from bit_ray.errors import DataError

MAX_PIXELS = 100_000_000
# Orientation -> (transposed, then upside down, then mirrored): EXIF 2.32, tag 0x0112.
_TURNS = {
    1: (False, False, False), 2: (False, False, True), 3: (False, True, True), 4: (False, True, False),
    5: (True, False, False), 6: (True, False, True), 7: (True, True, True), 8: (True, True, False),
}  # fmt: skip
_EXIF_WITHIN = 2**17  # bytes; cameras put it first, and a JPEG segment has at most 64 kB
# An explicit list: Pillow's other formats are rare, and some of them run external programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")


class ImageError(DataError):
    """Image bytes that are refused; ``convertible`` says whether ``convert=True`` would take them."""

    def __init__(self, reason: str, *, convertible: bool = False) -> None:
        self.reason = reason
        self.convertible = convertible
        remedy = "; accepted: 8-bit RGB; set convert_images (--convert-images) to convert" if convertible else ""
        super().__init__(reason + remedy)


def decode_image(
    data: bytes, *, convert: bool = False, max_pixels: int = MAX_PIXELS, least: int = 0
) -> npt.NDArray[np.uint8]:
    """Decode one image to [H, W, 3] uint8.

    Where a small image will do, a JPEG is decoded faster at a half, a quarter or an eighth of its size, as far as both
    sides keep ``least`` pixels; 0: at its own.

    Raises:
        ImageError: No bytes, no image, truncated, more than ``max_pixels`` or another kind of bomb (checked from the
            headers, before anything is decoded); and, unless ``convert``, grayscale, CMYK, 16-bit, alpha, palette or
            animated.
    """
    if not isinstance(data, bytes):
        raise ImageError(f"{type(data).__name__}; accepted: the bytes of an image file")
    if not data:
        raise ImageError("zero bytes")
    if data[:2] == b"\xff\xd8":
        image = _decode_jpeg(data, convert, max_pixels, least)
        if image is not None:
            return image
    return _decode_other(data, convert, max_pixels)


def image_kind(data: bytes) -> str:
    """Return what ``convert=True`` would convert an image from, such as ``grayscale``; empty if it is plain 8-bit RGB.

    Only the header is read: the image may still be truncated or damaged.

    Raises:
        ImageError: It is no image of a known format.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            return _not_plain_rgb(image) or ""
    except (ImageError, MemoryError):
        raise
    except Exception:  # Pillow's plugins raise almost anything on damaged input
        raise ImageError("not an image of a known format, or its header is damaged") from None


def orientation(data: bytes) -> int:
    """Return the EXIF orientation of an encoded image, 1 to 8; 1, upright, if it has none that can be read."""
    if b"Exif" not in data[:_EXIF_WITHIN] and b"eXIf" not in data[:_EXIF_WITHIN] and data[:4] != b"RIFF":
        return 1
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except MemoryError:
        raise
    except Exception:  # Pillow's readers raise almost anything on damaged input
        return 1
    return found if isinstance(found, int) and found in _TURNS else 1


def turn(pixels: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    """Return an image ``[H, W, 3] uint8`` as its EXIF orientation says that it is seen: mirrored, turned, or both."""
    transposed, upside_down, mirrored = _TURNS[orientation]
    if transposed:
        pixels = pixels.transpose(1, 0, 2)
    return np.ascontiguousarray(pixels[:: -1 if upside_down else 1, :: -1 if mirrored else 1])


def _decode_jpeg(data: bytes, convert: bool, max_pixels: int, least: int) -> npt.NDArray[np.uint8] | None:
    """Decode a clean JPEG; None for one that is CMYK or that may need a more tolerant decoder."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _check_size(height, width, max_pixels)
    _check(jpeg_bomb(data, height, width, max_pixels))
    if colorspace == "Gray" and not convert:
        raise ImageError("grayscale", convertible=True)
    if colorspace in ("CMYK", "YCCK"):
        return None
    try:
        image: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB", min_height=least, min_width=least)
    except ValueError:  # truncated, or harmless stray bytes between markers: Pillow tells them apart
        return None
    return image


def _decode_other(data: bytes, convert: bool, max_pixels: int) -> npt.NDArray[np.uint8]:
    if data.startswith(b"\x89PNG"):
        _check(png_bomb(data))
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
            _check_size(height, width, max_pixels)
            jpeg = image.format in ("JPEG", "MPO")
            _check(jpeg_bomb(data, height, width, max_pixels) if jpeg else other_bomb(image, data))
            kind = _not_plain_rgb(image)
            if kind and not convert:
                raise ImageError(kind, convertible=True)
            image.load()
            return _to_rgb(image)
    except Image.DecompressionBombError as error:
        size = re.search(r"\((\d+) pixels\)", str(error))
        raise ImageError(_bomb(f"{size[1]} pixels" if size else "very many pixels", max_pixels)) from None
    except UnidentifiedImageError:
        raise ImageError("not an image of a known format, or its header is damaged") from None
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # Pillow's plugins raise almost anything on damaged input
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ImageError(f"truncated or damaged ({reason})") from None


def _not_plain_rgb(image: Image.Image) -> str | None:
    """Return what the image is, if it is not an 8-bit RGB still."""
    if getattr(image, "is_animated", False):  # unlike n_frames, it does not walk through all frames
        return "animated"
    # Pillow opens 16-bit colour as "RGB"; only the decoder's raw mode shows it.
    if image.mode == "F":
        raise ImageError("floating-point pixels; accepted: 8-bit RGB")
    if image.mode.startswith("I") or any(";16" in str(tile) for tile in getattr(image, "tile", ())):
        return "16-bit"
    if image.mode == "CMYK":
        return "CMYK"
    if image.has_transparency_data:
        return "alpha"
    if image.mode == "P":
        return "palette"
    if image.mode in ("1", "L"):
        return "grayscale"
    return None if image.mode == "RGB" else image.mode


def _to_rgb(image: Image.Image) -> npt.NDArray[np.uint8]:
    if image.mode.startswith("I"):
        gray = np.clip(np.asarray(image) >> 8, 0, 255).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.array(image.convert("RGB"), dtype=np.uint8)


def _check(fault: str | None) -> None:
    if fault:
        raise ImageError(fault)


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise ImageError(_bomb(f"{width} x {height} pixels", max_pixels))


def _bomb(size: str, max_pixels: int) -> str:
    return f"{size}, a decompression bomb; accepted: at most {max_pixels} pixels"
