"""Encoded images, and what decodes them: whole, the part under a view, and for packing."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from fuzz.kind import Attempt, Case
from fuzz.mutate import Rng, chance, damaged, pick
from fuzz.seeds import encoded, flat_png, picture, png_chunk
from PIL import Image

from bit_ray.data.images.decode import MAX_PIXELS, decode_image
from bit_ray.data.images.decode_view import FAST_PATH, decode_train_view
from bit_ray.data.images.pack import make_seekable
from bit_ray.data.images.resize import train_view
from bit_ray.data.images.views import TrainView, example_keys, uniforms

if FAST_PATH:
    from bit_ray.data.images import _jpeg

_VIEWS = (
    TrainView(crop="inception", crop_size=32),
    TrainView(crop="resize_crop", resize_size=48, crop_size=32),
    TrainView(crop="resize", crop_size=32),
)
_NUMBERS = (-(2**31), -1, 0, 1, 2, 31, 32, 33, 64, 65536, 2**30, 2**31 - 1)


class Kind:
    """Files of every format that is decoded."""

    cpu_s, memory, canaries = 8.0, 2 * 2**30, {}

    def __init__(self, folder: Path) -> None:
        rgb = picture(90, 70)
        alpha = np.dstack([rgb, rgb[:, :, :1]])
        self.jpegs = [
            *(encoded(rgb, quality=85, subsampling=s) for s in (0, 1, 2)),
            encoded(rgb, progressive=True),
            encoded(rgb, restart_marker_blocks=3),
            encoded(rgb, optimize=True, comment=b"x", exif=Image.Exif().tobytes()),
            encoded(rgb, mode="L"),
            encoded(rgb, mode="CMYK"),
            encoded(picture(190, 130), restart_marker_rows=1),
        ]
        if FAST_PATH:
            self.jpegs.append(_jpeg.make_seekable(self.jpegs[2]))
        self.others = [
            encoded(rgb, "PNG"),
            encoded(alpha, "PNG", "RGBA"),
            encoded(rgb, "PNG", "P", transparency=1),
            encoded(rgb, "PNG", "1"),
            encoded((rgb[:, :, 0].astype(np.uint16) << 8), "PNG", "I;16"),
            encoded(rgb, "WEBP"),
            encoded(alpha, "WEBP", "RGBA", lossless=True),
            encoded(rgb, "BMP"),
            encoded(rgb, "PPM"),
            encoded(rgb, "GIF", "P", save_all=True, append_images=[Image.fromarray(rgb[::-1]).convert("P")]),
            *(encoded(rgb, "TIFF", compression=c) for c in ("raw", "tiff_lzw", "jpeg", "tiff_deflate", "packbits")),
            encoded(rgb[:, :, 0].astype(np.float32), "TIFF", "F"),
            encoded(rgb, "JPEG2000"),
        ]
        # Few bytes, many pixels, in many scans.
        self.flat = encoded(np.full((1500, 1500, 3), 99, np.uint8), progressive=True)

    def case(self, rng: Rng) -> Case:
        """Damage a file, or lie in its header, or call the extension with any numbers."""
        if FAST_PATH and chance(rng, 0.05):
            box, resized, window = (tuple(int(pick(rng, _NUMBERS)) for _ in range(n)) for n in (4, 2, 2))
            return Case({"image": pick(rng, self.jpegs)}, partial(self._call, box, resized, window))
        data = self._jpeg(rng) if chance(rng, 0.6) else self._other(rng)
        return Case({"image": data}, partial(self._decode, int(rng.integers(2**32)), chance(rng, 0.5)))

    def _jpeg(self, rng: Rng) -> bytes:
        if chance(rng, 0.015):
            return _with_scans(self.flat, pick(rng, (10, 100, 1000, 10_000)))
        data, action = pick(rng, self.jpegs), int(rng.integers(4))
        if action == 0:
            return _segments_changed(rng, data)
        if action == 1:
            return _with_scans(data, pick(rng, (1, 2, 30, 300)))
        return damaged(rng, data, self.jpegs, 0, pick(rng, (len(data), 700, 64)))

    def _other(self, rng: Rng) -> bytes:
        if chance(rng, 0.01):
            return flat_png(int(rng.integers(1, 3000)), int(rng.integers(1, 3000)))
        data = pick(rng, self.others)
        if data.startswith(b"\x89PNG") and chance(rng, 0.5):
            return _chunk_changed(rng, data)
        return damaged(rng, data, [*self.jpegs, *self.others], 0, pick(rng, (len(data), 700, 64)))

    def _decode(self, seed: int, convert: bool, place: Path, attempt: Attempt) -> None:
        data = (place / "image").read_bytes()
        pixels = attempt(decode_image, data, convert=convert)
        if pixels is not None:
            height, width = pixels.shape[:2]
            assert (pixels.dtype, pixels.shape) == (np.uint8, (height, width, 3)), "no 8-bit RGB"
            assert 0 < height * width <= MAX_PIXELS, "more pixels than are taken"
        view, u = _VIEWS[seed % len(_VIEWS)], uniforms(seed, 0, example_keys(["x"]))[0]
        out = np.zeros((view.crop_size, view.crop_size, 3), np.uint8)
        found = attempt(decode_train_view, data, view, u, out, convert=convert)
        assert found is not None or pixels is None, "a view is refused of an image that is taken"
        if found is not None and pixels is not None:
            assert np.array_equal(out, train_view(pixels, view, u)), f"other pixels by the {found[0]} path"
        if FAST_PATH and pixels is not None and (packed := attempt(make_seekable, data, pixels)) is not None:
            assert np.array_equal(decode_image(packed), pixels), "other pixels after packing"

    def _call(self, box: Any, resized: Any, window: Any, place: Path, attempt: Attempt) -> None:
        """The extension itself, which must look after its memory whatever the numbers are."""
        data = (place / "image").read_bytes()
        for given in (data, bytearray(data)):
            try:
                _jpeg.view(given, box, resized, window, False, np.zeros((32, 32, 3), np.uint8))
            except (ValueError, TypeError, OverflowError, BufferError):
                attempt.refused = True


def _with_scans(data: bytes, times: int) -> bytes:
    """Repeat the last scan."""
    start = data.rfind(b"\xff\xda")
    return data[:start] + data[start:-2] * times + data[-2:]


def _segments_changed(rng: Rng, data: bytes) -> bytes:
    """Repeat, drop, swap or damage segments of a JPEG file."""
    starts = [match.start() for match in re.finditer(rb"\xff[\xc0-\xcf\xda-\xdf\xe0-\xef\xfe]", data)]
    segments = [data[a:b] for a, b in zip([0, *starts], [*starts, len(data)], strict=True)]
    at, other = int(rng.integers(len(segments))), int(rng.integers(len(segments)))
    action = int(rng.integers(4))
    if action == 0:
        segments[at] = damaged(rng, segments[at], segments, 0, 24)
    elif action == 1:
        segments[at] *= pick(rng, (0, 2, 50))
    elif action == 2:
        segments[at], segments[other] = segments[other], segments[at]
    else:
        segments.insert(at, segments[other])
    return b"".join(segments)


def _chunk_changed(rng: Rng, data: bytes) -> bytes:
    """Damage one chunk of a PNG file, and mend its checksum."""
    chunks, at = [], 8
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    number = int(rng.integers(len(chunks)))
    kind, body = chunks[number]
    chunks[number] = kind, damaged(rng, body, [body for _, body in chunks])
    return data[:8] + b"".join(png_chunk(kind, body) for kind, body in chunks)
