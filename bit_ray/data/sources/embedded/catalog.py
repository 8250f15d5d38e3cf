"""The embedded data sets by name: no download, made when asked for."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from bit_ray.data.sources.base import Source
from bit_ray.data.sources.embedded.digits import DigitsSource
from bit_ray.data.sources.embedded.glyphs import GlyphSource
from bit_ray.errors import DataError


@dataclass(frozen=True)
class Entry:
    """One embedded data set."""

    description: str
    open: Callable[[], Source]


CATALOG: dict[str, Entry] = {
    "glyphs:s": Entry("50 classes x 60 rendered characters, 32x32", lambda: GlyphSource("s")),
    "glyphs:m": Entry("500 classes x 60 rendered characters, 32x32", lambda: GlyphSource("m")),
    "glyphs:l": Entry("2,993 classes x 60 rendered characters, 32x32", lambda: GlyphSource("l")),
    "glyphs:s:val": Entry("10 other characters of each class of glyphs:s", lambda: GlyphSource("s", split="val")),
    "glyphs:m:val": Entry("10 other characters of each class of glyphs:m", lambda: GlyphSource("m", split="val")),
    "glyphs:l:val": Entry("10 other characters of each class of glyphs:l", lambda: GlyphSource("l", split="val")),
    "digits": Entry("1,797 handwritten digits, 8x8 brought to 32x32", lambda: DigitsSource()),
    "digits:train": Entry("997 of the handwritten digits, stratified", lambda: DigitsSource("train")),
    "digits:test": Entry("the other 800 handwritten digits", lambda: DigitsSource("test")),
}


def is_embedded(name: str) -> bool:
    """Return whether the text is meant as the name of an embedded data set, known or mistyped."""
    return name.split(":", 1)[0] in {known.split(":", 1)[0] for known in CATALOG} and "/" not in name


def open_embedded(name: str) -> Source:
    """Open an embedded data set.

    Raises:
        DataError: no such name.
    """
    if name not in CATALOG:
        near = difflib.get_close_matches(name, CATALOG, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise DataError(f"{name}: no such embedded data set; accepted: {', '.join(CATALOG)}{hint}")
    return CATALOG[name].open()
