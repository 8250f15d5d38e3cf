import itertools

import numpy as np
import pytest

from bit_ray.data.order import Order, Shuffle
from bit_ray.errors import ConfigError


def make(sizes=(130, 64, 7, 200), batch=24, seed=3, lanes=4, window=32, group=16, full=100):
    return Order(
        shard_sizes=sizes,
        row_group_size=group,
        global_batch_size=batch,
        seed=seed,
        shuffle=Shuffle(num_lanes=lanes, lane_window=window, full_up_to=full),
    )


def stream(order, num_steps, num_workers=1, start=0):
    """(step, slot) -> (epoch, shard, row), read the way workers read: unit by unit."""
    seen = {}
    bounds = [order.global_batch_size * w // num_workers for w in range(num_workers + 1)]
    for a, b in itertools.pairwise(bounds):
        slots = range(a, b)
        for index in order.unit_range(slots, start, start + num_steps):
            unit = order.unit(index, slots)
            for step, slot, shard, row in zip(unit.steps, unit.slots, unit.shards, unit.rows, strict=True):
                if start <= step < start + num_steps:
                    assert (step, slot) not in seen
                    seen[int(step), int(slot)] = (unit.epoch, int(shard), int(row))
    assert len(seen) == num_steps * order.global_batch_size
    return seen


@pytest.mark.parametrize(
    ("batch", "lanes", "window", "group"), [(24, 4, 32, 16), (10, 3, 7, 5), (1, 1, 4, 3), (450, 8, 16, 64)]
)
def test_every_example_is_seen_exactly_once_per_epoch(batch, lanes, window, group):
    order = make(batch=batch, lanes=lanes, window=window, group=group)
    n = order.num_examples
    num_steps = -(-3 * n // batch)
    seen = stream(order, num_steps)
    everything = {(s, r) for s, size in enumerate(order.shard_sizes) for r in range(size)}
    for epoch in range(3):
        rows = [(s, r) for e, s, r in seen.values() if e == epoch]
        assert len(rows) == n
        assert set(rows) == everything


@pytest.mark.parametrize("num_workers", [2, 3, 4, 5, 8])
def test_the_number_of_workers_changes_nothing(num_workers):
    order = make()
    assert stream(order, 60, num_workers) == stream(order, 60)


def test_a_resumed_stream_continues_where_it_stopped():
    order = make()
    whole = stream(order, 60)
    assert stream(order, 20, num_workers=2, start=40) == {k: v for k, v in whole.items() if k[0] >= 40}


def test_a_step_spans_epochs_at_stream_positions():
    order = make(batch=24)
    step = order.num_examples // 24
    epochs = [e for e, _, _ in order.rows_of_step(step)]
    assert sorted(epochs) == [0] * (order.num_examples % 24) + [1] * (24 - order.num_examples % 24)


def test_epochs_and_seeds_give_other_orders():
    a = list(make(seed=1).rows_of_step(0))
    assert a == list(make(seed=1).rows_of_step(0))
    assert a != list(make(seed=2).rows_of_step(0))
    order = make(sizes=(240,), batch=24)
    assert [x[1:] for x in order.rows_of_step(0)] != [x[1:] for x in order.rows_of_step(10)]


def test_a_small_set_is_shuffled_in_full():
    order = make(sizes=(100, 100), batch=10, full=200)
    assert order.num_lanes == 1
    # Over 40 epochs the set's first row lands in each tenth of the epoch equally often (chi-square, 9 degrees).
    places = []
    for epoch in range(40):
        rows = [x for step in range(20) for x in order.rows_of_step(epoch * 20 + step)]
        places.append(next(i for i, (_, s, r) in enumerate(rows) if (s, r) == (0, 0)) // 20)
    counts = np.bincount(places, minlength=10)
    assert ((counts - 4) ** 2 / 4).sum() < 27.9  # p = 0.001


def test_one_worker_reads_each_row_group_of_its_lanes_about_once():
    order = make(sizes=(4096,), batch=64, lanes=8, window=256, group=64)
    reads = 0
    for w in range(8):
        slots = range(w * 8, w * 8 + 8)
        for index in order.unit_range(slots, 0, 64)[: order.windows_per_epoch]:
            unit = order.unit(index, slots)
            reads += len(set(zip(unit.shards, unit.rows // 64, strict=True)))
    assert reads <= 64 * 1.3


def test_bad_settings_are_refused_by_name():
    with pytest.raises(ConfigError, match="global_batch_size: 0"):
        make(batch=0)
    with pytest.raises(ConfigError, match="no examples"):
        make(sizes=(0, 0))
    with pytest.raises(ConfigError, match="lane_window: 0"):
        Shuffle(lane_window=0)
