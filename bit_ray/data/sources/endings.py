"""Which files of a folder are images, and what is said of the others."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import PurePath

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".jp2")
"""File name endings, in upper or lower case, that count as images in a folder."""
# Of telephones and cameras; pixels that no library here decodes.
_CONVERTIBLE = (".heic", ".heif", ".avif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw")
_MOST_NAMED = 6


def is_image(name: str) -> bool:
    """Return whether a file counts as an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def others_by_ending(names: Iterable[str]) -> dict[str, int]:
    """Count files that are no images by ending, the most first."""
    endings = Counter(PurePath(name).suffix.lower() or "no ending" for name in names if not is_image(name))
    return dict(sorted(endings.items(), key=lambda item: (-item[1], item[0])))


def named(others: Mapping[str, int]) -> str:
    """Return counts by ending in words, such as ``12 .txt, 2 .heic (convert to JPEG)``."""
    shown = [
        f"{count:,} {ending}{' (convert to JPEG)' if ending in _CONVERTIBLE else ''}"
        for ending, count in list(others.items())[:_MOST_NAMED]
    ]
    if len(others) > _MOST_NAMED:
        shown.append(f"{sum(list(others.values())[_MOST_NAMED:]):,} others")
    return ", ".join(shown)
