"""What the checksum of every row group costs, next to decoding the images of that row group.

python benchmarks/checksums.py

One process, one thread, the photographs of corpus.py in shards, which the page cache holds. Three things take turns,
row group after row group: `index_rows` with the checksum, `index_rows` without it, and decoding a training view of each
image of 224 pixels, the part of the stream that costs most. CPU time, because it resists a busy machine.
"""

import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass

import numpy as np
import tyro
from corpus import make_corpus

from bit_ray.data.images.decode_view import FAST_PATH, decode_train_view
from bit_ray.data.images.views import TrainView, example_keys, uniforms
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.shards.read import index_rows
from bit_ray.data.shards.write import write_shards
from bit_ray.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Config:
    """Time the checksum of row groups."""

    num_images: int = 1024
    """Photographs."""
    num_rounds: int = 5
    """Turns over the whole set; the median counts."""


def measure(shards: str) -> tuple[float, float, float]:
    """CPU seconds of indexing with and without checksums, and of decoding, over the whole set."""
    manifest = read_manifest(shards)
    view = TrainView(crop="inception", crop_size=224)
    out = np.empty((224, 224, 3), np.uint8)
    checked = unchecked = decoded = 0.0
    for shard in manifest.shards:
        path = os.path.join(shards, shard.path)
        index_rows(path, 0)  # reads the footer, which both would share
        for group in range(-(-shard.num_examples // manifest.row_group_size)):
            start = time.process_time()
            table = index_rows(path, group)
            unchecked += time.process_time() - start
            start = time.process_time()
            index_rows(path, group, shard.checksum(group))
            checked += time.process_time() - start
            u = uniforms(0, np.zeros(len(table), np.int64), example_keys(table["id"].to_pylist()))
            with open(path, "rb", buffering=0) as file:
                start = time.process_time()
                for row, (offset, length) in enumerate(
                    zip(table["offset"].to_pylist(), table["length"].to_pylist(), strict=True)
                ):
                    decode_train_view(os.pread(file.fileno(), length, offset), view, u[row], out, convert=False)
                decoded += time.process_time() - start
    return checked, unchecked, decoded


def main(config: Config) -> None:
    with tempfile.TemporaryDirectory() as folder:
        make_corpus(f"{folder}/corpus", config.num_images)
        shards = f"{folder}/shards"
        write_shards(f"{folder}/corpus", shards, name="corpus")
        measure(shards)
        rounds = [measure(shards) for _ in range(config.num_rounds)]
    checked, unchecked, decoded = (statistics.median(times) for times in zip(*rounds, strict=True))
    per_image = 1e6 / config.num_images
    print(f"{config.num_images} photographs, C decoder {'on' if FAST_PATH else 'off'}; CPU time per image:")
    print(f"  decoding a training view    {decoded * per_image:7.1f} us")
    print(f"  indexing, not checked       {unchecked * per_image:7.1f} us")
    print(f"  indexing, checked           {checked * per_image:7.1f} us")
    print(f"the checksum is {(checked - unchecked) / (checked + decoded):.2%} of the two together")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except ConfigError as error:
        sys.exit(f"error: {error}")
