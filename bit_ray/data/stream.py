"""The stream of training batches: Ray Data reads what `bit_ray.data.order` says, for one training worker.

Each worker runs its own Ray Data pipeline over the read units of its batch slots. A unit is a pure function of the spec
and its number, so a lost reader is simply run again, any node with free CPUs can run it, and a run resumes at any step
without reading what came before. Pixels stay uint8 until they are on the training device.
"""

import logging
import queue
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray.data
import torch
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from bit_ray.data.augment import TrainView, example_keys, train_view, uniforms
from bit_ray.data.decode import ImageError, decode_image
from bit_ray.data.manifest import Manifest, read_manifest
from bit_ray.data.order import Order, Shuffle
from bit_ray.data.shards import read_rows
from bit_ray.errors import DataError, root_cause

# Nothing to a user: that our own setting is in force, and each time 1,024 units have been read.
logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
logging.getLogger("ray.data._internal.execution.streaming_executor").setLevel(logging.WARNING)

# Pixels per Ray Data execution. While output waits to be taken, Ray Data's scheduler spins and takes a core from
# training; an execution this small ends instead, its output in the object store.
_BYTES_PER_EXECUTION = 64 * 2**20
_MOST_UNITS_PER_EXECUTION = 64


@dataclass(frozen=True, kw_only=True)
class StreamSpec:
    """What one worker reads; small, and the same for every reader task."""

    shards: str
    """URI of the shard set."""
    manifest_digest: str
    """The set must still be this one."""
    global_batch_size: int
    """Examples per step over all workers."""
    slots: range
    """The worker's slots of every batch."""
    start_step: int
    """First step to deliver."""
    stop_step: int
    """Step after the last one."""
    seed: int
    """Seed of order and views."""
    shuffle: Shuffle
    """Lanes and window."""
    view: TrainView
    """Random view of each image."""


class Batch(NamedTuple):
    """A worker's share of one optimizer step."""

    step: int
    images: torch.Tensor
    """``[b, H, W, 3] uint8``."""
    targets: torch.Tensor
    """``[b] int64``, or ``[b, C] uint8`` multi-hot."""


@lru_cache(maxsize=4)
def _manifest(uri: str, digest: str) -> Manifest:
    manifest = read_manifest(uri)
    if manifest.digest != digest:
        raise DataError(
            f"{uri}: the shard set has changed since the run began (digest {manifest.digest[:12]}, expected "
            f"{digest[:12]}); restore it, or start a run under another name"
        )
    return manifest


@lru_cache(maxsize=4)
def _order(shards: str, digest: str, global_batch_size: int, seed: int, shuffle: Shuffle) -> Order:
    manifest = _manifest(shards, digest)
    return Order(
        shard_sizes=tuple(shard.num_examples for shard in manifest.shards),
        row_group_size=manifest.row_group_size,
        global_batch_size=global_batch_size,
        seed=seed,
        shuffle=shuffle,
    )


def stream_order(spec: StreamSpec) -> Order:
    """The order that a stream follows, cached per process."""
    return _order(spec.shards, spec.manifest_digest, spec.global_batch_size, spec.seed, spec.shuffle)


def read_unit(spec: StreamSpec, index: int) -> dict[str, Any] | None:
    """Read, decode, crop and flip one unit.

    Args:
        spec: The worker's stream.
        index: Number of the unit.

    Returns:
        Columns ``step [n]``, ``slot [n]``, ``image [n, S, S, 3] uint8`` and ``labels`` (lists); None for an empty unit.

    Raises:
        DataError: A shard is missing or damaged, or an image cannot be decoded.
    """
    order = stream_order(spec)
    manifest = _manifest(spec.shards, spec.manifest_digest)
    unit = order.unit(index, spec.slots)
    wanted = (unit.steps >= spec.start_step) & (unit.steps < spec.stop_step)
    if not wanted.any():
        return None
    steps, slots, shards, rows = (a[wanted] for a in (unit.steps, unit.slots, unit.shards, unit.rows))
    size = spec.view.crop_size
    images = np.empty((len(steps), size, size, 3), np.uint8)
    labels: list[list[int]] = [[]] * len(steps)
    for shard in np.unique(shards):
        places = np.flatnonzero(shards == shard)
        groups, in_group = np.divmod(rows[places], manifest.row_group_size)
        read = np.unique(groups)
        table = read_rows(spec.shards, manifest, int(shard), read.tolist())
        picked = table.take(np.searchsorted(read, groups) * manifest.row_group_size + in_group)
        ids = picked["id"].to_pylist()
        u = uniforms(spec.seed, unit.epoch, example_keys(ids))
        for i, place in enumerate(places):
            labels[place] = picked["labels"][i].as_py()
            try:
                image = decode_image(picked["image"][i].as_py(), convert=manifest.convert_images)
            except ImageError as error:
                path = manifest.shards[shard].path
                raise DataError(f"{path}: example {ids[i]}: {error}; run bit-ray shards verify {spec.shards}") from None
            images[place] = train_view(image, spec.view, u[i])
    return {"step": steps, "slot": slots, "image": images, "labels": pa.array(labels, pa.list_(pa.int32()))}


