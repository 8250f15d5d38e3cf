import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from bit_ray.data.images.decode import ImageError, decode_image, orientation, turn
from bit_ray.errors import DataError

RNG = np.random.default_rng(0)
PIXELS = np.stack(np.meshgrid(np.arange(64), np.arange(48)), -1).sum(-1, keepdims=True).repeat(3, 2).astype(np.uint8)
PIXELS = PIXELS + np.array([0, 60, 120], np.uint8)


def encode(image, kind, **options):
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def png(width, height, depth, color, rows):
    """A PNG written by hand, for what Pillow does not write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_give_the_pixels_back(kind):
    image = decode_image(encode(PIXELS, kind))
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, PIXELS)


def test_lossless_webp_gives_the_pixels_back():
    np.testing.assert_array_equal(decode_image(encode(PIXELS, "WEBP", lossless=True)), PIXELS)


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}])
def test_jpeg_is_decoded_as_pillow_decodes_it(options):
    data = encode(PIXELS, "JPEG", quality=90, **options)
    reference = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(decode_image(data).astype(int) - reference).max() <= 2


def test_jpeg_with_stray_bytes_before_a_marker_is_read():
    data = encode(PIXELS, "JPEG", quality=90)
    stray = data[:-2] + b"\x00\x00\x00" + data[-2:]
    np.testing.assert_allclose(decode_image(stray).astype(int), decode_image(data).astype(int), atol=2)


GRAY = PIXELS[:, :, 0]
RGBA = np.dstack([PIXELS, np.full(GRAY.shape, 128, np.uint8)])
REFUSED = {
    "grayscale jpeg": ("grayscale", encode(GRAY, "JPEG")),
    "grayscale png": ("grayscale", encode(GRAY, "PNG")),
    "bilevel": ("grayscale", encode(Image.fromarray(GRAY).convert("1"), "PNG")),
    "cmyk jpeg": ("CMYK", encode(Image.fromarray(PIXELS).convert("CMYK"), "JPEG")),
    "cmyk tiff": ("CMYK", encode(Image.fromarray(PIXELS).convert("CMYK"), "TIFF")),
    "16-bit gray png": ("16-bit", encode(GRAY.astype(np.uint16) << 8, "PNG")),
    "16-bit rgb png": ("16-bit", png(2, 1, 16, 2, b"\0" + struct.pack(">6H", 0x1234, 0, 0xFFFF, 0x80FF, 1, 255))),
    "alpha": ("alpha", encode(RGBA, "PNG")),
    "palette": ("palette", encode(Image.fromarray(PIXELS).quantize(16), "PNG")),
    "animated gif": (
        "animated",
        encode(Image.fromarray(PIXELS), "GIF", save_all=True, append_images=[Image.fromarray(255 - PIXELS)]),
    ),
    "animated webp": (
        "animated",
        encode(Image.fromarray(PIXELS), "WEBP", save_all=True, append_images=[Image.fromarray(255 - PIXELS)]),
    ),
    "animated png": (
        "animated",
        encode(Image.fromarray(PIXELS), "PNG", save_all=True, append_images=[Image.fromarray(255 - PIXELS)]),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_than_8_bit_rgb_is_refused_by_name_with_the_remedy(case):
    kind, data = REFUSED[case]
    with pytest.raises(ImageError) as caught:
        decode_image(data)
    assert caught.value.reason == kind
    assert caught.value.convertible
    assert "--convert-images" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", REFUSED)
def test_convert_takes_all_of_them(case):
    image = decode_image(REFUSED[case][1], convert=True)
    assert image.dtype == np.uint8
    assert image.ndim == 3
    assert image.shape[2] == 3


def test_conversion_rules():
    for case in ("grayscale jpeg", "grayscale png"):
        gray = np.asarray(Image.open(io.BytesIO(REFUSED[case][1])))
        np.testing.assert_array_equal(decode_image(REFUSED[case][1], convert=True), np.dstack([gray] * 3))
    sixteen = decode_image(REFUSED["16-bit gray png"][1], convert=True)
    np.testing.assert_array_equal(sixteen, np.dstack([GRAY] * 3))  # the high byte
    np.testing.assert_array_equal(
        decode_image(REFUSED["16-bit rgb png"][1], convert=True), [[[0x12, 0, 0xFF], [0x80, 0, 0]]]
    )
    over_white = np.round(PIXELS * (128 / 255) + 255 * (127 / 255))
    np.testing.assert_allclose(decode_image(REFUSED["alpha"][1], convert=True), over_white, atol=1)
    first = decode_image(REFUSED["animated png"][1], convert=True)
    np.testing.assert_array_equal(first, PIXELS)
    cmyk = decode_image(REFUSED["cmyk tiff"][1], convert=True)
    np.testing.assert_allclose(cmyk, PIXELS, atol=1)


def test_a_16_bit_image_is_scaled_and_not_wrapped():
    levels = np.array([[0, 255, 256, 0x7FFF, 0xFFFF]], np.uint16)
    np.testing.assert_array_equal(decode_image(encode(levels, "PNG"), convert=True)[0, :, 0], [0, 0, 1, 127, 255])


def bomb():
    return png(20_000, 20_000, 8, 2, bytes(1000))


@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "zero bytes"),
        (b"hello", "not an image"),
        (encode(PIXELS, "JPEG")[:400], "truncated or damaged"),
        (encode(PIXELS, "JPEG")[:-40], "truncated or damaged"),
        (encode(RNG.integers(0, 256, (48, 64, 3), np.uint8), "PNG")[:-2000], "truncated or damaged"),
        (encode(PIXELS, "PNG")[:20], "truncated|not an image"),
        (encode(Image.new("RGB", (12_000, 9_000)), "JPEG"), "12000 x 9000 pixels, a decompression bomb"),
        (bomb(), "bomb"),
        (encode(np.ones((4, 4), np.float32), "TIFF"), "floating-point"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "not an image"),
    ],
)
def test_what_no_conversion_helps_is_always_refused(data, reason, convert):
    with pytest.raises(ImageError, match=reason) as caught:
        decode_image(data, convert=convert)
    assert not caught.value.convertible
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_refused_or_has_all_its_pixels():
    for kind in ("JPEG", "PNG", "WEBP", "BMP"):
        data = encode(PIXELS, kind)
        whole = decode_image(data)
        num_refused = 0
        for length in range(0, len(data), max(1, len(data) // 400)):
            try:
                np.testing.assert_array_equal(decode_image(data[:length]), whole)
            except ImageError:
                num_refused += 1
        assert num_refused > 100  # a PNG may lack its last checksum and end mark, 20 bytes


def test_a_bomb_is_told_from_its_header():
    # The pixel data are missing, so only a check before decoding can name the size.
    with pytest.raises(ImageError, match=r"400000000 pixels|20000 x 20000"):
        decode_image(bomb())


def test_max_pixels_is_a_limit_that_can_be_set():
    data = encode(PIXELS, "JPEG")
    assert decode_image(data, max_pixels=48 * 64).shape == (48, 64, 3)
    with pytest.raises(ImageError, match="at most 3071"):
        decode_image(data, max_pixels=48 * 64 - 1)


def test_an_image_error_is_a_data_error_and_travels_between_processes():
    error = pickle.loads(pickle.dumps(ImageError("grayscale", convertible=True)))
    assert isinstance(error, DataError)
    assert (error.reason, error.convertible) == ("grayscale", True)


@pytest.mark.parametrize("stored", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_image_is_turned_as_pillow_turns_it(stored, kind):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = stored
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, exif=exif, lossless=True, quality=100)
    data = file.getvalue()
    assert orientation(data) == stored
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert np.array_equal(turn(decode_image(data), orientation(data)), expected)


@pytest.mark.parametrize("data", [b"", b"Exif", b"\xff\xd8Exif" + bytes(50), b"RIFF" + bytes(60)])
def test_what_has_no_orientation_that_can_be_read_is_upright(data):
    assert orientation(data) == 1
