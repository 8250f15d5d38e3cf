"""Contact sheets: many images with a line or two about each, on one PNG."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from bit_ray import store

COLORS = ("#0b6e99", "#d9730d", "#6b4fa0")
_TILE = 112
_TEXT = 34
_GAP = 8
_PAPER, _INK = "#e1e4e8", "#000000"

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One image of a sheet."""

    pixels: npt.NDArray[np.uint8]
    """``[H, W, 3] uint8``."""
    text: str
    """Text below the image, on at most two lines; a line break in it is kept."""
    frame: str = ""
    """Colour of a frame around the image; empty: none."""
    boxes: tuple[tuple[int, int, int, int, str], ...] = ()
    """Outlines in the image: top, left, height and width in pixels, and a colour."""


def write_sheet(path: str | Path, tiles: Sequence[Tile], *, columns: int = 8, together: int = 1) -> None:
    """Write a contact sheet, row by row.

    Args:
        path: PNG file to write, or its URI.
        tiles: At least one.
        columns: Most tiles in a row, a multiple of ``together``.
        together: Tiles that belong together; the gap between such groups is wider.
    """
    assert tiles
    assert columns % together == 0
    columns = min(columns, len(tiles))
    wider = _GAP * 2 if together > 1 else 0
    width = _GAP + columns * (_TILE + _GAP) + (-(-columns // together) - 1) * wider
    height = _GAP + -(-len(tiles) // columns) * (_TILE + _TEXT + _GAP)
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    import matplotlib  # a quarter of a second, which each training worker would take that never draws one

    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), 10)  # Pillow's is ASCII
    for i, tile in enumerate(tiles):
        row, column = divmod(i, columns)
        x = _GAP + column * (_TILE + _GAP) + column // together * wider
        y = _GAP + row * (_TILE + _TEXT + _GAP)
        image, scale = _fitted(tile.pixels)
        left, top = x + (_TILE - image.width) // 2, y + (_TILE - image.height) // 2
        sheet.paste(image, (left, top))
        for box_top, box_left, box_height, box_width, color in tile.boxes:
            a, b = left + box_left * scale, top + box_top * scale
            draw.rectangle((a, b, a + box_width * scale - 1, b + box_height * scale - 1), outline=color, width=2)
        if tile.frame:
            draw.rectangle((left - 3, top - 3, left + image.width + 2, top + image.height + 2), None, tile.frame, 3)
        for line, text in enumerate(_lines(tile.text, font)):
            draw.text((x, y + _TILE + 3 + 14 * line), text, fill=_INK, font=font)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    store.write_bytes(path, buffer.getvalue())


def _fitted(pixels: npt.NDArray[np.uint8]) -> tuple[Image.Image, float]:
    """Return the image at the size of a tile, and the factor from its pixels to the tile's."""
    image = Image.fromarray(pixels)
    scale = _TILE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.BILINEAR), scale


def _lines(text: str, font: _Font) -> list[str]:
    """Break the text into at most two lines of a tile's width, and cut off the remainder."""
    lines = []
    for part in text.split("\n"):
        lines.append("")
        for word in part.split():
            longer = f"{lines[-1]} {word}".strip()
            if font.getlength(longer) <= _TILE or not lines[-1]:
                lines[-1] = longer
            else:
                lines.append(word)
    if len(lines) > 2:
        lines = text.split("\n") if "\n" in text else [lines[0], " ".join(lines[1:])]
    return [line if font.getlength(line) <= _TILE else _cut(line, font) for line in lines]


def _cut(line: str, font: _Font) -> str:
    while line and font.getlength(line + "...") > _TILE:
        line = line[:-1]
    return line + "..."
