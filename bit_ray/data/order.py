"""The order of training examples: a pure function of (seed, manifest, global batch size, lanes, window).

The stream of examples is endless: epoch after epoch, each example once per epoch. Optimizer step *t* trains on stream
positions ``t * B .. (t + 1) * B``, so a batch that straddles two epochs takes the end of one and the start of the
next, and no example is dropped or repeated. Neither the number of workers nor a restart has any part in it: a worker is
given a range of batch *slots*, and the position of a run in its data is one integer, the step.

An epoch is shuffled in two levels that keep reads large and memory bounded:

1. the row groups of all shards are permuted, and the permuted sequence is cut into ``num_lanes`` consecutive pieces;
   lane *l* feeds its own range of slots in every batch;
2. a lane is cut into windows of ``lane_window`` examples, and each window is permuted.

A window mixes row groups from random places of the data set, a batch mixes all lanes, and a worker that owns whole
lanes reads each of its row groups about once. A small set is permuted as one window: a full shuffle.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from bit_ray.errors import ConfigError

_GROUPS, _WINDOW = 0, 1  # what a random generator permutes, so that no two share a stream of numbers


@dataclass(frozen=True, kw_only=True)
class Shuffle:
    """How far apart examples are mixed."""

    num_lanes: int = 8
    """Parts of an epoch that are read side by side; the most workers that can train without reading anything twice."""
    lane_window: int = 512
    """Examples of a lane that are permuted together; a worker holds about lanes / workers windows in memory."""
    full_up_to: int = 4096
    """Sets of at most this many examples are permuted as a whole."""

    def __post_init__(self) -> None:
        for name in ("num_lanes", "lane_window", "full_up_to"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)}; an integer of at least 1; raise it")


@dataclass(frozen=True)
class Unit:
    """The part of one window that falls into a worker's slots: what one read task turns into examples.

    ``steps``, ``slots``, ``shards``, ``rows`` are ``[n] int64``, in the order of the stream.
    """

    epoch: int
    steps: np.ndarray
    slots: np.ndarray
    shards: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order of a run's examples.

    Args:
        shard_sizes: Examples per shard.
        row_group_size: Rows of every row group but a shard's last.
        global_batch_size: Examples per optimizer step, over all workers.
        seed: Seed of the run.
        shuffle: Lanes and window.
    """

    shard_sizes: tuple[int, ...]
    row_group_size: int
    global_batch_size: int
    seed: int
    shuffle: Shuffle = field(default_factory=Shuffle)

    def __post_init__(self) -> None:
        if self.global_batch_size < 1:
            raise ConfigError(f"global_batch_size: {self.global_batch_size}; an integer of at least 1; raise it")
        if sum(self.shard_sizes) < 1:
            raise ConfigError("shards: the set holds no examples; at least 1 is needed; write the set again")

    @cached_property
    def num_examples(self) -> int:
        """Examples per epoch."""
        return int(sum(self.shard_sizes))

    @cached_property
    def num_lanes(self) -> int:
        """Lanes in force: one for a small set, and never more than slots."""
        if self.num_examples <= self.shuffle.full_up_to:
            return 1
        return min(self.shuffle.num_lanes, self.global_batch_size)

    @cached_property
    def window(self) -> int:
        """Examples per window of a lane."""
        return self.num_examples if self.num_lanes == 1 else self.shuffle.lane_window

    @cached_property
    def _lane_slots(self) -> np.ndarray:
        """``[L + 1]``: lane *l* owns slots ``[l] .. [l + 1]`` of every batch."""
        lanes = np.arange(self.num_lanes + 1, dtype=np.int64)
        return -(-lanes * self.global_batch_size // self.num_lanes)

    @cached_property
    def _groups(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """``[G]`` shard, first row and size of every row group."""
        sizes = np.asarray(self.shard_sizes, np.int64)
        counts = -(-sizes // self.row_group_size)
        shard = np.repeat(np.arange(len(sizes)), counts)
        first = (np.arange(len(shard)) - np.repeat(np.cumsum(counts) - counts, counts)) * self.row_group_size
        return shard, first, np.minimum(self.row_group_size, sizes[shard] - first)

    def _generator(self, what: int, *key: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, what, *key])))

    def _permuted_groups(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """``[G]`` row groups in the epoch's order, and where each begins in it."""
        cached = self.__dict__.get("_groups_of_epoch")
        if cached is None or cached[0] != epoch:
            groups = self._generator(_GROUPS, epoch).permutation(len(self._groups[0]))
            sizes = self._groups[2][groups]
            cached = (epoch, groups, np.cumsum(sizes) - sizes)
            # One epoch is kept: a frozen dataclass may cache in its __dict__ as functools.cached_property does.
            self.__dict__["_groups_of_epoch"] = cached
        return cached[1], cached[2]

    def _rank(self, lane: int | np.ndarray, x: int) -> np.ndarray:
        """How many slots of the lane lie in stream positions [0, x)."""
        low, high = self._lane_slots[lane], self._lane_slots[lane + 1]
        batches, rest = np.divmod(x, self.global_batch_size)
        return batches * (high - low) + np.clip(rest - low, 0, high - low)

    def _lane_counts(self, epoch: int) -> np.ndarray:
        """``[L]`` examples of each lane in the epoch."""
        start = epoch * self.num_examples
        lanes = np.arange(self.num_lanes)
        return self._rank(lanes, start + self.num_examples) - self._rank(lanes, start)

    @cached_property
    def windows_per_epoch(self) -> int:
        """Windows of every lane in every epoch; the last ones of a short lane are empty."""
        batches, rest = divmod(self.num_examples, self.global_batch_size)
        widest = int(np.diff(self._lane_slots).max())
        return -(-(batches * widest + min(rest, widest)) // self.window)

    def _window_rows(self, epoch: int, lane: int, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ranks in the lane, shards and rows ``[n]`` of one window's examples, in the order of the stream."""
        counts = self._lane_counts(epoch)
        start = window * self.window
        size = min(self.window, int(counts[lane]) - start)
        if size <= 0:
            return (np.empty(0, np.int64),) * 3
        position = counts[:lane].sum() + start + self._generator(_WINDOW, epoch, lane, window).permutation(size)
        groups, begins = self._permuted_groups(epoch)
        index = np.searchsorted(begins, position, side="right") - 1
        shard, first, _ = self._groups
        group = groups[index]
        return start + np.arange(size), shard[group], first[group] + position - begins[index]

    def lanes_of(self, slots: range) -> range:
        """Lanes that feed a range of batch slots."""
        first = int(np.searchsorted(self._lane_slots, slots.start, side="right")) - 1
        last = int(np.searchsorted(self._lane_slots, slots.stop, side="left"))
        return range(first, last)

    def unit(self, index: int, slots: range) -> Unit:
        """Unit number *index* of a worker, counted from the start of the run: epoch, then window, then lane.

        Args:
            index: Number of the unit.
            slots: Batch slots of the worker.

        Returns:
            The examples of the unit; none when the lane ends before the window.
        """
        lanes = self.lanes_of(slots)
        window, lane_index = divmod(index, len(lanes))
        epoch, window = divmod(window, self.windows_per_epoch)
        lane = lanes[lane_index]
        ranks, shards, rows = self._window_rows(epoch, lane, window)
        # From rank in the lane back to the slot: the inverse of _rank, counted from the start of the run.
        width = int(self._lane_slots[lane + 1] - self._lane_slots[lane])
        steps, slot = np.divmod(ranks + self._rank(lane, epoch * self.num_examples), width)
        slot = slot + self._lane_slots[lane]
        mine = (slot >= slots.start) & (slot < slots.stop)
        return Unit(epoch, steps[mine], slot[mine], shards[mine], rows[mine])

    def unit_range(self, slots: range, start_step: int, stop_step: int) -> range:
        """Numbers of the units that hold the slots of steps ``start_step .. stop_step``.

        The first unit may begin before start_step and the last end after stop_step: by less than a window each.
        """
        lanes = np.array(self.lanes_of(slots))

        def round_of(step: int, pick: Callable[[np.ndarray], int]) -> int:
            """Number of the round of units, one unit per lane, that the step begins in; lanes may differ by one."""
            epoch = step * self.global_batch_size // self.num_examples
            ranks = self._rank(lanes, step * self.global_batch_size) - self._rank(lanes, epoch * self.num_examples)
            return epoch * self.windows_per_epoch + int(pick(ranks // self.window))

        return range(round_of(start_step, np.min) * len(lanes), (round_of(stop_step, np.max) + 1) * len(lanes))

    def rows_of_step(self, step: int) -> Iterator[tuple[int, int, int]]:
        """The (epoch, shard, row) of every slot of a step, in slot order."""
        slots = range(self.global_batch_size)
        found: dict[int, tuple[int, int, int]] = {}
        for index in self.unit_range(slots, step, step + 1):
            unit = self.unit(index, slots)
            for i in np.flatnonzero(unit.steps == step):
                found[int(unit.slots[i])] = (unit.epoch, int(unit.shards[i]), int(unit.rows[i]))
        assert len(found) == self.global_batch_size
        return (found[slot] for slot in slots)