class _Units(Datasource):
    """Ray Data source whose blocks are the worker's units, one read task each."""

    def __init__(self, spec: StreamSpec, units: range):
        super().__init__()
        self._spec, self._units = spec, units

    def get_name(self) -> str:
        return "Shards"

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        spec = self._spec
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)

        def task(index: int) -> ReadTask:
            def read() -> Iterable[pa.Table]:
                unit = read_unit(spec, index)
                if unit is not None:
                    n = len(unit["step"])
                    # Pixels as fixed-size binary: one buffer, no copy on the way out, no tensor extension to agree on.
                    pixels = pa.Array.from_buffers(
                        pa.binary(unit["image"][0].nbytes), n, [None, pa.py_buffer(unit["image"].reshape(n, -1))]
                    )
                    columns = {"step": unit["step"], "slot": unit["slot"], "image": pixels, "labels": unit["labels"]}
                    yield pa.table(columns)

            return ReadTask(read, metadata)

        return [task(index) for index in self._units]


def _blocks(spec: StreamSpec, num_readers: int) -> Iterator[pa.Table]:
    """Blocks of the worker's units, in order."""
    order = stream_order(spec)
    units = order.unit_range(spec.slots, spec.start_step, spec.stop_step)
    rows = order.window * min(1.0, len(spec.slots) * order.num_lanes / order.global_batch_size)
    fitting = int(_BYTES_PER_EXECUTION / (rows * 3 * spec.view.crop_size**2))
    together = max(num_readers, min(fitting, _MOST_UNITS_PER_EXECUTION))
    for start in range(0, len(units), together):
        part = units[start : start + together]
        dataset = ray.data.read_datasource(
            _Units(spec, part), override_num_blocks=len(part), concurrency=num_readers, num_cpus=1
        )
        options = dataset.context.execution_options
        options.preserve_order = True
        # Every worker has a pipeline of its own: each plans with its own readers, not with the whole cluster.
        options.resource_limits = options.resource_limits.copy(cpu=num_readers)
        dataset.context.enable_progress_bars = False
        dataset.context.print_on_execution_start = False
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)


def _assemble(spec: StreamSpec, num_readers: int, pin_memory: bool) -> Generator[Batch, None, None]:
    """Put rows into the batches of their steps; a batch leaves when its last slot is filled."""
    manifest = _manifest(spec.shards, spec.manifest_digest)
    size, width = spec.view.crop_size, len(spec.slots)
    target_shape: tuple[int, ...] = (width, len(manifest.class_names)) if manifest.multi_label else (width,)
    target_dtype = torch.uint8 if manifest.multi_label else torch.int64
    filling: dict[int, tuple[Batch, list[int]]] = {}
    next_step = spec.start_step
    for table in _blocks(spec, num_readers):
        steps, slots = table["step"].to_numpy(), table["slot"].to_numpy() - spec.slots.start
        labels = table["labels"].combine_chunks()
        offsets, values = labels.offsets.to_numpy(), labels.values.to_numpy()
        pixels = np.concatenate([_pixels(chunk, size) for chunk in table["image"].chunks])
        for step in np.unique(steps):
            if int(step) not in filling:
                images = torch.empty((width, size, size, 3), dtype=torch.uint8, pin_memory=pin_memory)
                filling[int(step)] = (Batch(int(step), images, torch.zeros(target_shape, dtype=target_dtype)), [width])
            batch, missing = filling[int(step)]
            rows = np.flatnonzero(steps == step)
            batch.images.numpy()[slots[rows]] = pixels[rows]
            targets = batch.targets.numpy()
            for row in rows:
                named = values[offsets[row] : offsets[row + 1]]
                if manifest.multi_label:
                    targets[slots[row], named] = 1
                else:
                    targets[slots[row]] = named[0]
            missing[0] -= len(rows)
        while next_step in filling and filling[next_step][1][0] == 0:
            yield filling.pop(next_step)[0]
            next_step += 1
    assert next_step == spec.stop_step, f"stream ended at step {next_step} of {spec.stop_step}"


def _pixels(chunk: pa.FixedSizeBinaryArray, size: int) -> np.ndarray:
    """``[n, S, S, 3] uint8`` view of a column chunk."""
    pixels = np.frombuffer(chunk.buffers()[1], np.uint8).reshape(-1, size, size, 3)
    return pixels[chunk.offset : chunk.offset + len(chunk)]


def batches(spec: StreamSpec, *, num_readers: int = 1, pin_memory: bool = False) -> Iterator[Batch]:
    """Batches of one worker, in the order of the steps, assembled in a background thread.

    The thread is at most a window of every lane ahead, so that the next windows are read while training works through
    the last: at most twice ``lanes * lane_window / workers`` decoded images are held.

    Args:
        spec: What to read.
        num_readers: Reader tasks at a time.
        pin_memory: Page-locked memory for copies to a GPU.

    Yields:
        One `Batch` per step from ``start_step`` to ``stop_step``.

    Raises:
        DataError: A shard is missing or damaged, or an image cannot be decoded.
    """
    order = stream_order(spec)
    steps_ahead = 2 + order.num_lanes * order.window // order.global_batch_size
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(steps_ahead)
    stopped = threading.Event()

    def put(item: Batch | BaseException | None) -> None:
        while not stopped.is_set():
            with suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    def fill() -> None:
        try:
            with closing(_assemble(spec, num_readers, pin_memory)) as assembled:
                for batch in assembled:
                    put(batch)
                    if stopped.is_set():
                        return
            put(None)
        except BaseException as error:  # handed to the consumer, whatever it is
            put(root_cause(error) or error)

    thread = threading.Thread(target=fill, name="stream", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        # Whoever closes the stream may stop Ray next, which must not happen under a thread that reads from it.
        thread.join(timeout=30)
