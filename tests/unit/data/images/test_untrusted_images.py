"""Image files that were made to cost more than they are worth, or to break a decoder."""

import io
import struct
import time
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bit_ray.data.images import bombs
from bit_ray.data.images.decode import ImageError, decode_image
from bit_ray.data.images.decode_view import decode_train_view
from bit_ray.data.images.resize import eval_view
from bit_ray.data.images.views import TrainView, example_keys, uniforms

PIXELS = np.stack(np.meshgrid(np.arange(64), np.arange(48)), -1).sum(-1, keepdims=True).repeat(3, 2).astype(np.uint8)


def encode(kind, image=PIXELS, **options):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


def segments(data):
    """The segments of a JPEG file, each with the entropy-coded data behind it, without start and end."""
    starts, at = [], 2
    while data[at : at + 2] != b"\xff\xd9":
        starts.append(at)
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        while data[at] != 0xFF or data[at + 1] in (0, *range(0xD0, 0xD8)):
            at += 1
    return [data[a:b] for a, b in zip(starts, [*starts[1:], at], strict=True)]


def with_scans(num, data):
    """A JPEG file whose last scan is repeated until there are ``num``."""
    parts = segments(data)
    scans = [part for part in parts if part[1] == 0xDA]
    return data[:2] + b"".join(parts) + scans[-1] * (num - len(scans)) + b"\xff\xd9"


def one_component_each(num):
    """A baseline JPEG file of ``num`` scans with one component each, again and again, of a grayscale file's data."""
    parts = segments(encode("JPEG", PIXELS[:, :, 0]))
    frame = b"\xff\xc0\0\x11\x08\0\x30\0\x40\x03" + b"".join(bytes([c, 0x11, 0]) for c in (1, 2, 3))
    head = b"".join(frame if part[1] == 0xC0 else part for part in parts if part[1] != 0xDA)
    scan = next(part for part in parts if part[1] == 0xDA)
    return b"\xff\xd8" + head + b"".join(scan[:5] + bytes([1 + i % 3]) + scan[6:] for i in range(num)) + b"\xff\xd9"


def refused(data, reason, **options):
    """Check that a file is refused for ``reason``, with and without conversion, and when it is trained on."""
    for convert in (False, True):
        with pytest.raises(ImageError, match=reason) as error:
            decode_image(data, convert=convert, **options)
        assert "\n" not in str(error.value)
    if not options:
        view = TrainView(crop="inception", crop_size=32)
        with pytest.raises(ImageError, match=reason):
            decode_train_view(data, view, UNIFORMS, np.empty((32, 32, 3), np.uint8), convert=True)


UNIFORMS = uniforms(0, 0, example_keys(["x"]))[0]


def test_a_progressive_jpeg_of_more_scans_than_any_encoder_makes_is_refused():
    data = encode("JPEG", progressive=True)
    decode_image(with_scans(200, data))
    refused(with_scans(201, data), "^201 scans of 64 x 48 pixels, a decompression bomb; accepted: at most 200 scans")


def test_a_sequential_jpeg_of_very_many_scans_is_refused(extension):
    np.testing.assert_array_equal(decode_image(one_component_each(3))[:, :, 0].shape, (48, 64))
    refused(one_component_each(201), "^201 scans")
    assert extension.header(one_component_each(3)) is None  # what reads one scan only never begins with these


def test_the_larger_an_image_the_fewer_scans_it_may_have():
    data = with_scans(21, encode("JPEG", progressive=True))
    decode_image(data, max_pixels=2 * 48 * 64)
    refused(data, "^21 scans of 64 x 48 pixels, .* at most 20 scans", max_pixels=48 * 64)
    decode_image(with_scans(20, encode("JPEG", progressive=True)), max_pixels=48 * 64)


def test_a_cmyk_jpeg_of_very_many_scans_is_refused():
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).convert("CMYK").save(buffer, "JPEG", progressive=True)
    refused(with_scans(300, buffer.getvalue()), "^300 scans")


