"""The embedded upstream data set: characters rendered from the fonts that matplotlib ships, 32x32, dark ink on white.

The classes are the 2,993 characters of Unicode categories L (letters) and S (symbols) that at least 8 of 16 text faces
have, without two that draw nothing. Decimal digits are in neither category, so the downstream digits are never seen.
Letters that only look like digits (O, l, I) are included, as are letters of several scripts that look the same (A,
Greek Alpha, Cyrillic A). Sizes S, M and L mirror BiT-S/M/L: they are the first 50, the first 500 and all classes of one
seeded permutation.
"""

import math
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from matplotlib.ft2font import FT2Font, LoadFlags
from PIL import Image

from bit_ray.data.images.png import rgb_png
from bit_ray.data.sources.base import Example
from bit_ray.errors import ConfigError

FACES = (
    *(
        f"DejaVu{family}{style}"
        for family in ("Sans", "SansMono")
        for style in ("", "-Bold", "-Oblique", "-BoldOblique")
    ),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
)
MIN_FACES = 8
_INVISIBLE = "\u2800\ufffc"  # BRAILLE PATTERN BLANK, OBJECT REPLACEMENT CHARACTER
NUM_CLASSES = {"s": 50, "m": 500, "l": None}
IMAGE_SIZE = 32
# Held-out examples are further draws of the same distribution, far from any training index.
_VAL_START = 1_000_000
_NUM_VAL = 10

# Glyphs are drawn at twice the size and reduced, which antialiases the rough edges of the affine map.
_CANVAS = 2 * IMAGE_SIZE
# Small sizes are drawn coarsely and enlarged, as photographs of small things are.
_FONT_SIZES = (9, 13, 19, 27, 38, 52)
_MAX_INK = 0.9 * _CANVAS
_RANGES = (
    (math.radians(-25), math.radians(25)),  # rotation
    (-0.4, 0.4),  # shear
    (42, 88),  # scale: pixels of the canvas per em
    (0.6, 1.3),  # stretch of the width
    (-0.08 * _CANVAS, 0.08 * _CANVAS),  # offset to the right
    (-0.08 * _CANVAS, 0.08 * _CANVAS),  # offset down
)


@dataclass(frozen=True)
class GlyphPart:
    """Some glyphs, rendered when iterated: (class index, example index) pairs."""

    pairs: list[tuple[int, int]]
    seed: int

    def __iter__(self) -> Iterator[Example]:
        """Render the glyphs in order."""
        characters = permuted_characters(self.seed)
        for label, index in self.pairs:
            id = f"glyphs/U+{ord(characters[label]):04X}/{index:05d}"
            yield Example(id, rgb_png(render_glyph(label, index, seed=self.seed)), (label,))


