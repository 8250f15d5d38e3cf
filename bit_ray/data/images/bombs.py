"""Small files that cost a decoder much more than their number of pixels suggests.

The number of pixels bounds the work and the memory of most images. This module checks what else a few bytes can
multiply: scans of a JPEG, tiles and blocks of a JPEG 2000, tiles of a TIFF, and Pillow's work per chunk or comment. It
reads only headers and markers; nothing is decoded.
"""

import re
import struct
from collections.abc import Iterator

from PIL import Image

MAX_SCANS = 200
"""Most scans of a JPEG, as in `_jpeg.c`; encoders make ten."""
SCANS_OF_LARGEST = 20
"""Most scans of a JPEG of ``max_pixels``; a smaller one may have proportionally more: each scan visits all pixels."""

_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")  # in entropy-coded data, FF 00 and restart markers do not count
_SOF = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
_SOI, _EOI, _SOS = 0xD8, 0xD9, 0xDA

_PLAIN_PPM = (b"P1", b"P2", b"P3")
_MAX_COMMENTS = 1000
_MAX_PROFILES = 8
_MAX_RLE_WIDTH = 65_535
_FEW_TILES, _TILE_PIXELS = 1024, 4096
_FEW_BLOCKS, _BLOCK_PIXELS = 4096, 128
_PADDING_FACTOR, _LARGE_TILE = 4, 4096 * 4096
_TILE_WIDTH, _TILE_LENGTH = 322, 323
_TIFF_KINDS = {1: "B", 3: "H", 6: "B", 8: "H", 16: "Q", 17: "Q"}  # byte, short and 64-bit; others are 32-bit