def test_the_transcoder_has_the_same_limit(extension):
    extension.make_seekable(one_component_each(bombs.MAX_SCANS))
    with pytest.raises(ValueError, match=f"more than {bombs.MAX_SCANS} scans"):
        extension.make_seekable(one_component_each(bombs.MAX_SCANS + 1))


def test_what_only_looks_like_scans_is_not_counted():
    marks = b"\xff\xda" * 1000
    exif = b"Exif\0\0" + with_scans(150, encode("JPEG", progressive=True))  # a thumbnail
    for progressive in (False, True):
        plain = encode("JPEG", progressive=progressive)
        whole = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:]
        whole = whole[:2] + b"\xff\xfe" + struct.pack(">H", len(marks) + 2) + marks + whole[2:] + marks
        np.testing.assert_array_equal(decode_image(whole), decode_image(plain))


@given(num=st.integers(1, 250), fill=st.integers(0, 5), restarts=st.booleans())
@settings(max_examples=60, deadline=None)
def test_scans_are_counted_whatever_stands_between_them(num, fill, restarts):
    options = {"restart_marker_blocks": 2} if restarts else {}
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    head, *rest = with_scans(num + 10, encode("JPEG", image, progressive=True, **options)).split(b"\xff\xda")
    assert len(rest) == num + 10
    assert bombs.jpeg_scans(head + b"".join(b"\xff" * fill + b"\xff\xda" + part for part in rest)) == num + 10


def tiff(entries, frames=1):
    """A little-endian TIFF of directories of (tag, kind, count, value), a value of bytes being put behind them."""
    size = 2 + 12 * len(entries) + 4
    behind = 8 + frames * size
    content = b""
    values = []
    for _, _, _, value in entries:
        values.append(behind + len(content) if isinstance(value, bytes) else value)
        content += value if isinstance(value, bytes) else b""
    data = bytearray(b"II*\0" + struct.pack("<I", 8))
    for frame in range(frames):
        data += struct.pack("<H", len(entries))
        for (tag, kind, count, _), value in zip(entries, values, strict=True):
            data += struct.pack("<HHII", tag, kind, count, value)
        data += struct.pack("<I", 8 + (frame + 1) * size if frame + 1 < frames else 0)
    return bytes(data + content)


ONE_PIXEL = [(256, 3, 1, 1), (257, 3, 1, 1), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 4)]
ONE_PIXEL += [(277, 3, 1, 1), (278, 3, 1, 1), (279, 4, 1, 1)]


def test_a_tiff_of_very_many_frames_is_animated_at_once():
    data = tiff(ONE_PIXEL, frames=20_000)
    started = time.process_time()
    with pytest.raises(ImageError, match="^animated"):
        decode_image(data)
    assert decode_image(data, convert=True).shape == (1, 1, 3)
    assert time.process_time() - started < 2  # to walk through them all takes ten times as long


@pytest.mark.parametrize("twice", [False, True])
def test_a_tiff_with_tiles_far_larger_than_the_image_is_refused(twice):
    side = 8192
    packed = zlib.compress(bytes(side * side), 9)
    entries = [(256, 3, 1, 16), (257, 3, 1, 16), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]
    entries += [(322, 4, 1, side), (323, 4, 1, side)]
    if twice:  # libtiff takes the first, Pillow the last
        entries += [(322, 3, 1, 16), (323, 3, 1, 16)]
    data = tiff([*entries, (324, 4, 1, packed), (325, 4, 1, len(packed))])
    refused(data, "^tiles of 8192 x 8192 pixels in an image of 16 x 16, a decompression bomb")


def test_a_tiff_of_ordinary_tiles_is_read():
    packed = zlib.compress(bytes(range(256)) * 256)
    entries = [(256, 3, 1, 200), (257, 3, 1, 100), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]
    data = tiff([*entries, (322, 3, 1, 256), (323, 3, 1, 256), (324, 4, 1, packed), (325, 4, 1, len(packed))])
    np.testing.assert_array_equal(decode_image(data, convert=True)[7, :, 0], np.arange(200))


