"""The order of training examples: a pure function of (seed, manifest, global batch size, lanes, window).

The stream of examples is endless: epoch after epoch, each example once per epoch. Optimizer step *t* trains on stream
positions ``t * B .. (t + 1) * B``. So a batch that spans two epochs takes the end of one and the start of the next, and
no example is dropped or repeated. The order does not depend on the number of workers or on restarts: a worker gets a
range of batch *slots*, and the position of a run in its data is one integer, the step.

An epoch is shuffled in two levels that keep reads large and memory bounded:

1. the row groups of all shards are permuted, and the permuted sequence is split into ``num_lanes`` consecutive pieces;
   lane *l* feeds its own range of slots in every batch;
2. a lane is split into windows of ``lane_window`` examples, and each window is permuted.

A window mixes row groups from random positions of the data set, a batch mixes all lanes, and a worker that owns whole
lanes reads each of its row groups about once. A small set is permuted as one window: a full shuffle.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from bit_ray.data.stream.settings import Shuffle
from bit_ray.errors import ConfigError

_GROUPS, _WINDOW = 0, 1  # part of the seed, so that the two permutations never share random numbers
_BLOCK = 1024  # row groups between two stored positions


@dataclass(frozen=True)
class Unit:
    """The part of one window that is in a worker's slots: the work of one read task.

    ``steps``, ``slots``, ``shards``, ``rows`` are ``[n] int64``, in the order of the stream.
    """

    epoch: int
    steps: np.ndarray
    slots: np.ndarray
    shards: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class Order:
    """The order of a run's examples.

    It keeps four bytes per row group of the current epoch and little else, and computes everything else on request: 300
    million examples in row groups of 64 take 19 MB.

    Args:
        shard_sizes: Examples per shard.
        row_group_size: Rows of every row group except a shard's last.
        global_batch_size: Examples per optimizer step, over all workers.
        seed: Seed of the run.
        shuffle: Lanes and window.
    """

    shard_sizes: Sequence[int] | np.ndarray
    row_group_size: int
    global_batch_size: int
    seed: int
    shuffle: Shuffle = field(default_factory=Shuffle)

    def __post_init__(self) -> None:
        if self.global_batch_size < 1:
            accepted = "a whole number of at least 1"
            raise ConfigError.of("global_batch_size", self.global_batch_size, accepted, "raise it")
        if self.num_examples < 1:
            raise ConfigError.of("shards", "the set has no examples", "at least 1", "write the set again")

    @cached_property
    def _sizes(self) -> np.ndarray:
        """``[S]`` examples of every shard."""
        return np.asarray(self.shard_sizes, np.int64)

    @cached_property
    def num_examples(self) -> int:
        """Examples per epoch."""
        return int(self._sizes.sum())

    @cached_property
    def num_lanes(self) -> int:
        """Number of lanes used: one for a small set, and never more than slots."""
        small = self.num_examples <= self.shuffle.full_up_to
        return 1 if small else min(self.shuffle.num_lanes, self.global_batch_size)

    @cached_property
    def window(self) -> int:
        """Examples per window of a lane."""
        small = self.num_examples <= self.shuffle.full_up_to
        return self.num_examples if small else self.shuffle.lane_window

    @cached_property
    def _lane_slots(self) -> np.ndarray:
        """``[L + 1]``: lane *l* owns slots ``[l] .. [l + 1]`` of every batch."""
        lanes = np.arange(self.num_lanes + 1, dtype=np.int64)
        return -(-lanes * self.global_batch_size // self.num_lanes)

    @cached_property
    def _first_group(self) -> np.ndarray:
        """``[S + 1]``: shard *s* has row groups ``[s] .. [s + 1]``, numbered through the whole set."""
        return np.concatenate([[0], np.cumsum(-(-self._sizes // self.row_group_size))])

    def _locate(self, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Shard, first row and size ``[n]`` of row groups ``[n]``."""
        shard = np.searchsorted(self._first_group, groups, side="right") - 1
        first = (groups - self._first_group[shard]) * self.row_group_size
        return shard, first, np.minimum(self.row_group_size, self._sizes[shard] - first)

    def _generator(self, what: int, *key: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, what, *key])))

    def _permutation(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """``[G] uint32`` row groups in the epoch's order, and the position in the epoch of every _BLOCK-th of them."""
        cached = self.__dict__.get("_permutation_of_epoch")
        if cached is None or cached[0] != epoch:
            # Only one epoch is kept at a time; a frozen dataclass may cache as cached_property does.
            self.__dict__["_permutation_of_epoch"] = cached = None
            groups = np.arange(self._first_group[-1], dtype=np.uint32)
            self._generator(_GROUPS, epoch).shuffle(groups)
            blocks = range(0, len(groups), _BLOCK)
            ends = np.cumsum([self._locate(groups[i : i + _BLOCK])[2].sum() for i in blocks])
            cached = self.__dict__["_permutation_of_epoch"] = (epoch, groups, np.concatenate([[0], ends]))
        return cached[1], cached[2]

    def _groups_between(self, epoch: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Row groups ``[n]`` that contain positions ``start .. stop`` of the epoch, and where each begins, in order.

        A few more may come before and after them.
        """
        groups, positions = self._permutation(epoch)
        low = int(np.searchsorted(positions, start, side="right")) - 1
        high = int(np.searchsorted(positions, stop, side="left"))
        found = groups[low * _BLOCK : high * _BLOCK]
        sizes = self._locate(found)[2]
        return found, positions[low] + np.cumsum(sizes) - sizes

    def _rank(self, lane: int | np.ndarray, x: int) -> np.ndarray:
        """Return how many slots of the lane are in stream positions [0, x)."""
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

    def _window_permutation(self, epoch: int, lane: int, window: int) -> np.ndarray:
        """``[n]`` indices into the window, in the order of the stream; empty if the lane ends before the window."""
        size = min(self.window, int(self._lane_counts(epoch)[lane]) - window * self.window)
        return self._generator(_WINDOW, epoch, lane, window).permutation(max(size, 0))

    def _window_rows(self, epoch: int, lane: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards and rows ``[n]`` of one window's examples, in the order of the stream."""
        start = int(self._lane_counts(epoch)[:lane].sum()) + window * self.window
        position = start + self._window_permutation(epoch, lane, window)
        groups, begins = self._groups_between(epoch, start, start + len(position))
        index = np.searchsorted(begins, position, side="right") - 1
        shard, first, _ = self._locate(groups[index])
        return shard, first + position - begins[index]

    def _steps_and_slots(self, epoch: int, lane: int, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return steps, from the run's start, and slots ``[n]`` of ranks in the epoch's lane: the inverse of _rank."""
        low, high = self._lane_slots[lane], self._lane_slots[lane + 1]
        steps, slots = np.divmod(ranks + self._rank(lane, epoch * self.num_examples), high - low)
        return steps, slots + low

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
            The examples of the unit; none if the lane ends before the window.
        """
        lanes = self.lanes_of(slots)
        window, lane_index = divmod(index, len(lanes))
        epoch, window = divmod(window, self.windows_per_epoch)
        lane = lanes[lane_index]
        shards, rows = self._window_rows(epoch, lane, window)
        steps, slot = self._steps_and_slots(epoch, lane, window * self.window + np.arange(len(rows)))
        mine = (slot >= slots.start) & (slot < slots.stop)
        return Unit(epoch, steps[mine], slot[mine], shards[mine], rows[mine])

    def unit_range(self, slots: range, start_step: int, stop_step: int) -> range:
        """Return numbers of the units that contain the slots of steps ``start_step .. stop_step``.

        The first unit may begin before start_step and the last end after stop_step, by less than a window each.
        """
        lanes = np.array(self.lanes_of(slots))
        start, stop = start_step * self.global_batch_size, stop_step * self.global_batch_size
        first, last = start // self.num_examples, (stop - 1) // self.num_examples  # epochs
        # Lanes go through their windows in parallel, but one may be a window ahead of another.
        begin = (self._rank(lanes, start) - self._rank(lanes, first * self.num_examples)) // self.window
        end = (self._rank(lanes, stop) - self._rank(lanes, last * self.num_examples) - 1) // self.window
        rounds = first * self.windows_per_epoch + begin.min(), last * self.windows_per_epoch + end.max() + 1
        return range(int(rounds[0]) * len(lanes), int(rounds[1]) * len(lanes))

    def rows_of_step(self, step: int) -> Iterator[tuple[int, int, int]]:
        """Return the (epoch, shard, row) of every slot of a step, in slot order."""
        slots = range(self.global_batch_size)
        found: dict[int, tuple[int, int, int]] = {}
        for index in self.unit_range(slots, step, step + 1):
            unit = self.unit(index, slots)
            for i in np.flatnonzero(unit.steps == step):
                found[int(unit.slots[i])] = (unit.epoch, int(unit.shards[i]), int(unit.rows[i]))
        assert len(found) == self.global_batch_size
        return (found[slot] for slot in slots)

    def steps_of(self, shard: int, row: int, epochs: Iterable[int]) -> list[tuple[int, int]]:
        """Return the (step, slot) at which an example is used in each of the epochs."""
        found = []
        group, row_in_group = divmod(row, self.row_group_size)
        for epoch in epochs:
            groups, positions = self._permutation(epoch)
            index = int(np.flatnonzero(groups == self._first_group[shard] + group)[0])
            block = index // _BLOCK
            position = positions[block] + self._locate(groups[block * _BLOCK : index])[2].sum() + row_in_group
            ends = np.cumsum(self._lane_counts(epoch))
            lane = int(np.searchsorted(ends, position, side="right"))
            window, offset = divmod(int(position - ends[lane] + self._lane_counts(epoch)[lane]), self.window)
            rank = np.flatnonzero(self._window_permutation(epoch, lane, window) == offset) + window * self.window
            steps, slots = self._steps_and_slots(epoch, lane, rank)
            found.append((int(steps[0]), int(slots[0])))
        return found
