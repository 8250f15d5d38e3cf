"""The stream of training batches: in the order of `bit_ray.data.stream.order`, read by Ray Data, decoded in the worker.

Each worker takes the windows of its batch slots in rounds. Reader tasks of Ray Data, on the worker's own node, fetch a
round's row groups to that node's disk and return a small table: the file and the position of each image. Threads of the
worker read the encoded bytes from there and decode straight into the batch. Image bytes are never sent between
processes. A batch depends only on the spec and its step, even if data is lost and read again.
"""

import os
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field
from functools import lru_cache
from io import FileIO
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from bit_ray.data.images.decode import ImageError
from bit_ray.data.images.decode_view import DecodePath, decode_train_view
from bit_ray.data.images.views import TrainView, example_keys, uniforms
from bit_ray.data.shards.manifest import Manifest, read_manifest
from bit_ray.data.stream.order import Order
from bit_ray.data.stream.readers import read_on_node
from bit_ray.data.stream.requests import BadExample, ReadRequest, read, request_groups
from bit_ray.data.stream.rows import HOLE, Row
from bit_ray.data.stream.settings import CacheConfig, Shuffle
from bit_ray.errors import root_cause

# Examples per Ray Data execution, rounded up to whole rounds. While output waits to be taken, Ray Data's scheduler
# spins and takes a core from training; an execution of a few rounds ends before that.
_EXAMPLES_PER_EXECUTION = 2048
_BATCHES_AHEAD = 3
_IMAGES_PER_DECODE_TASK = 8


@dataclass(frozen=True, kw_only=True)
class StreamSpec:
    """What one worker reads."""

    shards: str
    """URI of the shard set."""
    manifest_digest: str
    """Digest of the manifest; the set must still have it."""
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
    cache: CacheConfig = field(default_factory=CacheConfig)
    """Where remote row groups are kept on the node."""


class Batch(NamedTuple):
    """A worker's share of one optimizer step.

    A bad example leaves a hole, which does not count in the loss: its row is `HOLE`. Its pixels are those of its
    neighbour, with which MixUp would pair it.
    """

    step: int
    images: torch.Tensor
    """``[b, H, W, 3] uint8``."""
    rows: tuple[Row, ...]
    """``b`` rows, from which an objective makes its targets."""
    ids: tuple[str, ...]
    """``b`` example ids."""
    bad: tuple[BadExample, ...]
    """The holes."""


@dataclass
class StreamCounts:
    """What a stream has done so far."""

    row_groups: int = 0
    """Row groups read."""
    row_groups_on_node: int = 0
    """Those of them that were on the node already."""
    fetched_bytes: int = 0
    """Bytes that came from a remote store."""
    decoded: dict[DecodePath, int] = field(default_factory=dict)
    """Number of images by decode path."""


_given: dict[tuple[str, str], Manifest] = {}
_read_manifest = lru_cache(maxsize=2)(read_manifest)


def give_manifest(shards: str, manifest: Manifest) -> None:
    """Let the streams of this process use a manifest that another one has read: a large set's has 62 MB."""
    _given.clear()
    _given[shards, manifest.digest] = manifest


def _manifest(shards: str, digest: str) -> Manifest:
    return _given.get((shards, digest)) or _read_manifest(shards, digest)


@lru_cache(maxsize=2)
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
    """Return the order that a stream follows, cached per process."""
    return _order(spec.shards, spec.manifest_digest, spec.global_batch_size, spec.seed, spec.shuffle)


class _Window:
    """Examples that have been found on the node: what decoding needs to know of each."""

    def __init__(self, spec: StreamSpec, request: ReadRequest, table: pa.Table, epochs: np.ndarray):
        self.request = request
        self.ids = ["" if id is None else id for id in table["id"].to_pylist()]
        self.labels = table["labels"].to_pylist()
        self.annotations = table["annotation"].to_pylist() if request.annotations else [b""] * len(self.ids)
        self.problems = table["problem"].to_pylist()
        self.offsets, self.lengths = table["offset"].to_pylist(), table["length"].to_pylist()
        self.uniforms = uniforms(spec.seed, epochs, example_keys(self.ids))
        self.names = table["file"].to_pylist()
        # Open from now on: files that the cache evicts stay readable until the window is done.
        self.files: dict[str, FileIO] = {}
        transient = table["transient"].to_pylist()
        for name, passing in zip(self.names, transient, strict=True):
            if name is not None and name not in self.files:
                self.files[name] = FileIO(name)
                if passing:
                    os.unlink(name)

    def bad(self, i: int, reason: str) -> BadExample:
        shard, group = self.request.groups[self.request.group[i]]
        row = group * self.request.row_group_size + int(self.request.row[i])
        return BadExample(shard.path, row, self.ids[i], reason)