def jpeg_bomb(data: bytes, height: int, width: int, max_pixels: int) -> str | None:
    """Return what is wrong with the scans of a JPEG file, or None.

    A decoder visits every pixel in every scan, and a scan of 20 bytes is possible: 20 KB cost 30 seconds.
    """
    most = min(MAX_SCANS, SCANS_OF_LARGEST * max_pixels // max(1, height * width))
    scans = jpeg_scans(data)
    if scans <= most:
        return None
    return f"{scans} scans of {width} x {height} pixels, a decompression bomb; accepted: at most {most} scans"


def jpeg_scans(data: bytes) -> int:
    """Count the scans of a JPEG file that a decoder reads; for a single sequential scan only the header is read."""
    at, scans, components = 2, 0, 0
    while match := _MARKER.search(data, at):
        marker, at = match[1][0], match.end()
        if marker == _EOI:
            break
        if marker < min(_SOF) or marker == _SOI:  # no length follows
            continue
        body = data[at + 2 : at + 8]
        if marker in _SOF and len(body) == 6:
            components = 0 if marker in _PROGRESSIVE else body[5]
        elif marker == _SOS:
            scans += 1
            if scans == 1 and components and body[:1] == bytes([components]):
                break  # all components in one sequential scan: decoders refuse a second
        at += int.from_bytes(data[at : at + 2])
    return scans


def png_bomb(data: bytes) -> str | None:
    """Return what is wrong with the chunks of a PNG file, or None.

    Pillow unpacks every colour profile, up to a megabyte from a kilobyte, as soon as it opens the file.
    """
    at, profiles = 8, 0
    while at + 8 <= len(data):
        profiles += data[at + 4 : at + 8] == b"iCCP"
        at += 12 + int.from_bytes(data[at : at + 4])
    if profiles <= _MAX_PROFILES:
        return None
    return f"{profiles} colour profiles, a decompression bomb; accepted: one"


def other_bomb(image: Image.Image, data: bytes) -> str | None:
    """Return what an opened image costs beyond its pixels, or None."""
    width, height = image.size
    if image.format == "JPEG2000":
        return _jpeg2000_bomb(data, width, height)
    if image.format == "TIFF":
        return _tiff_bomb(data, width, height)
    if image.format == "BMP" and width > _MAX_RLE_WIDTH and "bmp_rle" in str(getattr(image, "tile", "")):
        # Four bytes skip 255 rows, and Pillow makes each of them.
        return f"run-length encoded rows of {width} pixels; accepted: at most {_MAX_RLE_WIDTH}"
    if image.format == "PPM" and data.startswith(_PLAIN_PPM) and data.count(b"#") > _MAX_COMMENTS:
        return f"{data.count(b'#')} comments, each as slow to read as 64 KB; accepted: at most {_MAX_COMMENTS}"
    return None


def _jpeg2000_bomb(data: bytes, width: int, height: int) -> str | None:
    """Bound what OpenJPEG allocates before it reads a pixel: 12 KB for each tile, 1 KB for each block or precinct."""
    most = max(_FEW_TILES, width * height // _TILE_PIXELS)
    for match in re.finditer(rb"\xff\x4f\xff\x51.{4}(.{32})", data, re.DOTALL):
        x, y, _, _, tile_x, tile_y, left, top = struct.unpack(">8I", match[1])
        tiles = -(-(x - left) // max(1, tile_x)) * -(-(y - top) // max(1, tile_y))
        if tiles > most:
            return f"{tiles} tiles in {width} x {height} pixels, a decompression bomb; accepted: at most {most} tiles"
    most = _FEW_BLOCKS + width * height // _BLOCK_PIXELS
    for sizes in _jpeg2000_blocks(data):
        blocks = 0
        for level, (x, y) in enumerate(reversed(sizes)):
            blocks += -(-max(1, width >> level) // x) * -(-max(1, height >> level) // y)
        if blocks > most:
            return (
                f"{blocks} blocks in {width} x {height} pixels, a decompression bomb; accepted: at most {most} blocks"
            )
    return None


def _jpeg2000_blocks(data: bytes) -> Iterator[list[tuple[int, int]]]:
    """Yield the block sizes of each resolution, the lowest first, of everything that can be a COD or COC marker."""
    for match in re.finditer(rb"\xff[\x52\x53]", data):
        at = match.start()
        fixed, style, levels = (12, at + 4, at + 9) if data[at + 1] == 0x52 else (9, at + 5, at + 6)
        if levels >= len(data) or data[levels] > 32:
            continue
        num = data[levels] + 1
        own = data[style] & 1  # precinct sizes follow
        if int.from_bytes(data[at + 2 : at + 4]) != fixed + own * num or levels + 5 + own * num > len(data):
            continue
        precincts = data[levels + 5 : levels + 5 + num] if own else b"\xff" * num
        block_x, block_y = data[levels + 1] + 2, data[levels + 2] + 2
        yield [(1 << min(block_x, size & 15), 1 << min(block_y, size >> 4)) for size in precincts]


def _tiff_bomb(data: bytes, width: int, height: int) -> str | None:
    """Bound the pixels of the tiles, which are always decoded whole."""
    tile_x, tile_y = _tiff_tile(data)
    if not tile_x or not tile_y:
        return None
    padded = -(-width // tile_x) * tile_x * -(-height // tile_y) * tile_y
    if padded <= _PADDING_FACTOR * width * height + _LARGE_TILE:
        return None
    return (
        f"tiles of {tile_x} x {tile_y} pixels in an image of {width} x {height}, a decompression bomb; accepted: tiles "
        "no larger than the image"
    )


def _tiff_tile(data: bytes) -> tuple[int, int]:
    """Return the largest width and height of a tile in the first directory; 0 without tiles.

    If a tag occurs twice, libtiff and Pillow use different ones, so the tags are read here.
    """
    order = "<" if data[:2] == b"II" else ">"
    big = struct.unpack_from(order + "H", data, 2)[0] == 43
    (at,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
    (count,) = struct.unpack_from(order + ("Q" if big else "H"), data, at)
    at += 8 if big else 2
    entry, value = (20, 12) if big else (12, 8)
    largest = {_TILE_WIDTH: 0, _TILE_LENGTH: 0}
    for entry_at in range(at, min(at + count * entry, len(data) - entry + 1), entry):
        tag, kind = struct.unpack_from(order + "HH", data, entry_at)
        if tag in largest:
            form = _TIFF_KINDS.get(kind, "I")
            where = entry_at + value
            if form == "Q" and not big:
                (where,) = struct.unpack_from(order + "I", data, where)
            largest[tag] = max(largest[tag], struct.unpack_from(order + form, data, where)[0])
    return largest[_TILE_WIDTH], largest[_TILE_LENGTH]