def jpeg2000(tile=None, precinct=None, block=None, size=256):
    """A JPEG 2000 codestream with the sizes of its tiles, precincts and blocks written over."""
    buffer = io.BytesIO()
    image = Image.fromarray(np.zeros((size, size, 3), np.uint8))
    image.save(buffer, "JPEG2000", no_jp2=True, precinct_size=(128, 128), codeblock_size=(32, 32), num_resolutions=3)
    data = bytearray(buffer.getvalue())
    sizes, coding = data.index(b"\xff\x51"), data.index(b"\xff\x52")
    if tile:
        data[sizes + 22 : sizes + 30] = struct.pack(">II", tile, tile)
    if precinct is not None:
        data[coding + 14 : coding + 17] = bytes([precinct * 17] * 3)
    if block is not None:
        data[coding + 10 : coding + 12] = bytes([block, block])
    return bytes(data)


def test_a_jpeg_2000_of_very_many_tiles_precincts_or_blocks_is_refused():
    assert decode_image(jpeg2000()).shape == (256, 256, 3)
    refused(jpeg2000(tile=2), "^16384 tiles in 256 x 256 pixels, a decompression bomb; accepted: at most 1024 tiles")
    refused(jpeg2000(precinct=1), "^21504 blocks in 256 x 256 pixels, a decompression bomb; accepted: at most 4608")
    refused(jpeg2000(block=0), "^5376 blocks in 256 x 256 pixels")


def test_a_bmp_that_skips_gigabytes_of_rows_is_refused():
    palette = b"".join(bytes([i, 255 - i, 0, 0]) for i in range(256))
    rows = b"\0\2\0\xff"  # 255 rows further
    offset = 54 + len(palette)
    head = b"BM" + struct.pack("<IHHI", offset + len(rows), 0, 0, offset)
    head += struct.pack("<IiiHHIIiiII", 40, 1_000_000, 10, 1, 8, 1, len(rows), 0, 0, 256, 0)
    refused(head + palette + rows, "^run-length encoded rows of 1000000 pixels; accepted: at most 65535")


def test_a_ppm_of_very_many_comments_is_refused():
    refused(b"P3 100 100 255\n" + b"#\n" * 2000 + b"1 " * 30_000, "^2000 comments")
    assert decode_image(b"P3 # two\n10 10 255\n# comments\n" + b"1 " * 300).shape == (10, 10, 3)


def test_a_png_of_very_many_colour_profiles_is_refused():
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    data = encode("PNG")
    profile = chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1000)))
    assert decode_image(data[:33] + profile + data[33:]).shape == (48, 64, 3)
    refused(data[:33] + profile * 20 + data[33:], "^20 colour profiles, a decompression bomb")


@pytest.mark.parametrize("data", [None, 5, "text", bytearray(b"x"), [b"x"], np.zeros(3)])
def test_what_is_no_bytes_is_refused_by_its_type(data):
    with pytest.raises(ImageError, match=f"^{type(data).__name__}; accepted: the bytes of an image file$"):
        decode_image(data)


def test_the_view_of_a_line_takes_no_more_memory_than_that_of_an_image():
    line = np.tile(np.arange(200, dtype=np.uint8)[:, None], (1, 500)).reshape(1, -1, 1).repeat(3, 2)
    for image in (line, line.swapaxes(0, 1)):
        # Resized whole, it would be 256 x 25,600,000 pixels. Its middle lies between two runs of 500.
        view = eval_view(image, resize_mode="shorter_side", resize_size=256, crop_size=224)
        assert view.shape == (224, 224, 3)
        assert set(np.unique(view)) <= {99, 100}
    wide = np.random.default_rng(0).integers(0, 256, (4, 400, 3), np.uint8)  # still an image
    full = eval_view(wide, resize_mode="shorter_side", resize_size=256, crop_size=224)
    cut = eval_view(wide[:, 100:300], resize_mode="shorter_side", resize_size=256, crop_size=224)
    np.testing.assert_array_equal(full, cut)