class _Stream:
    """The state of `batches`: rounds being read, steps being filled, batches being decoded."""

    def __init__(self, spec: StreamSpec, num_readers: int, num_threads: int, pin_memory: bool, counts: StreamCounts):
        self.spec, self.num_readers, self.pin_memory, self.counts = spec, num_readers, pin_memory, counts
        self.manifest, self.order = _manifest(spec.shards, spec.manifest_digest), stream_order(spec)
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="stream-read")
        self.decoders = ThreadPoolExecutor(num_threads, thread_name_prefix="stream-decode")
        # Per step: the windows that have its examples, which rows of them, and for which of the worker's slots.
        self.filling: dict[int, list[tuple[_Window, np.ndarray, np.ndarray]]] = {}
        self.decoding: deque[tuple[Batch, list[Future[Any]]]] = deque()

    def executions(self) -> Iterator[range]:
        """Yield the numbers of the units read together: first one round, so that training starts, then several."""
        units = self.order.unit_range(self.spec.slots, self.spec.start_step, self.spec.stop_step)
        lanes = len(self.order.lanes_of(self.spec.slots))
        round_size = max(1, lanes * self.order.window * len(self.spec.slots) // self.spec.global_batch_size)
        several = lanes * max(1, _EXAMPLES_PER_EXECUTION // round_size)
        start = units.start
        while start < units.stop:
            stop = min(units.stop, start + (lanes if start == units.start else several))
            yield range(start, stop)
            start = stop

    def read(self, units: range) -> list[tuple[_Window, np.ndarray, np.ndarray]]:
        """Return windows of some units, one per reader task, with the step and slot of each example."""
        spec = self.spec
        requests, positions = [], []
        per_task = -(-len(units) // self.num_readers)
        for start in range(0, len(units), per_task):
            parts = [self.order.unit(index, spec.slots) for index in units[start : start + per_task]]
            epoch, step, slot, shard, row = (
                np.concatenate(arrays)
                for arrays in zip(
                    *((np.full(len(p.steps), p.epoch), p.steps, p.slots, p.shards, p.rows) for p in parts), strict=True
                )
            )
            wanted = (step >= spec.start_step) & (step < spec.stop_step)
            if not wanted.any():
                continue
            groups, group, row = request_groups(
                self.manifest.shards, shard[wanted], row[wanted], self.manifest.row_group_size
            )
            requests.append(
                ReadRequest(
                    shards=spec.shards,
                    manifest_digest=spec.manifest_digest,
                    num_classes=self.manifest.num_classes,
                    multi_label=self.manifest.multi_label,
                    row_group_size=self.manifest.row_group_size,
                    groups=groups,
                    group=group,
                    row=row,
                    cache=spec.cache,
                    annotations="annotation" in self.manifest.optional_columns,
                )
            )
            positions.append((epoch[wanted], step[wanted], slot[wanted] - spec.slots.start))
        found = []
        tables = read_on_node(requests, self.num_readers) if requests else []
        for request, table, (epoch, step, slot) in zip(requests, tables, positions, strict=True):
            try:
                window = _Window(spec, request, table, epoch)
            except FileNotFoundError:  # evicted, or removed by a neighbour, since the reader answered
                table = read(request)
                window = _Window(spec, request, table, epoch)
            fetched = table["fetched_bytes"].drop_null().to_numpy()
            self.counts.row_groups += len(fetched)
            self.counts.row_groups_on_node += int((fetched == 0).sum())
            self.counts.fetched_bytes += int(fetched.sum())
            found.append((window, step, slot))
        return found

    def steps(self) -> Iterator[int | None]:
        """Yield steps in order, each as soon as all of its examples have been found; the next units are read meanwhile.

        None means that the next step is not ready yet; it comes only while there are batches to return.
        """
        step = self.spec.start_step
        missing = dict[int, int]()
        executions = self.executions()
        ahead: Future[Any] | None = self.reader.submit(self.read, next(executions))
        while ahead is not None:
            while self.decoding and not ahead.done():
                yield None
            windows = ahead.result()
            units = next(executions, None)
            ahead = self.reader.submit(self.read, units) if units is not None else None
            for window, steps, slots in windows:
                by_step = np.argsort(steps, kind="stable")
                cuts = np.flatnonzero(np.diff(steps[by_step])) + 1
                for rows in np.split(by_step, cuts):
                    of_step = int(steps[rows[0]])
                    self.filling.setdefault(of_step, []).append((window, rows, slots[rows]))
                    missing[of_step] = missing.get(of_step, len(self.spec.slots)) - len(rows)
            while missing.get(step) == 0:
                del missing[step]
                yield step
                step += 1
        assert step == self.spec.stop_step, f"stream ended at step {step} of {self.spec.stop_step}"

    def start(self, step: int) -> None:
        """Allocate a batch and hand its images to the decoding threads."""
        size, width = self.spec.view.crop_size, len(self.spec.slots)
        images = torch.empty((width, size, size, 3), dtype=torch.uint8, pin_memory=self.pin_memory)
        ids = [""] * width
        tasks = []
        for window, rows, slots in self.filling.pop(step):
            for i in range(0, len(rows), _IMAGES_PER_DECODE_TASK):
                part = slice(i, i + _IMAGES_PER_DECODE_TASK)
                tasks.append(self.decoders.submit(self.decode, window, rows[part], slots[part], images.numpy()))
            for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
                ids[slot] = window.ids[row]
        self.decoding.append((Batch(step, images, (), tuple(ids), ()), tasks))

    def decode(
        self, window: _Window, rows: np.ndarray, slots: np.ndarray, images: np.ndarray
    ) -> tuple[list[tuple[int, Row]], list[tuple[int, BadExample]], list[DecodePath]]:
        """Decode some images of a window into their slots; return the result of each with its slot."""
        good, bad, paths = [], [], []
        for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
            reason = window.problems[row]
            if reason is None:
                try:
                    data = os.pread(window.files[window.names[row]].fileno(), window.lengths[row], window.offsets[row])
                    path, placement = decode_train_view(
                        data, self.spec.view, window.uniforms[row], images[slot], convert=self.manifest.convert_images
                    )
                    paths.append(path)
                    good.append((slot, Row(window.labels[row], window.annotations[row], placement)))
                    continue
                except (ImageError, OSError) as error:
                    reason = str(error)
            bad.append((slot, window.bad(row, reason)))
        return good, bad, paths

    def finish(self) -> Batch:
        """Wait for the oldest batch's images and fill its holes."""
        batch, tasks = self.decoding.popleft()
        rows = [HOLE] * len(batch.images)
        holes: dict[int, BadExample] = {}
        for task in tasks:
            good, bad, paths = task.result()
            for slot, row in good:
                rows[slot] = row
            holes.update(bad)
            for path in paths:
                self.counts.decoded[path] = self.counts.decoded.get(path, 0) + 1
        for slot in holes:
            partner = slot ^ 1
            if partner < len(batch.images) and partner not in holes:
                batch.images[slot] = batch.images[partner]
            else:
                batch.images[slot] = 0
        return batch._replace(rows=tuple(rows), bad=tuple(holes[slot] for slot in sorted(holes)))

    def close(self) -> None:
        """Wait until nothing runs any more: the caller may stop Ray next."""
        self.decoders.shutdown(cancel_futures=True)
        last = self.reader.submit(lambda: None)
        wait_for([last], timeout=30)
        self.reader.shutdown(wait=False, cancel_futures=True)


def batches(
    spec: StreamSpec,
    *,
    num_readers: int = 1,
    num_threads: int = 1,
    pin_memory: bool = False,
    counts: StreamCounts | None = None,
) -> Generator[Batch, None, None]:
    """Yield batches of one worker, in the order of the steps.

    While the caller works on a batch, the next `_BATCHES_AHEAD` are decoded and the next windows read. Memory is those
    batches plus twice about 1 kB per example of the windows of the slots' lanes.

    Args:
        spec: What to read.
        num_readers: Ray Data tasks at a time.
        num_threads: Threads that decode.
        pin_memory: Page-locked memory for copies to a GPU.
        counts: Updated while the stream runs.

    Yields:
        One `Batch` per step from ``start_step`` to ``stop_step``.

    Raises:
        DataError: The set is not the one expected, or the store refuses or cannot be reached.
    """
    stream = _Stream(spec, num_readers, num_threads, pin_memory, counts or StreamCounts())
    try:
        for step in stream.steps():
            if step is not None:
                stream.start(step)
            if step is None or len(stream.decoding) > _BATCHES_AHEAD:
                yield stream.finish()
        while stream.decoding:
            yield stream.finish()
    except Exception as error:  # Ray's exceptions inherit from our errors, with a remote traceback as text
        raise root_cause(error) or error from None
    finally:
        stream.close()
