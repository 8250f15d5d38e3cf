"""The embedded data sets by name: no download, made on demand."""

from collections.abc import Callable

from bit_ray.data.sources.base import Source
from bit_ray.data.sources.embedded.digits import DigitsSource
from bit_ray.data.sources.embedded.glyphs import GlyphSource
from bit_ray.errors import DataError, did_you_mean

CATALOG: dict[str, Callable[[], Source]] = {
    "glyphs:s": lambda: GlyphSource("s"),  # 50 classes x 60 rendered characters, 32x32
    "glyphs:m": lambda: GlyphSource("m"),  # 500 classes x 60 rendered characters, 32x32
    "glyphs:l": lambda: GlyphSource("l"),  # 2,993 classes x 60 rendered characters, 32x32
    "glyphs:s:val": lambda: GlyphSource("s", split="val"),  # 10 other characters of each class of glyphs:s
    "glyphs:m:val": lambda: GlyphSource("m", split="val"),  # 10 other characters of each class of glyphs:m
    "glyphs:l:val": lambda: GlyphSource("l", split="val"),  # 10 other characters of each class of glyphs:l
    "digits": lambda: DigitsSource(),  # 1,797 handwritten digits, 8x8 resized to 32x32
    "digits:train": lambda: DigitsSource("train"),  # 997 of the handwritten digits, stratified
    "digits:test": lambda: DigitsSource("test"),  # the other 800 handwritten digits
}


def is_embedded(name: str) -> bool:
    """Return whether the text looks like the name of an embedded data set, even if mistyped."""
    return name.split(":", 1)[0] in {known.split(":", 1)[0] for known in CATALOG} and "/" not in name


def open_embedded(name: str) -> Source:
    """Open an embedded data set.

    Raises:
        DataError: No such name.
    """
    if name not in CATALOG:
        raise DataError(
            f"{name}: no such embedded data set; accepted: {', '.join(CATALOG)}{did_you_mean(name, CATALOG)}"
        )
    return CATALOG[name]()