FILES = [encode("JPEG"), encode("JPEG", progressive=True), encode("PNG"), encode("WEBP"), encode("BMP")]
FILES += [encode("GIF"), encode("TIFF"), encode("TIFF", compression="tiff_lzw"), encode("PPM"), jpeg2000(size=64)]
FILES += [encode("JPEG2000"), tiff(ONE_PIXEL, frames=3), b"P3 2 2 255 " + b"1 " * 12]
EDITS = st.lists(st.tuples(st.integers(0, 9999), st.integers(0, 255), st.integers(0, 3)), max_size=12)


def decoded_or_refused(data):
    try:
        return decode_image(data, convert=True, max_pixels=1_000_000)
    except ImageError as error:
        return str(error)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@given(data=st.sampled_from(FILES), edits=EDITS, cut=st.integers(0, 200))
@settings(max_examples=400, deadline=None)
def test_damaged_files_are_decoded_or_refused_in_one_line(data, edits, cut):
    damaged = bytearray(data)
    for place, value, kind in edits:
        at = place % len(damaged) if kind else place % min(len(damaged), 100)
        damaged[at : at + (kind != 2)] = bytes([value]) if kind < 3 else b""
        damaged = damaged or bytearray(b"\0")
    damaged = damaged[: len(damaged) - cut] if cut > 150 else damaged
    result = decoded_or_refused(bytes(damaged))
    if isinstance(result, str):
        assert "\n" not in result
    else:
        assert result.dtype == np.uint8
        assert result.shape[2:] == (3,)


@pytest.mark.parametrize(
    ("resized", "window", "size"),
    [
        ((-(2**31), 1), (2**31 - 1, 0), 1),  # the difference is one, were it not for its overflow
        ((1, -(2**31)), (0, 2**31 - 1), 1),
        ((-(2**31), 32), (0, 0), 32),
        ((32, 32), (2**31 - 1, 0), 32),
        ((0, 32), (0, 0), 32),
        ((32, 32), (0, -1), 32),
    ],
)
def test_the_extension_refuses_windows_outside_of_the_resized_box(resized, window, size, extension):
    with pytest.raises(ValueError, match="^out is no square of RGB pixels inside of the resized box$"):
        extension.view(encode("JPEG"), (0, 0, 9, 9), resized, window, False, np.zeros((size, size, 3), np.uint8))


@pytest.mark.parametrize("change", [bytearray, lambda data: memoryview(bytearray(data)), lambda data: None])
def test_the_extension_takes_nothing_that_may_change_meanwhile(change, extension):
    data = change(encode("JPEG"))
    with pytest.raises(TypeError, match="bytes"):
        extension.header(data)
    with pytest.raises(TypeError, match="bytes"):
        extension.make_seekable(data)
    with pytest.raises(TypeError, match="bytes"):
        extension.view(data, (0, 0, 9, 9), (32, 32), (0, 0), False, np.zeros((32, 32, 3), np.uint8))


def test_the_extension_writes_only_into_whole_writable_squares(extension):
    place = (0, 0, 9, 9), (32, 32), (0, 0), False
    for out in (np.zeros((32, 31, 3), np.uint8), np.zeros(32 * 32 * 3 + 1, np.uint8), np.zeros(0, np.uint8)):
        with pytest.raises(ValueError, match="no square"):
            extension.view(encode("JPEG"), *place, out)
    fixed = np.zeros((32, 32, 3), np.uint8)
    fixed.flags.writeable = False
    for out in (fixed, np.zeros((32, 64, 3), np.uint8)[:, ::2], bytes(3072)):
        with pytest.raises((TypeError, ValueError, BufferError), match="writable|writ|contiguous"):
            extension.view(encode("JPEG"), *place, out)
