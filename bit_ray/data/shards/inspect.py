"""Inspect a shard set: what it contains, as numbers and as a picture."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bit_ray.data.images.decode import decode_image
from bit_ray.data.images.sheet import COLORS, Tile, write_sheet
from bit_ray.data.images.views import TrainView, example_keys, place_view, uniforms
from bit_ray.data.shards.manifest import Manifest, read_manifest
from bit_ray.data.shards.read import read_rows, to_examples
from bit_ray.data.sources.base import Example
from bit_ray.errors import ConfigError

_NUM_THREADS = 8
_MAX_SHARDS = 64
_LISTED = 5


def inspect_shards(uri: str | Path) -> dict[str, Any]:
    """Return what a shard set has as plain data; class counts come from at most 64 of the shards.

    Raises:
        DataError: No complete shard set there, or a shard that cannot be read.
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


def contact_sheet(
    uri: str | Path, path: str | Path, n: int = 48, *, seed: int = 0, view: TrainView | None = None
) -> None:
    """Write a PNG of ``n`` seeded examples of a shard set with their class names, from few row groups.

    Args:
        uri: The shard set.
        path: PNG file to write, or its URI.
        n: Number of examples.
        seed: Seed of the draw and of the views.
        view: Of the three training views next to each image, as training with this seed draws them in its first epochs;
            None: only the images.

    Raises:
        ConfigError: N is below 1.
        DataError: No complete shard set there, or a shard or image that cannot be read.
    """
    if n < 1:
        raise ConfigError.of("num_images", n, "1 or more")
    manifest = read_manifest(uri)
    examples = _draw(str(uri), manifest, n, seed)
    tiles = [
        Tile(
            pixels=decode_image(example.image, convert=manifest.convert_images),
            text=", ".join(manifest.class_names[label] for label in example.labels) or "(no label)",
        )
        for example in examples
    ]
    if view is None:
        write_sheet(path, tiles)
    else:
        views = _views(examples, tiles, seed, view, manifest.convert_images)
        write_sheet(path, views, columns=3 * (1 + len(COLORS)), together=1 + len(COLORS))


def _count_labels(uri: str, manifest: Manifest, index: int) -> tuple[npt.NDArray[np.int64], int]:
    groups = range(manifest.row_groups(index))
    labels = read_rows(uri, manifest, index, groups, ["labels"]).column("labels").combine_chunks()
    return np.bincount(np.asarray(labels.flatten()), minlength=manifest.num_classes), len(labels)


def _draw(uri: str, manifest: Manifest, n: int, seed: int) -> list[Example]:
    rng = np.random.default_rng(seed)
    ends = np.cumsum([manifest.row_groups(shard) for shard in range(len(manifest.shards))])
    num_groups = max(8, -(-n // manifest.row_group_size))
    pools = []
    for group in rng.choice(ends[-1], min(num_groups, ends[-1]), replace=False):
        shard = int(np.searchsorted(ends, group, side="right"))
        in_shard = int(group - ends[shard]) + manifest.row_groups(shard)
        pools.append(to_examples(read_rows(uri, manifest, shard, [in_shard])))
    picked: list[Example] = []
    for i, pool in enumerate(pools):
        share = -(-(n - len(picked)) // (len(pools) - i))
        picked.extend(pool[j] for j in rng.permutation(len(pool))[:share])
    return picked


def _views(examples: Sequence[Example], tiles: Sequence[Tile], seed: int, view: TrainView, convert: bool) -> list[Tile]:
    """Return each image with the boxes of its views in it, followed by the views."""
    # Imported here, because the other functions of this module do not need PyTorch.
    from bit_ray.data.images.decode_view import decode_train_view

    keys = example_keys([example.id for example in examples])
    numbers = np.stack([uniforms(seed, epoch, keys) for epoch in range(len(COLORS))], axis=1)
    result = []
    for example, tile, of_image in zip(examples, tiles, numbers, strict=True):
        height, width, _ = tile.pixels.shape
        boxes, views = [], []
        for epoch, (u, color) in enumerate(zip(of_image, COLORS, strict=True)):
            placement = place_view(view, height, width, u)
            boxes.append((*placement.box, color))
            pixels = np.empty((view.crop_size, view.crop_size, 3), np.uint8)
            decode_train_view(example.image, view, u, pixels, convert=convert)
            text = f"epoch {epoch}" + (", mirrored" if placement.flip else "")
            views.append(Tile(pixels=pixels, text=text, frame=color))
        result += [replace(tile, boxes=tuple(boxes)), *views]
    return result
