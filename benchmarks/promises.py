"""Times that the stream promises: first batches, resuming late in an epoch, the step from one epoch into the next.

python benchmarks/promises.py

Prints Markdown tables. See benchmarks/README.md for what is measured.
"""

import gc
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import tyro
from corpus import make_corpus

from bit_ray.cluster.session import cluster
from bit_ray.cluster.slots import num_local_cores
from bit_ray.data.images.views import TrainView
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.embedded.glyphs import GlyphSource
from bit_ray.data.stream.batches import StreamSpec, batches
from bit_ray.data.stream.settings import Shuffle
from bit_ray.errors import BitRayError

BATCH_SIZE = 64
GLYPH_CLASSES = 50


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to measure."""

    num_images: int = 12_000
    """Photographs, of which 3,000 are different."""
    num_shards: int = 100_000
    """Shards of the set of many shards, one image each."""
    rounds: int = 5
    """Times that each is measured, at least 2; the median counts."""


def spec(shards: Path, **settings: object) -> StreamSpec:
    """A worker that takes the whole batch, over endless epochs, with the default windows."""
    defaults = StreamSpec(
        shards=str(shards),
        manifest_digest=read_manifest(shards).digest,
        global_batch_size=BATCH_SIZE,
        slots=range(BATCH_SIZE),
        start_step=0,
        stop_step=2**40,
        seed=0,
        shuffle=Shuffle(full_up_to=1),
        view=TrainView(crop="inception", crop_size=224),
    )
    return replace(defaults, **settings)  # type: ignore[arg-type]


def first_batch_s(stream: StreamSpec) -> float:
    """Seconds from asking to having the first batch."""
    start = time.perf_counter()
    opened = batches(stream, num_threads=num_local_cores())
    next(opened)
    elapsed = time.perf_counter() - start
    opened.close()
    return elapsed


def photographs(config: Config, place: Path) -> list[tuple[str, str]]:
    """First batches at the start and near the end of an epoch, and the longest wait from one epoch into the next."""
    make_corpus(place / "photos", min(config.num_images, 3000))
    for path in sorted((place / "photos").rglob("*.jpg")):
        for copy in range(1, config.num_images // 3000):
            os.link(path, path.with_name(f"{path.stem}-{copy}.jpg"))
    write_shards(place / "photos", place / "shards", name="photos", shard_examples=1024)
    manifest = read_manifest(place / "shards")
    steps = manifest.num_examples // BATCH_SIZE
    at_start, at_90, waits = [], [], []
    for round in range(config.rounds):
        at_start.append(first_batch_s(spec(place / "shards", seed=round)))
        at_90.append(first_batch_s(spec(place / "shards", seed=round, start_step=steps * 9 // 10)))
    for round in range(config.rounds):
        edge = range(steps - 20, steps + 20)
        gaps, last = [], None
        for batch in batches(spec(place / "shards", seed=round, stop_step=edge.stop), num_threads=num_local_cores()):
            now = time.perf_counter()
            if last is not None:
                gaps.append((batch.step, now - last))
            last = now
        waits.append(max(gap for step, gap in gaps if step in edge) / statistics.median(gap for _, gap in gaps))
    start, late = statistics.median(at_start), statistics.median(at_90)
    return [
        ("first batch at the start of an epoch", f"{start:.2f} s"),
        ("first batch at 90 % of an epoch", f"{late:.2f} s, {late / start:.2f} of that"),
        ("longest wait for a batch around an epoch's end", f"{statistics.median(waits):.1f} times the median wait"),
    ]


def many_shards(config: Config, place: Path) -> list[tuple[str, str]]:
    """First batch and memory of a set of very many shards."""
    started = time.perf_counter()
    source = GlyphSource("s", examples_per_class=-(-config.num_shards // GLYPH_CLASSES))
    write_shards(source, place / "many", name="many shards", shard_examples=1, row_group_size=1)
    written = time.perf_counter() - started
    gc.collect()
    process = psutil.Process()
    before = process.memory_info().rss
    times = [first_batch_s(spec(place / "many", seed=0, view=TrainView(crop="inception", crop_size=32)))]
    grown = [process.memory_info().rss - before]
    for round in range(1, config.rounds):
        times.append(first_batch_s(spec(place / "many", seed=round, view=TrainView(crop="inception", crop_size=32))))
        grown.append(process.memory_info().rss - before)
    return [
        (f"{config.num_shards:,} shards: written in", f"{written:.0f} s"),
        ("first batch, with a new manifest", f"{times[0]:.2f} s"),
        ("first batches after it", f"{statistics.median(times[1:]):.2f} s"),
        ("memory of the process, increase", ", ".join(f"{size / 1e6:,.0f}" for size in grown) + " MB"),
    ]


def main(config: Config) -> None:
    """Measure and print."""
    print(
        f"{platform.processor() or platform.machine()}, {num_local_cores()} cores, Python {platform.python_version()}"
    )
    with tempfile.TemporaryDirectory(prefix="promises-") as directory, cluster():
        rows = [*photographs(config, Path(directory)), *many_shards(config, Path(directory))]
    print("\n| | |\n| --- | --- |")
    for row in rows:
        print(f"| {row[0]} | {row[1]} |")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except BitRayError as error:
        sys.exit(f"error: {error}")
