import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from scipy.stats import chi2

from bit_ray.data.stream.order import Order
from bit_ray.data.stream.settings import Shuffle
from bit_ray.errors import ConfigError


def make(sizes=(130, 64, 7, 200), batch=24, seed=3, lanes=4, window=32, group=16, full=100):
    return Order(
        shard_sizes=sizes,
        row_group_size=group,
        global_batch_size=batch,
        seed=seed,
        shuffle=Shuffle(num_lanes=lanes, lane_window=window, full_up_to=full),
    )


def stream(order, num_steps, num_workers=1, start=0, bounds=None):
    """(step, slot) -> (epoch, shard, row), read the way workers read: unit by unit."""
    seen = {}
    if bounds is None:
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


@pytest.mark.parametrize("case", range(40))
def test_whatever_the_set_the_settings_the_workers_and_the_stop_the_stream_is_one(case):
    rng = np.random.default_rng(case)
    sizes = rng.integers(0, 90, rng.integers(1, 9)) + np.eye(1, 1, dtype=int)[0]  # shards without a row among them
    order = make(
        sizes=sizes,
        batch=int(rng.integers(1, 70)),
        seed=case,
        lanes=int(rng.integers(1, 9)),
        window=int(rng.integers(1, 60)),
        group=int(rng.integers(1, 20)),
        full=int(rng.choice([1, 150])),
    )
    n, batch = order.num_examples, order.global_batch_size
    num_steps = -(-3 * n // batch)
    whole = stream(order, num_steps)
    # Each example once in each of three epochs, in the order of the stream.
    everything = sorted((s, r) for s, size in enumerate(sizes) for r in range(size))
    in_order = [whole[divmod(x, batch)] for x in range(3 * n)]
    assert [epoch for epoch, _, _ in in_order] == sorted([0, 1, 2] * n)
    assert all(sorted((s, r) for _, s, r in in_order[e * n : e * n + n]) == everything for e in range(3))
    # The same from any number of workers, in cuts of any width, and from any step on.
    for num_workers in (2, 3, 4, 8):
        inside = np.sort(rng.choice(np.arange(1, batch), min(num_workers, batch) - 1, replace=False)).tolist()
        start = int(rng.integers(num_steps))
        resumed = stream(order, num_steps - start, start=start, bounds=[0, *inside, batch])
        assert resumed == {place: row for place, row in whole.items() if place[0] >= start}
    # A step lists its examples, and an example its steps.
    step = int(rng.integers(num_steps))
    seen = list(order.rows_of_step(step))
    assert seen == [whole[step, slot] for slot in range(batch)]
    for slot in rng.integers(0, batch, 5).tolist():
        epoch, shard, row = seen[slot]
        assert order.steps_of(shard, row, [epoch]) == [(step, slot)]
    shard, row = everything[rng.integers(n)]
    uses = [place for place, (epoch, s, r) in whole.items() if (s, r) == (shard, row) and epoch < 3]
    assert order.steps_of(shard, row, range(3)) == sorted(uses)


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


def test_a_single_lane_of_a_large_set_keeps_to_its_window():
    order = make(lanes=1)
    assert order.window == 32
    assert max(len(order.unit(index, range(24)).rows) for index in range(order.windows_per_epoch)) == 32


def test_one_worker_reads_each_row_group_of_its_lanes_about_once():
    order = make(sizes=(4096,), batch=64, lanes=8, window=256, group=64)
    reads = 0
    for w in range(8):
        slots = range(w * 8, w * 8 + 8)
        for index in order.unit_range(slots, 0, 64)[: order.windows_per_epoch]:
            unit = order.unit(index, slots)
            reads += len(set(zip(unit.shards, unit.rows // 64, strict=True)))
    assert reads <= 64 * 1.3


# A set sorted by class, in which every row group is of one class but where two classes meet.
NUM_CLASSES, PER_CLASS = 40, 250


def sorted_by_class(seed=1, batch=256, group=64):
    return make(sizes=(1000,) * 10, batch=batch, seed=seed, lanes=4, window=512, group=group, full=1)


def classes(shards, rows):
    return (np.asarray(shards) * 1000 + np.asarray(rows)) // PER_CLASS


def shuffle_p_value(order, draw, num_epochs=5):
    """Whether the batches of a window are what shuffling the window in full would give.

    Given the row groups that a window holds, its batches are a random partition of its examples, so that the table of
    batches x classes has fixed margins and hypergeometric cells. Pearson's statistic of such a table has the mean
    ``(R - 1) (C - 1) n / (n - 1)``; with that last factor taken out it follows a chi-square of (R - 1)(C - 1) degrees.
    Windows are shuffled independently of each other, so that statistics and degrees add up.
    """
    statistic, degrees = 0.0, 0
    slots = range(order.global_batch_size)
    for index in order.unit_range(slots, 0, num_epochs * order.num_examples // order.global_batch_size):
        unit = order.unit(index, slots)
        n = len(unit.steps)
        if n < order.window:  # a lane's last window, where too few examples are left for the approximation
            continue
        _, batch = np.unique(unit.steps, return_inverse=True)
        _, label = np.unique(classes(unit.shards, unit.rows)[draw(unit)], return_inverse=True)
        table = np.zeros((batch.max() + 1, label.max() + 1))
        np.add.at(table, (batch, label), 1)
        expected = np.outer(table.sum(1), table.sum(0)) / n
        statistic += ((table - expected) ** 2 / expected).sum() * (n - 1) / n
        degrees += (table.shape[0] - 1) * (table.shape[1] - 1)
    assert degrees > 4000
    return chi2.sf(statistic, degrees)


def as_it_comes(unit):
    return np.arange(len(unit.rows))


def as_read(unit):
    """The window without its shuffle: one row group after the other."""
    return np.lexsort((unit.rows, unit.shards))


def dealt(unit):
    """The window dealt out class by class, so that its batches are as even as can be: not random either."""
    return as_read(unit)[np.argsort(np.arange(len(unit.rows)) % 8, kind="stable")]


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_batches_of_a_sorted_set_are_a_full_shuffle_of_their_windows(seed):
    # Significance 0.002, both tails: neither clumps nor more even than chance. Seeds are fixed.
    assert 0.001 < shuffle_p_value(sorted_by_class(seed=seed), as_it_comes) < 0.999


def test_the_test_of_the_shuffle_sees_windows_that_are_not_shuffled_or_dealt_out():
    order = sorted_by_class()
    assert shuffle_p_value(order, as_read) < 1e-9
    assert shuffle_p_value(order, dealt) > 1 - 1e-9


def test_windows_draw_their_row_groups_from_the_whole_set():
    # A window's row groups are drawn without replacement from the set's: their classes are hypergeometric, too.
    order = sorted_by_class(group=16)
    shards, groups = np.divmod(np.arange(630), 63)
    possible = np.bincount(classes(shards, groups * 16), minlength=NUM_CLASSES)
    statistic = 0.0
    for epoch in range(60):
        unit = order.unit(epoch * order.windows_per_epoch * order.num_lanes, range(256))
        shards, groups = np.unique(np.stack([unit.shards, unit.rows // 16]), axis=1)
        found = np.bincount(classes(shards, groups * 16), minlength=NUM_CLASSES)
        expected = len(shards) * possible / 630
        statistic += ((found - expected) ** 2 / expected).sum() * 629 / (630 - len(shards))
    assert 0.001 < chi2.sf(statistic, 60 * (NUM_CLASSES - 1)) < 0.999


def test_neighbours_change_from_epoch_to_epoch():
    order = sorted_by_class(batch=64, group=16)
    mates = [set(), set()]
    batches = {}
    for (step, _), (epoch, shard, row) in stream(order, 2 * order.num_examples // 64).items():
        batches.setdefault((epoch, step), []).append(shard * 1000 + row)
    for (epoch, _), batch in batches.items():
        mates[epoch] |= set(itertools.combinations(sorted(batch), 2))
    # By chance two examples share a batch with 63 / 9,999. A row group stays together in its window, so that the 15
    # others of an example's row group are met again more often: 15 / 511. They are less than 1 % of its mates.
    again = len(mates[0] & mates[1]) / len(mates[0])
    assert 0.9 * 63 / 9999 < again < 1.15 * 63 / 9999


# A manifest of 73,000 shards, the first units of an epoch, and a step that ends one epoch and begins the next.
PLAN_AT_SCALE = """
import sys, time
from bit_ray import store
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.stream.order import Order
from bit_ray.data.stream.settings import Shuffle

def memory(kind):
    text = open("/proc/self/status").read()
    return int(text.split(kind + ":")[1].split()[0]) / 1e3

store.exists(sys.argv[1])  # libraries are loaded
before, began = memory("VmRSS"), time.process_time()
manifest = read_manifest(sys.argv[1])
assert len(manifest.digest) == 64
read = time.process_time() - began
began = time.process_time()
order = Order(
    shard_sizes=tuple(shard.num_examples for shard in manifest.shards),
    row_group_size=64,
    global_batch_size=4096,
    seed=1,
    shuffle=Shuffle(num_lanes=64, lane_window=4096),
)
assert len(order.unit(0, range(64)).rows) == 4096
planned = time.process_time() - began
epochs = [epoch for epoch, _, _ in order.rows_of_step(order.num_examples // 4096)]
assert set(epochs) == {0, 1}
print(order.num_examples, read, planned, memory("VmHWM") - before)
"""


def test_the_plan_of_300_million_examples_takes_little_time_and_memory(tmp_path):
    sizes = np.random.default_rng(0).integers(4000, 4222, 73_000).tolist()
    shards = [
        {"path": f"shard-{i:05d}.parquet", "num_examples": n, "num_bytes": n * 110_000, "sha256": f"{i:064x}"}
        for i, n in enumerate(sizes)
    ]
    manifest = {"name": "jft", "class_names": ["a", "b"], "multi_label": True, "row_group_size": 64, "format": 1}
    manifest |= {"median_image_size": [375, 500], "num_examples": sum(sizes), "shards": shards}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    done = subprocess.run(
        [sys.executable, "-c", PLAN_AT_SCALE, str(tmp_path)], capture_output=True, text=True, check=True, timeout=120
    )
    num_examples, read_s, plan_s, peak_mb = map(float, done.stdout.split())
    assert num_examples > 3e8
    assert read_s < 5.0  # seconds of processor time; 0.3 on an idle machine
    assert plan_s < 10.0  # 0.7
    assert peak_mb < 100.0  # all told; 60 MB


def test_bad_settings_are_refused_by_name():
    with pytest.raises(ConfigError, match="global_batch_size: 0"):
        make(batch=0)
    with pytest.raises(ConfigError, match="no examples"):
        make(sizes=(0, 0))
    with pytest.raises(ConfigError, match="lane_window: 0"):
        Shuffle(lane_window=0)
