"""Look at a shard set: what is in it, as numbers and as a picture."""

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from bit_ray.data import store
from bit_ray.data.decode import decode_image
from bit_ray.data.manifest import Manifest, read_manifest
from bit_ray.data.shards import Example, open_shard, read_rows, to_examples
from bit_ray.errors import ConfigError

_NUM_THREADS = 8
_MAX_SHARDS = 64
_LISTED = 5
_TILE = 112
_TEXT = 34
_GAP = 8


def inspect_shards(uri: str | Path) -> dict[str, Any]:
    """Return what a shard set holds as plain data; class counts come from at most 64 of the shards.

    Raises:
        DataError: no whole shard set there, or a shard that cannot be read.
    """
    uri = str(uri)
    manifest = read_manifest(uri)
    chosen = np.unique(np.linspace(0, len(manifest.shards) - 1, _MAX_SHARDS).astype(int))
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        counted = list(pool.map(lambda i: _count_labels(uri, manifest, int(i)), chosen))
    counts = np.sum([counts for counts, _ in counted], axis=0)
    order = np.argsort(-counts, kind="stable")
    ranked = [(manifest.class_names[i], int(counts[i])) for i in order]
    sizes = [shard.num_bytes for shard in manifest.shards]
    return {
        "name": manifest.name,
        "digest": manifest.digest,
        "num_examples": manifest.num_examples,
        "num_classes": manifest.num_classes,
        "multi_label": manifest.multi_label,
        "num_shards": len(sizes),
        "num_bytes": manifest.num_bytes,
        "bytes_per_example": manifest.num_bytes / manifest.num_examples,
        "shard_bytes": {"min": min(sizes), "max": max(sizes)},
        "row_group_size": manifest.row_group_size,
        "median_image_size": list(manifest.median_image_size),
        "convert_images": manifest.convert_images,
        "shards_counted": len(chosen),
        "labels_per_example": float(counts.sum() / sum(num for _, num in counted)),
        "classes_without_example": int((counts == 0).sum()),
        "largest_classes": ranked[:_LISTED],
        "smallest_classes": ranked[-_LISTED:][::-1],
    }


def contact_sheet(uri: str | Path, path: str | Path, n: int = 48, *, seed: int = 0) -> None:
    """Write a PNG of ``n`` seeded examples of a shard set with their class names, from at most 8 row groups.

    Raises:
        ConfigError: n is below 1.
        DataError: no whole shard set there, or a shard or image that cannot be read.
    """
    if n < 1:
        raise ConfigError(f"n: {n}; accepted: 1 or more; correct it")
    manifest = read_manifest(uri)
    examples = _draw(str(uri), manifest, n, seed)
    columns = min(8, len(examples))
    rows = -(-len(examples) // columns)
    sheet = Image.new("RGB", (columns * (_TILE + _GAP) + _GAP, rows * (_TILE + _TEXT + _GAP) + _GAP), (225, 228, 232))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(11)
    for i, example in enumerate(examples):
        x = _GAP + (i % columns) * (_TILE + _GAP)
        y = _GAP + (i // columns) * (_TILE + _TEXT + _GAP)
        image = _tile(decode_image(example.image, convert=manifest.convert_images))
        sheet.paste(image, (x + (_TILE - image.width) // 2, y + (_TILE - image.height) // 2))
        names = ", ".join(manifest.class_names[label] for label in example.labels) or "(no label)"
        for line, text in enumerate(_wrap(names, font)):
            draw.text((x, y + _TILE + 3 + 14 * line), text, fill="black", font=font)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    store.write_bytes(path, buffer.getvalue())


def _count_labels(uri: str, manifest: Manifest, index: int) -> tuple[npt.NDArray[np.int64], int]:
    path = store.join(uri, manifest.shards[index].path)
    with open_shard(path) as parquet:
        labels = parquet.read(columns=["labels"], use_threads=False).column("labels").combine_chunks()
    return np.bincount(np.asarray(labels.flatten()), minlength=manifest.num_classes), len(labels)


def _draw(uri: str, manifest: Manifest, n: int, seed: int) -> list[Example]:
    rng = np.random.default_rng(seed)
    groups = [(s, g) for s in range(len(manifest.shards)) for g in range(manifest.row_groups(s))]
    num_groups = max(8, -(-n // manifest.row_group_size))
    chosen = rng.permutation(len(groups))[:num_groups]
    pools = [to_examples(read_rows(uri, manifest, groups[i][0], [groups[i][1]])) for i in chosen]
    picked: list[Example] = []
    for i, pool in enumerate(pools):
        share = -(-(n - len(picked)) // (len(pools) - i))
        picked.extend(pool[j] for j in rng.permutation(len(pool))[:share])
    return picked


def _tile(pixels: npt.NDArray[np.uint8]) -> Image.Image:
    image = Image.fromarray(pixels)
    scale = _TILE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.BILINEAR)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Break the text into at most two lines of a tile's width, cutting what is left."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= _TILE or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > 2:
        lines = [lines[0], " ".join(lines[1:])]
    return [line if font.getlength(line) <= _TILE else _cut(line, font) for line in lines]


def _cut(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    while line and font.getlength(line + "...") > _TILE:
        line = line[:-1]
    return line + "..."
