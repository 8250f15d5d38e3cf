"""Rates of this machine and a store: reading, decoding and the whole stream, each by itself, and the slowest part."""

import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, groupby
from operator import itemgetter
from typing import Any

import numpy as np

from bit_ray.cluster.session import cluster
from bit_ray.cluster.slots import num_local_cores
from bit_ray.data.images.decode import ImageError
from bit_ray.data.images.decode_view import decode_train_view
from bit_ray.data.images.views import TrainView, example_keys, uniforms
from bit_ray.data.shards.manifest import Manifest, read_manifest
from bit_ray.data.stream.batches import StreamSpec, batches
from bit_ray.data.stream.requests import ReadRequest, read
from bit_ray.data.stream.settings import CacheConfig, Shuffle
from bit_ray.errors import DataError
from bit_ray.locks import scratch_directory

_SAMPLE = 512
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """Rates of one machine on one shard set."""

    read_images_per_s: float
    """Encoded images from the set's storage to this node, with as many requests at a time as a reader makes."""
    read_bytes_per_s: float
    """The same in bytes."""
    decode_images_per_s: float
    """Views of one thread, from memory."""
    decode_cpu_s: float
    """CPU seconds of one view."""
    decode_paths: dict[str, int]
    """Number of images by decode path."""
    num_bad: int
    """Images of the sample that cannot be decoded."""
    num_threads: int
    """Decoding threads of the whole stream."""
    stream_images_per_s: float
    """Batches of the stream, after the first."""
    first_batch_s: float
    """Seconds from asking for the first batch to having it, with Ray running."""
    second_pass_images_per_s: float
    """The same a second time: the node then has the remote row groups."""

    @property
    def bound_by(self) -> str:
        """The slower of the parts of a first pass."""
        decode = self.decode_images_per_s * self.num_threads
        return "reading" if self.read_images_per_s < decode else "decoding"


def bench_shards(
    uri: str,
    *,
    crop_size: int = 224,
    batch_size: int = 256,
    num_threads: int = 0,
    seconds: float = 5.0,
) -> BenchResult:
    """Measure a shard set from this machine, each part for about ``seconds``; fetched data is not kept.

    Raises:
        DataError: There is no complete shard set, or it or all of its images cannot be read.
    """
    manifest = read_manifest(uri)
    threads = num_threads or num_local_cores()
    view = TrainView(crop="inception", crop_size=crop_size)
    with scratch_directory() as directory:
        cache = CacheConfig(directory=f"{directory}/a")
        images, num_bytes, elapsed, sample = measure_reading(uri, manifest, cache, seconds, _SEED)
        paths, num_bad, wall, cpu = measure_decoding(sample, view, manifest.convert_images, seconds, _SEED)
        spec = StreamSpec(
            shards=uri,
            manifest_digest=manifest.digest,
            global_batch_size=batch_size,
            slots=range(batch_size),
            start_step=0,
            stop_step=2**40,
            seed=_SEED,
            shuffle=Shuffle(),
            view=view,
            cache=CacheConfig(directory=f"{directory}/stream"),
        )
        with cluster():
            first_s, rate = _stream(spec, threads, seconds)
            _, again = _stream(spec, threads, seconds)
    decoded = sum(paths.values())
    return BenchResult(
        read_images_per_s=images / elapsed,
        read_bytes_per_s=num_bytes / elapsed,
        decode_images_per_s=decoded / wall,
        decode_cpu_s=cpu / decoded,
        decode_paths=dict(paths),
        num_bad=num_bad,
        num_threads=threads,
        stream_images_per_s=rate,
        first_batch_s=first_s,
        second_pass_images_per_s=again,
    )


def measure_reading(
    uri: str, manifest: Manifest, cache: CacheConfig, seconds: float, seed: int
) -> tuple[int, int, float, list[tuple[str, bytes]]]:
    """Read random row groups: images, bytes and seconds, and a sample of (id, encoded image)."""
    sizes = [(s, g) for s in range(len(manifest.shards)) for g in range(manifest.row_groups(s))]
    order = np.random.default_rng(seed).permutation(len(sizes))
    sample: list[tuple[str, bytes]] = []
    num_images = num_bytes = 0
    started = time.perf_counter()
    for indices in np.array_split(order, -(-len(order) // 16)):
        groups = tuple((manifest.shards[sizes[i][0]], sizes[i][1]) for i in indices)
        counts = [min(manifest.row_group_size, s.num_examples - g * manifest.row_group_size) for s, g in groups]
        request = ReadRequest(
            shards=uri,
            manifest_digest=manifest.digest,
            num_classes=manifest.num_classes,
            multi_label=manifest.multi_label,
            row_group_size=manifest.row_group_size,
            groups=groups,
            group=np.repeat(np.arange(len(groups)), counts),
            row=np.concatenate([np.arange(n) for n in counts]),
            cache=cache,
        )
        for example in _contents(read(request).to_pylist()):
            num_images, num_bytes = num_images + 1, num_bytes + len(example[1])
            if len(sample) < _SAMPLE:
                sample.append(example)
        if time.perf_counter() - started > seconds:
            break
    if not sample:
        raise DataError(f"{uri}: no image can be read; run bit-ray shards verify {uri}")
    return num_images, num_bytes, time.perf_counter() - started, sample


def _contents(rows: list[dict[str, Any]]) -> Iterator[tuple[str, bytes]]:
    """Id and encoded bytes of each row that can be read, from the node's disk."""
    for name, part in groupby((row for row in rows if row["problem"] is None), key=itemgetter("file")):
        with open(name, "rb", buffering=0) as file:
            for row in part:
                yield row["id"], os.pread(file.fileno(), row["length"], row["offset"])


def measure_decoding(
    sample: list[tuple[str, bytes]], view: TrainView, convert: bool, seconds: float, seed: int
) -> tuple[Counter[str], int, float, float]:
    """Decode the sample repeatedly in one thread: paths, bad images, seconds and CPU seconds."""
    out = np.empty((view.crop_size, view.crop_size, 3), np.uint8)
    keys = example_keys([id for id, _ in sample])
    paths: Counter[str] = Counter()
    bad: set[str] = set()
    started, cpu = time.perf_counter(), time.thread_time()
    for epoch in count():
        for (id, data), u in zip(sample, uniforms(seed, epoch, keys), strict=True):
            try:
                paths[decode_train_view(data, view, u, out, convert=convert)[0]] += 1
            except ImageError:
                bad.add(id)
        if len(bad) == len(sample):
            raise DataError(f"{sample[0][0]}: cannot be decoded, and no other image can; run bit-ray shards verify")
        if time.perf_counter() - started > seconds:
            break
    return paths, len(bad), time.perf_counter() - started, time.thread_time() - cpu


def _stream(spec: StreamSpec, num_threads: int, seconds: float) -> tuple[float, float]:
    """Return seconds to the first batch, and images per second from then on."""
    started = time.perf_counter()
    stream = batches(spec, num_threads=num_threads)
    next(stream)
    first = time.perf_counter()
    num_batches = 0
    for _ in stream:
        num_batches += 1
        if time.perf_counter() - first > seconds:
            break
    elapsed = time.perf_counter() - first
    stream.close()
    return first - started, num_batches * spec.global_batch_size / elapsed
