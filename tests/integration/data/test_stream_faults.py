import re
import threading
import time

import pytest
import torch
from faulty_s3 import Faults
from servers import kill_ray_processes

from bit_ray.data.images.views import TrainView
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.shards.read import read_tables
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.embedded.glyphs import GlyphSource
from bit_ray.data.stream.batches import StreamCounts, StreamSpec, batches, stream_order
from bit_ray.data.stream.settings import CacheConfig, Shuffle
from bit_ray.errors import DataError

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_local")]
BATCH = 25
NUM_STEPS = 24  # two epochs of 300


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    directory = tmp_path_factory.mktemp("glyphs") / "set"
    write_shards(GlyphSource("s", examples_per_class=6), directory, name="glyphs", row_group_size=8, shard_examples=60)
    return directory


@pytest.fixture
def remote(local, s3, faulty_s3):
    """The same set on S3 behind the proxy; Ray's workers were started before the test and do not know where that is."""
    for path in local.iterdir():
        s3.client.upload_file(str(path), s3.bucket, f"set/{path.name}")
    place = faulty_s3.endpoint.removeprefix("http://")
    return f"s3://{s3.bucket}/set?endpoint_override={place}&scheme=http&region=us-east-1"


def spec(shards, cache, **changes):
    settings = {
        "global_batch_size": BATCH,
        "slots": range(BATCH),
        "start_step": 0,
        "stop_step": NUM_STEPS,
        "seed": 3,
        "shuffle": Shuffle(num_lanes=5, lane_window=20, full_up_to=1),
        "view": TrainView(crop="inception", crop_size=32),
        "cache": CacheConfig(directory=str(cache)),
    }
    return StreamSpec(shards=str(shards), manifest_digest=read_manifest(shards).digest, **settings | changes)


@pytest.fixture(scope="module")
def undisturbed(local, ray_local, tmp_path_factory):
    return list(batches(spec(local, tmp_path_factory.mktemp("cache"))))


def assert_same(found, expected):
    assert [batch.step for batch in found] == [batch.step for batch in expected]
    for a, b in zip(found, expected, strict=True):
        assert a.ids == b.ids
        assert a.bad == b.bad == ()
        assert torch.equal(a.images, b.images)
        assert a.rows == b.rows


def test_the_ids_are_those_of_the_order_each_once_per_epoch(local, undisturbed, tmp_path):
    manifest = read_manifest(local)
    ids = [id for table in read_tables(str(local), manifest) for id in table["id"].to_pylist()]
    first = [sum(shard.num_examples for shard in manifest.shards[:i]) for i in range(len(manifest.shards))]
    order = stream_order(spec(local, tmp_path))
    for batch in undisturbed:
        assert batch.ids == tuple(ids[first[shard] + row] for _, shard, row in order.rows_of_step(batch.step))
    for epoch in range(2):
        seen = [id for batch in undisturbed[epoch * 12 : epoch * 12 + 12] for id in batch.ids]
        assert sorted(seen) == sorted(ids)


@pytest.mark.parametrize(
    "faults",
    [
        Faults(slow_down=0.2),
        Faults(internal_error=0.2),
        Faults(reset=0.2),
        Faults(cut=0.1, short=0.1),
        Faults(stall=0.2, stall_s=1.0),
    ],
    ids=lambda faults: "+".join(kind for kind in Faults.KINDS if getattr(faults, kind)),
)
def test_a_store_that_fails_changes_no_batch(remote, faulty_s3, undisturbed, tmp_path, faults):
    stream = spec(remote, tmp_path / "cache")
    faulty_s3.faults = faults
    counts = StreamCounts()
    assert_same(list(batches(stream, counts=counts)), undisturbed)
    assert sum(faulty_s3.counts[kind] for kind in Faults.KINDS) >= 3, faulty_s3.counts
    assert counts.fetched_bytes > 0
    assert counts.row_groups_on_node > 0  # the second epoch, at the least


def test_readers_that_are_killed_change_no_batch(remote, faulty_s3, undisturbed, tmp_path):
    stream = spec(remote, tmp_path / "cache")
    faulty_s3.faults = Faults(stall=0.3, stall_s=1.0)  # so that a reader is at work when it is killed
    killed, done = [], threading.Event()

    def kill():
        while not done.is_set() and len(killed) < 2:
            found = kill_ray_processes("ReadShards", at_most=1)
            killed.extend(found)
            time.sleep(0.5 if found else 0.02)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        assert_same(list(batches(stream)), undisturbed)
    finally:
        done.set()
        killer.join()
    assert len(killed) >= 1


def test_credentials_that_expire_stop_the_stream_with_one_line(remote, faulty_s3, undisturbed, tmp_path):
    # A round at a time: what is read ahead when the credentials expire does not bring the whole run to its end.
    stream = spec(remote, tmp_path / "cache", stop_step=10_000)
    faulty_s3.faults = Faults()
    running = batches(stream)
    found = [next(running) for _ in range(2)]
    running.close()
    assert_same(found, undisturbed[:2])
    faulty_s3.faults = Faults(expired=True)
    started = time.monotonic()
    with pytest.raises(DataError) as caught:
        list(batches(spec_without_asking(stream, cache=CacheConfig(directory=str(tmp_path / "empty")))))
    assert time.monotonic() - started < 20
    assert "\n" not in str(caught.value)
    assert re.search("expired|credential", str(caught.value), re.IGNORECASE)
    # With new credentials it goes on where it stood.
    faulty_s3.faults = Faults()
    assert_same(list(batches(spec(remote, tmp_path / "cache", start_step=2))), undisturbed[2:])


def spec_without_asking(stream, **changes):
    return StreamSpec(**{name: getattr(stream, name) for name in stream.__dataclass_fields__} | changes)
