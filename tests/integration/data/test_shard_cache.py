import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from faulty_s3 import Faults

from bit_ray import store, store_access, store_failures
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.shards.read import index_rows, read_rows
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.base import Example
from bit_ray.data.stream.cache import NodeCache
from bit_ray.data.stream.settings import CacheConfig
from bit_ray.errors import DamagedShardError, DataError, StoreError

pytestmark = pytest.mark.cluster

# Run in a process of its own: locate every row group with 4 threads, in an order of its own.
LOCATE = """
import json, os, random, sys
from concurrent.futures import ThreadPoolExecutor
from bit_ray.data.stream.cache import NodeCache
from bit_ray.data.stream.settings import CacheConfig
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.shards.read import index_rows

uri, directory, max_gb, seed = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
manifest = read_manifest(uri)
node = NodeCache(CacheConfig(directory=directory, max_gb=max_gb))

def locate(pair):
    shard, group = pair
    place = node.locate(uri, manifest.digest, manifest.shards[shard], group, manifest.row_group_size)
    file = open(place.path, "rb")
    index = index_rows(place.path, place.group)
    if place.transient:
        os.unlink(place.path)
    files = [os.pread(file.fileno(), n, o) for o, n in zip(index["offset"].to_pylist(), index["length"].to_pylist())]
    size = sum(e.stat().st_size for of_set in os.scandir(f"{directory}/sets") for e in os.scandir(of_set))
    return shard, group, index["id"].to_pylist(), [file[:1].hex() for file in files], place.fetched_bytes, size

pairs = [(s, g) for s in range(len(manifest.shards)) for g in range(manifest.row_groups(s))]
random.Random(seed).shuffle(pairs)
print("ready", flush=True)
sys.stdin.readline()
with ThreadPoolExecutor(4) as pool:
    print(json.dumps(list(pool.map(locate, pairs))))
"""


