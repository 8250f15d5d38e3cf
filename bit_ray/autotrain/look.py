"""The first thing that a user sees: what is in the folder, and how it is split.

It imports neither PyTorch nor Ray nor MLflow, so that it comes at once.
"""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bit_ray import store
from bit_ray.autotrain.config import TrainConfig
from bit_ray.autotrain.scan import PARTS, Found, Part, Scan, scan_folder
from bit_ray.autotrain.split import num_shared, split, split_apart, without_copies
from bit_ray.data.sources.endings import named
from bit_ray.errors import ConfigError, DataError
from bit_ray.progress import console, follow, print_table


@dataclass(frozen=True)
class Looked:
    """A folder that was looked through."""

    config: TrainConfig
    """The settings, with a name."""
    scan: Scan
    parts: Mapping[Part, Sequence[Found]]
    started: float
    """``time.monotonic()`` when it began."""
    notes: tuple[str, ...]
    """What was said of it, a line each."""


def look(config: TrainConfig) -> Looked:
    """Look through a folder, split it, and print both.

    Raises:
        BitRayError: There is no such folder, or it has no class folders.
    """
    started = time.monotonic()
    named_after = Path(store.absolute(config.folder).rstrip("/")).name
    name = config.name or re.sub(r"[^\w. -]+", "-", named_after).strip(" .-") or "photos"
    config = replace(config, name=name, register=replace(config.register, name=config.register.name or name))
    with follow("look") as progress:
        scan = scan_folder(config.folder, progress)
    shares = config.val_share, config.test_share, config.seed
    separated = ""
    try:
        parts = split(scan, *shares)
    except DataError as error:
        if not scan.alike:
            raise
        # A class of frames of one film, or of parts on one belt: better a split that is said to be easy than none.
        parts = split(split_apart(scan), *shares)
        separated = f"near-duplicates are not kept in one part: {error}"
    notes = _show(scan, parts, config, separated)
    if config.drop_duplicates:
        parts = without_copies(parts)
        for part in PARTS:
            if not parts[part]:
                given = f"on, and all images of {part} are also in another part"
                raise ConfigError.of("drop_duplicates", given, remedy="leave it out, or add images")
    return Looked(config, scan, parts, started, notes)


def _show(scan: Scan, parts: Mapping[Part, Sequence[Found]], config: TrainConfig, separated: str) -> tuple[str, ...]:
    """Print what is in the folder, how it is split, and why near-duplicates are not kept together; return the lines."""
    counts = {
        part: np.bincount([image.label for image in parts[part]], minlength=len(scan.class_names)) for part in PARTS
    }
    rows = [(name, *(f"{counts[part][label]:,}" for part in PARTS)) for label, name in enumerate(scan.class_names[:20])]
    if len(scan.class_names) > 20:
        rest = slice(20, None)
        rows.append((f"{len(scan.class_names) - 20:,} more", *(f"{counts[part][rest].sum():,}" for part in PARTS)))
    rows.append(("all", *(f"{counts[part].sum():,}" for part in PARTS)))
    print_table(config.folder, rows, ("class", *PARTS))
    given = {image.part for image in scan.images} - {None}
    drawn = [part for part in ("val", "test") if part not in given]
    lines = []
    if drawn:
        lines.append(f"drawn by seed {config.seed}: {' and '.join(drawn)}; copies of an image stay in one part")
    for kind, count in scan.kinds.items():
        lines.append(f"{count:,} {kind}: {'turned upright' if kind == 'stored sideways' else 'converted to 8-bit RGB'}")
    for path, reason in scan.unreadable[:5]:
        lines.append(f"left out: {path}: {reason}")
    if len(scan.unreadable) > 5:
        lines.append(f"left out: {len(scan.unreadable) - 5:,} more that cannot be read")
    if scan.others:
        lines.append(f"left out: {named(scan.others)}")
    if scan.num_duplicates:
        lines.append(f"copies of other images, byte for byte: {scan.num_duplicates:,}")
    if scan.num_near_duplicates:
        what = "near-duplicates of other images (resized, recompressed or cropped)"
        lines.append(f"{what}: {scan.num_near_duplicates:,}, such as {_pair(*scan.alike[0])}")
    if separated:
        lines.append(separated)
    differing = [pair for pair in scan.alike if pair[0].label != pair[1].label]
    lines += [f"alike, with different labels: {_pair(*pair)}" for pair in differing[:5]]
    if len(differing) > 5:
        lines.append(f"alike, with different labels: {len(differing) - 5:,} more pairs")
    if shared := num_shared(parts):
        what = "left out of val and test" if config.drop_duplicates else "leave them out with --drop-duplicates"
        lines.append(f"images of val and test whose copies or near-duplicates are in train or val: {shared:,}; {what}")
    for line in lines:
        console.print(line)
    return tuple(lines)


def _pair(first: Found, second: Found) -> str:
    return f"{first.path} and {second.path}"