class GlyphSource:
    """The glyphs of a size, class after class: a ``Source``."""

    multi_label = False

    def __init__(
        self,
        size: Literal["s", "m", "l"],
        *,
        split: Literal["train", "val"] = "train",
        examples_per_class: int | None = None,
        seed: int = 0,
    ) -> None:
        """By default 60 examples per class to train on, or 10 others as validation split."""
        if size not in NUM_CLASSES:
            raise ConfigError.of("size", size, ", ".join(NUM_CLASSES), "choose one")
        if split not in ("train", "val"):
            raise ConfigError.of("split", split, "train, val", "choose one")
        if examples_per_class is not None and examples_per_class < 1:
            raise ConfigError.of("examples_per_class", examples_per_class, "1 or more")
        self.examples_per_class = examples_per_class or (60 if split == "train" else _NUM_VAL)
        self.seed = seed
        self.first_index = 0 if split == "train" else _VAL_START
        self.characters = permuted_characters(seed)[: NUM_CLASSES[size]]
        self.class_names = tuple(class_name(character) for character in self.characters)

    def __len__(self) -> int:
        """Return the number of glyphs."""
        return len(self.characters) * self.examples_per_class

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the glyphs; increase ``version`` when they are drawn differently."""
        return {
            "kind": "glyphs",
            "version": 1,
            "num_classes": len(self.characters),
            "examples_per_class": self.examples_per_class,
            "first_index": self.first_index,
            "seed": self.seed,
        }

    def part(self, indices: npt.NDArray[np.int64]) -> GlyphPart:
        """Return the glyphs at these indices."""
        pairs = (divmod(int(i), self.examples_per_class) for i in indices)
        return GlyphPart([(label, self.first_index + index) for label, index in pairs], self.seed)


@cache
def characters() -> tuple[str, ...]:
    """Return all classes in Unicode order."""
    faces = Counter(code for face in FACES for code in FT2Font(str(_font_path(face))).get_charmap())
    found = (chr(code) for code, count in sorted(faces.items()) if count >= MIN_FACES)
    return tuple(c for c in found if unicodedata.category(c)[0] in "LS" and c not in _INVISIBLE)


@cache
def permuted_characters(seed: int = 0) -> tuple[str, ...]:
    """Return all classes in the seeded order from which every size takes the first."""
    ordered = characters()
    return tuple(ordered[i] for i in np.random.default_rng(seed).permutation(len(ordered)))


def class_name(character: str) -> str:
    """Return the class name, as ``U+0041 LATIN CAPITAL LETTER A``."""
    return f"U+{ord(character):04X} {unicodedata.name(character)}"


def render_glyph(label: int, index: int, *, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Render example ``index`` of class ``label``: [32, 32] uint8, a pure function of the three numbers.

    Drawn uniformly: the face among those that have the character, the size it is drawn at (9 to 52 px), rotation (+-25
    degrees), shear (+-0.4), scale (21 to 44 px per em, less if the ink would not fit), stretch of the width (-40 to
    +30 %) and offset (+-8 % of the side). These ranges are like those of handwriting, not of print.
    """
    character = permuted_characters(seed)[label]
    rng = np.random.default_rng((seed, label, index))
    faces = _faces_with(character)
    size = _FONT_SIZES[rng.integers(len(_FONT_SIZES))]
    ink = _ink(character, faces[rng.integers(len(faces))], size)
    draws = zip(_RANGES, rng.random(len(_RANGES)), strict=True)
    angle, shear, em, stretch, dx, dy = (low + (high - low) * float(u) for (low, high), u in draws)
    scale = min(em / size, _MAX_INK / max(ink.size))
    # Pillow wants the inverse of the map from ink to canvas, rotation * shear * scale about the centres.
    cos, sin = math.cos(angle), math.sin(angle)
    across, down = 1 / (scale * stretch), 1 / scale
    a, b = (cos + shear * sin) * across, (sin - shear * cos) * across
    d, e = -sin * down, cos * down
    x, y = _CANVAS / 2 + dx, _CANVAS / 2 + dy
    coefficients = (a, b, ink.width / 2 - a * x - b * y, d, e, ink.height / 2 - d * x - e * y)
    drawn = ink.transform((_CANVAS, _CANVAS), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    return 255 - np.asarray(drawn.reduce(2))


@cache
def _faces_with(character: str) -> tuple[str, ...]:
    return tuple(face for face in FACES if ord(character) in _codes(face))


@cache
def _codes(face: str) -> frozenset[int]:
    return frozenset(FT2Font(str(_font_path(face))).get_charmap())


@lru_cache(maxsize=65_536)
def _ink(character: str, face: str, size: int) -> Image.Image:
    """Return the drawn character, light on black, cropped to its ink with a border of one pixel."""
    font = _font(face, size)
    # Not with Pillow: its FreeType hinter reads out of bounds in some of these fonts, and cannot be switched off.
    font.set_text(character, 0.0, flags=LoadFlags.NO_HINTING)
    font.draw_glyphs_to_bitmap(antialiased=True)
    drawn = Image.fromarray(np.array(font.get_image(), np.uint8))
    left, top, right, bottom = drawn.getbbox() or (0, 0, 1, 1)
    return drawn.crop((left - 1, top - 1, right + 1, bottom + 1))


@cache
def _font(face: str, size: int) -> FT2Font:
    font = FT2Font(str(_font_path(face)))
    font.set_size(size, 72)
    return font


@cache
def _font_directory() -> Path:
    from matplotlib import get_data_path

    return Path(get_data_path()) / "fonts" / "ttf"


def _font_path(face: str) -> Path:
    return _font_directory() / f"{face}.ttf"