def image(i, num_bytes):
    """A bitmap with noise to the wanted size behind it: what is stored counts here, not the picture."""
    from io import BytesIO

    from PIL import Image

    buffer = BytesIO()
    Image.new("RGB", (4, 4), (i % 256, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue() + np.random.default_rng(i).bytes(num_bytes)


@pytest.fixture
def remote(s3, tmp_path):
    """A set of 5 shards and 20 row groups of 200 kB in a bucket, and its tables by (shard, group)."""
    examples = [Example(f"e{i:03d}", image(i, 50_000), (i % 3,)) for i in range(78)]
    options = {"name": "set", "class_names": ("a", "b", "c"), "row_group_size": 4, "shard_examples": 16}
    write_shards(examples, tmp_path / "set", **options)
    for path in (tmp_path / "set").iterdir():
        store.upload_file(path, s3.uri(f"set/{path.name}"))
    manifest = read_manifest(tmp_path / "set")
    groups = [(s, g) for s in range(len(manifest.shards)) for g in range(manifest.row_groups(s))]
    assert len(groups) == 20
    return manifest, {(s, g): read_rows(str(tmp_path / "set"), manifest, s, [g]) for s, g in groups}


@pytest.fixture
def patience(monkeypatch):
    """Short, so that a test that should fail fast but does not is seen."""
    monkeypatch.setattr(store_failures, "PATIENCE_S", 30.0)


def locate_all(s3, manifest, directory, groups, num_threads=4):
    node = NodeCache(CacheConfig(directory=str(directory)))
    with ThreadPoolExecutor(num_threads) as pool:
        return list(
            pool.map(
                lambda pair: node.locate(s3.uri("set"), manifest.digest, manifest.shards[pair[0]], pair[1], 4), groups
            )
        )


def check(places, tables):
    for place, table in zip(places, tables.values(), strict=True):
        assert pq.read_table(place.path).equals(table)
        index = index_rows(place.path, place.group)
        data = Path(place.path).read_bytes()
        offsets, lengths = index["offset"].to_pylist(), index["length"].to_pylist()
        assert [data[o : o + n] for o, n in zip(offsets, lengths, strict=True)] == table["image"].to_pylist()


@pytest.mark.parametrize(
    "faults",
    [
        Faults(slow_down=0.3),
        Faults(internal_error=0.3),
        Faults(reset=0.3),
        Faults(cut=0.3),
        Faults(short=0.3),
        Faults(garble=1.0, at_most=2, only=".parquet"),
        Faults(stall=0.2, stall_s=2.0),
        Faults(slow_down=0.1, internal_error=0.1, reset=0.1, cut=0.1, short=0.05, stall=0.05, stall_s=0.5),
    ],
    ids=["slow_down", "internal_error", "reset", "cut", "short", "garble", "stall", "all"],
)
def test_every_row_comes_out_right_whatever_the_store_does(faulty_s3, s3, remote, tmp_path, patience, faults):
    manifest, tables = remote
    faulty_s3.faults = faults
    assert read_manifest(s3.uri("set")) == manifest
    places = locate_all(s3, manifest, tmp_path / "cache", tables, num_threads=8)
    kinds = [kind for kind in Faults.KINDS if getattr(faults, kind)]
    assert sum(faulty_s3.counts[kind] for kind in kinds) >= 2, faulty_s3.counts
    check(places, tables)


def test_rows_without_their_images_are_read_through_faults_in_small_requests(faulty_s3, s3, remote, patience):
    manifest, tables = remote
    faulty_s3.faults = Faults(slow_down=0.1, reset=0.1, cut=0.1, short=0.1)
    with ThreadPoolExecutor(8) as pool:
        rows = list(
            pool.map(lambda pair: read_rows(s3.uri("set"), manifest, pair[0], [pair[1]], ["id", "labels"]), tables)
        )
    for read, table in zip(rows, tables.values(), strict=True):
        assert read.equals(table.select(["id", "labels"]))
    assert max(get.num_bytes for get in faulty_s3.gets) < 50_000


def start(uri, directory, max_gb, seed):
    return subprocess.Popen(
        [sys.executable, "-c", LOCATE, uri, str(directory), str(max_gb), str(seed)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def go(processes):
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    return [json.loads(process.communicate(timeout=60)[0]) for process in processes]


def test_processes_and_threads_of_a_node_fetch_each_row_group_once(faulty_s3, s3, remote, tmp_path):
    manifest, tables = remote
    faulty_s3.forget()
    processes = [start(s3.uri("set"), tmp_path / "cache", 1, seed) for seed in (1, 2)]
    answers = go(processes)
    assert [len(answer) for answer in answers] == [20, 20]
    for shard, group, ids, _, _, _ in answers[0] + answers[1]:
        assert ids == tables[shard, group]["id"].to_pylist()
    fetched = Counter((shard, group) for answer in answers for shard, group, _, _, num_bytes, _ in answer if num_bytes)
    assert fetched == Counter(list(tables))
    # The proxy's own count: one range for each row group, and a footer per shard and process.
    ranges = Counter(get[:2] for get in faulty_s3.gets if get.num_bytes > 100_000 and get.path.endswith("parquet"))
    assert len(ranges) == 20
    assert set(ranges.values()) == {1}
    assert faulty_s3.counts["HEAD"] <= 2 * 5 + 4
    faulty_s3.forget()
    check(locate_all(s3, manifest, tmp_path / "cache", tables), tables)
    assert faulty_s3.counts == {}


def test_the_bound_holds_for_several_processes(faulty_s3, s3, remote, tmp_path):
    _, tables = remote
    max_bytes = 2_400_000  # a half of the set: 10 row groups and what passes through
    answers = go([start(s3.uri("set"), tmp_path / "cache", max_bytes / 1e9, seed) for seed in (1, 2)])
    for answer in answers:
        assert sorted((shard, group) for shard, group, *_ in answer) == list(tables)
        for shard, group, ids, _, _, size in answer:
            assert ids == tables[shard, group]["id"].to_pylist()
            assert size <= max_bytes * 7 / 8
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= max_bytes
    assert len(list((tmp_path / "cache" / "sets").rglob("*.parquet"))) == 10
    # Nothing was left to readers that have come and gone.
    assert len(list((tmp_path / "cache" / "passing").iterdir())) <= 1


def test_a_process_killed_while_fetching_leaves_nothing_that_is_taken_for_whole(faulty_s3, s3, remote, tmp_path):
    manifest, tables = remote
    faulty_s3.faults = Faults(stall=1.0, stall_s=30, only=manifest.shards[2].path)
    process = start(s3.uri("set"), tmp_path / "cache", 1, 3)
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("\n")
    process.stdin.flush()
    deadline = time.monotonic() + 20
    while not faulty_s3.counts["stall"] and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdin.close()
    process.stdout.close()
    assert os.listdir(tmp_path / "cache" / "partial")
    faulty_s3.faults = Faults()
    kept = set((tmp_path / "cache" / "sets").rglob("*.parquet"))
    started = time.monotonic()
    places = locate_all(s3, manifest, tmp_path / "cache", tables)
    assert time.monotonic() - started < 5  # nobody waits for the dead
    check(places, tables)
    assert {Path(place.path) for place in places if place.hit} == kept
    assert os.listdir(tmp_path / "cache" / "partial") == []


def test_processes_killed_at_any_moment_harm_nobody(faulty_s3, s3, remote, tmp_path):
    manifest, tables = remote
    node = CacheConfig(directory=str(tmp_path / "cache"), max_gb=0.0024)
    moments = np.random.default_rng(5).uniform(0.0, 0.25, 6)
    processes = [start(s3.uri("set"), node.directory, node.max_gb, seed) for seed in range(len(moments))]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process, moment in zip(processes, moments, strict=True):
        process.stdin.write("\n")
        process.stdin.flush()
        time.sleep(moment)
        process.kill()
        process.communicate()
    check(locate_all(s3, manifest, tmp_path / "cache", tables), tables)
    assert sum(path.stat().st_size for path in (tmp_path / "cache" / "sets").rglob("*.parquet")) > 2_000_000


def test_expired_credentials_are_one_clear_error_at_once_and_renewed_ones_go_on(faulty_s3, s3, remote, tmp_path):
    manifest, tables = remote
    groups = list(tables)
    locate_all(s3, manifest, tmp_path / "cache", groups[:1])
    faulty_s3.faults = Faults(expired=True)
    for group in (groups[1], groups[10]):  # of a shard that is open, and of one that is not
        started = time.monotonic()
        with pytest.raises(
            DataError,
            match=rf"refused by {faulty_s3.endpoint} \((ExpiredToken|ACCESS_DENIED)\); .*renew expired credentials",
        ) as caught:
            locate_all(s3, manifest, tmp_path / "cache", [group])
        assert time.monotonic() - started < 2
        assert type(caught.value) is StoreError
        assert "\n" not in str(caught.value)
    assert faulty_s3.counts["expired"] == 2
    faulty_s3.faults = Faults()
    check(locate_all(s3, manifest, tmp_path / "cache", groups), tables)


def test_missing_and_truncated_shards_are_damage_at_once(faulty_s3, s3, remote, tmp_path):
    manifest, tables = remote
    keys = [f"set/{shard.path}" for shard in manifest.shards]
    s3.client.delete_object(Bucket=s3.bucket, Key=keys[0])
    whole = store.read_bytes(s3.uri(keys[1]))
    s3.client.put_object(Bucket=s3.bucket, Key=keys[1], Body=whole[: len(whole) // 2])
    s3.client.put_object(Bucket=s3.bucket, Key=keys[2], Body=bytes(manifest.shards[2].num_bytes))
    locate_all(s3, manifest, tmp_path / "cache", [(3, 0)])
    s3.client.put_object(Bucket=s3.bucket, Key=keys[3], Body=b"another")  # while it is open
    # A store that fails as well does not turn damage into something to wait for, nor waiting into damage.
    faulty_s3.faults = Faults(slow_down=0.1, reset=0.1)
    started = time.monotonic()
    for shard, group, message in (
        (0, 1, "is in the manifest but missing"),
        (1, 0, f"{len(whole) // 2} bytes; accepted: {len(whole)}, as in the manifest"),
        (2, 3, "magic"),
        (3, 2, "7 bytes; accepted: "),
    ):
        with pytest.raises(DamagedShardError, match=message):
            locate_all(s3, manifest, tmp_path / "cache", [(shard, group)])
    assert time.monotonic() - started < 10
    sound = {pair: table for pair, table in tables.items() if pair[0] == 4}
    check(locate_all(s3, manifest, tmp_path / "cache", sound), sound)


def test_a_store_that_is_gone_is_waited_for_and_then_named(faulty_s3, s3, remote, tmp_path, monkeypatch):
    manifest, tables = remote
    monkeypatch.setattr(store_failures, "PATIENCE_S", 3.0)
    monkeypatch.setattr(store_access, "_ATTEMPTS", 3)
    store_access._remote.cache_clear()  # it has given its clients their number of attempts
    faulty_s3.faults = Faults(slow_down=1.0)
    with pytest.raises(DataError, match=r"answers with errors again and again .*503.* \(tried for \d+ s\)") as caught:
        locate_all(s3, manifest, tmp_path / "cache", list(tables)[:1])
    assert not isinstance(caught.value, DamagedShardError)
