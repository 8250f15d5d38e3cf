"""A shard set read in this process: labels, and images decoded and converted to a view, a row group at a time."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from bit_ray.data.images.decode import ImageError, decode_image
from bit_ray.data.shards.manifest import Manifest
from bit_ray.data.shards.read import read_rows, read_tables
from bit_ray.errors import DataError

Image = npt.NDArray[np.uint8]
"""``[H, W, 3] uint8``."""

Group = tuple[int, int, npt.NDArray[np.int64]]
"""Number of a shard, of a row group in it, and the wanted rows of the group."""


def row_groups(manifest: Manifest, indices: npt.NDArray[np.int64] | None = None) -> list[Group]:
    """Return the row groups that have some examples, with their rows.

    Args:
        manifest: Manifest of the set.
        indices: ``[N]`` ascending indices in the order of the set, at least one; None: all.
    """
    groups = []
    shard_start = 0
    for number, shard in enumerate(manifest.shards):
        for group in range(manifest.row_groups(number)):
            start = shard_start + group * manifest.row_group_size
            stop = min(start + manifest.row_group_size, shard_start + shard.num_examples)
            if indices is None:
                groups.append((number, group, np.arange(stop - start)))
                continue
            rows = indices[np.searchsorted(indices, start) : np.searchsorted(indices, stop)] - start
            if len(rows):
                groups.append((number, group, rows))
        shard_start += shard.num_examples
    assert groups
    return groups


def read_views(
    shards: str, manifest: Manifest, groups: Sequence[Group], view: Callable[[Image], Image]
) -> Iterator[tuple[list[str], list[Image], list[list[int]]]]:
    """Ids, images and labels of each row group; the next is read and decoded meanwhile.

    Args:
        shards: The set.
        manifest: Its manifest.
        groups: At least one, see `row_groups`.
        view: Converts a decoded image.

    Raises:
        DataError: A shard is missing or damaged, or an image cannot be decoded.
    """

    def read(group: Group) -> tuple[list[str], list[Image], list[list[int]]]:
        shard, number, rows = group
        table = read_rows(shards, manifest, shard, [number]).take(rows)
        ids = table["id"].to_pylist()
        views = []
        for name, image in zip(ids, table["image"], strict=True):
            try:
                decoded = decode_image(image.as_py(), convert=manifest.convert_images)
            except ImageError as error:
                path = manifest.shards[shard].path
                raise DataError(f"{path}: example {name}: {error}; run bit-ray shards verify {shards}") from None
            views.append(view(decoded))
        return ids, views, table["labels"].to_pylist()

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(read, groups[0])
        for following in [*groups[1:], None]:
            ready = ahead.result()
            if following is not None:
                ahead = pool.submit(read, following)
            yield ready


def single_labels(labels: Sequence[Sequence[int]]) -> npt.NDArray[np.int64]:
    """Return the one label of each image, ``[N]`` class indices."""
    return np.array([names[0] for names in labels], np.int64)


def read_labels(shards: str, manifest: Manifest) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Return ids and labels ``[N]`` of a whole single-label set, in its order, without reading its images."""
    ids: list[str] = []
    labels: list[npt.NDArray[np.int64]] = []
    for table in read_tables(shards, manifest, ("id", "labels")):
        ids += table["id"].to_pylist()
        labels.append(np.array([names[0] for names in table["labels"].to_pylist()], np.int64))
    return ids, np.concatenate(labels)
