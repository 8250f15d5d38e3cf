import pickle
import weakref
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from shard_sets import vouch_for

import bit_ray.data.stream.batches
from bit_ray.cluster.session import cluster
from bit_ray.data.images.decode import decode_image
from bit_ray.data.images.resize import train_view
from bit_ray.data.images.views import TrainView, example_keys, uniforms
from bit_ray.data.shards.fetch import local_shard
from bit_ray.data.shards.manifest import MANIFEST, read_manifest
from bit_ray.data.shards.read import read_rows, to_examples
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.base import Example
from bit_ray.data.sources.embedded.glyphs import GlyphSource
from bit_ray.data.stream.batches import StreamCounts, StreamSpec, batches, give_manifest, stream_order
from bit_ray.data.stream.bench import bench_shards
from bit_ray.data.stream.rows import HOLE
from bit_ray.data.stream.settings import Shuffle
from bit_ray.errors import DataError
from bit_ray.training.objectives.classify import Classification

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_local")]
BATCH = 24
# 150 examples: 4 lanes of several windows, and an epoch that ends in the middle of step 6.
SETTINGS = {
    "global_batch_size": BATCH,
    "slots": range(BATCH),
    "start_step": 0,
    "stop_step": 14,
    "seed": 5,
    "shuffle": Shuffle(num_lanes=4, lane_window=20, full_up_to=1),
    "view": TrainView(crop="inception", crop_size=32),
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    uri = tmp_path_factory.mktemp("stream") / "shards"
    write_shards(GlyphSource("s", examples_per_class=3), uri, name="glyphs", row_group_size=8, shard_examples=40)
    return str(uri)


def spec(shards, **changes):
    return StreamSpec(shards=shards, manifest_digest=read_manifest(shards).digest, **SETTINGS | changes)


def read(spec, **options):
    """step -> (images, targets)."""
    manifest = read_manifest(spec.shards)
    loss = "sigmoid" if manifest.multi_label else "softmax"
    targets = Classification(loss=loss, num_classes=manifest.num_classes).targets
    found = {batch.step: (batch.images, targets(batch.rows)) for batch in batches(spec, **options)}
    assert list(found) == list(range(spec.start_step, spec.stop_step))
    return found


def assert_same(a, b):
    assert a.keys() == b.keys()
    for step in a:
        assert torch.equal(a[step][0], b[step][0])
        assert torch.equal(a[step][1], b[step][1])


@pytest.fixture(scope="module")
def whole(shards, ray_local):
    return read(spec(shards))


def test_a_step_holds_the_images_of_the_order_under_their_views(shards, whole):
    manifest, stream = read_manifest(shards), spec(shards)
    rows = {
        (shard, index): example
        for shard in range(len(manifest.shards))
        for index, example in enumerate(
            to_examples(read_rows(shards, manifest, shard, range(manifest.row_groups(shard))))
        )
    }
    assert len(rows) == 150
    order = stream_order(stream)
    assert order.num_lanes == 4
    epochs = set()
    for step in (0, 6, 13):
        images, targets = whole[step]
        assert images.shape == (BATCH, 32, 32, 3)
        assert images.dtype == torch.uint8
        assert targets.dtype == torch.int64
        for slot, (epoch, shard, row) in enumerate(order.rows_of_step(step)):
            example = rows[shard, row]
            u = uniforms(stream.seed, epoch, example_keys([example.id]))[0]
            expected = train_view(decode_image(example.image), stream.view, u)
            np.testing.assert_array_equal(images[slot].numpy(), expected)
            assert targets[slot] == example.labels[0]
            epochs.add(epoch)
    assert epochs == {0, 1, 2}


def test_an_epoch_brings_every_label_as_often_as_the_set_has_it(whole):
    labels = torch.cat([whole[step][1] for step in range(13)])[:300]
    assert torch.equal(torch.bincount(labels[:150], minlength=50), torch.full((50,), 3))
    assert torch.equal(torch.bincount(labels[150:], minlength=50), torch.full((50,), 3))


@pytest.mark.parametrize("num_workers", [2, 3])
def test_workers_together_read_what_one_reads(shards, whole, num_workers):
    share = BATCH // num_workers
    parts = [
        read(spec(shards, slots=range(w * share, (w + 1) * share), stop_step=8), num_readers=1 + w % 2)
        for w in range(num_workers)
    ]
    together = {
        step: tuple(torch.cat([part[step][i] for part in parts]) for i in range(2)) for step in range(8)
    }  # fmt: skip
    assert_same(together, {step: whole[step] for step in range(8)})


@pytest.mark.parametrize("start", [1, 9])
def test_a_resumed_stream_gives_the_batches_of_the_whole_one(shards, whole, start):
    resumed = read(spec(shards, start_step=start))
    assert_same(resumed, {step: whole[step] for step in range(start, 14)})


@pytest.fixture
def one_round_at_a_time(monkeypatch):
    """Read ahead as far as in a set of many windows, which these small sets are not."""
    monkeypatch.setattr(bit_ray.data.stream.batches, "_EXAMPLES_PER_EXECUTION", 1)


def row_groups_read(spec, num_batches):
    """Row groups that had been read when so many batches had come."""
    counts = StreamCounts()
    stream = batches(spec, counts=counts)
    for _ in range(num_batches):
        next(stream)
    found = counts.row_groups
    stream.close()
    return found


def test_the_next_epoch_is_asked_for_before_this_one_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(bit_ray.data.stream.batches, "_EXAMPLES_PER_EXECUTION", 160)  # two rounds of the epoch's ten
    asked = []
    executions = bit_ray.data.stream.batches._Stream.executions

    def recorded(stream):
        for units in executions(stream):
            asked.append(units)
            yield units

    monkeypatch.setattr(bit_ray.data.stream.batches._Stream, "executions", recorded)
    settings = glyph_shards(tmp_path, examples_per_class=16)
    stream = batches(replace(settings, stop_step=60))
    for _ in range(800 // BATCH):
        next(stream)
    last = asked[-1].stop - 1
    stream.close()
    assert stream_order(settings).unit(last, settings.slots).epoch == 1


@pytest.mark.usefixtures("one_round_at_a_time")
def test_a_resumed_stream_reads_nothing_of_what_came_before(tmp_path):
    stream = glyph_shards(tmp_path, examples_per_class=12)
    steps = 600 // BATCH
    fresh = row_groups_read(stream, 1)
    assert row_groups_read(replace(stream, start_step=steps * 9 // 10, stop_step=2 * steps), 1) <= fresh
    assert fresh < 600 // 8 / 2  # of 75 row groups, a first batch needs few


@pytest.mark.usefixtures("one_round_at_a_time")
def test_what_is_held_does_not_grow_with_the_set(tmp_path, monkeypatch):
    """Two rounds of windows, one being used up and the next, and what the batches being decoded still need."""
    made = []

    class Window(bit_ray.data.stream.batches._Window):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(weakref.ref(self))

    def held():
        return sum(len(window.ids) for window in [each() for each in made] if window is not None)

    monkeypatch.setattr(bit_ray.data.stream.batches, "_Window", Window)
    most = []
    for examples_per_class in (6, 15):
        stream = glyph_shards(tmp_path / str(examples_per_class), examples_per_class)
        steps = batches(replace(stream, stop_step=50 * examples_per_class // BATCH))
        most.append(max(held() for _ in steps))
    lanes_times_window = 4 * 20
    assert 0 < most[0] <= 3 * lanes_times_window
    assert 0 < most[1] <= 3 * lanes_times_window


def test_another_seed_gives_other_images(shards, whole):
    other = read(spec(shards, seed=6, stop_step=1))
    assert not torch.equal(other[0][0], whole[0][0])


def test_several_labels_come_as_zeros_and_ones(tmp_path):
    source = GlyphSource("s", examples_per_class=1)
    labels = [(), (2,), (0, 3), (1, 2, 4)]
    examples = [
        Example(example.id, example.image, labels[i % 4]) for i, example in enumerate(source.part(np.arange(40)))
    ]
    write_shards(
        iter(examples), tmp_path, name="several", class_names=list("abcde"), multi_label=True, row_group_size=8
    )
    found = read(spec(str(tmp_path), global_batch_size=20, slots=range(20), stop_step=2, view=TrainView(crop="resize", crop_size=32, random_flip=False)))  # fmt: skip  # noqa: E501
    seen = {}
    for images, targets in found.values():
        assert targets.dtype == torch.int8
        assert targets.shape == (20, 5)
        for image, target in zip(images, targets, strict=True):
            seen[image.numpy().tobytes()] = tuple(target.nonzero().flatten().tolist())
    expected = {decode_image(example.image).tobytes(): example.labels for example in examples}
    assert len(expected) == 40
    assert seen == expected


def holes_of(spec):
    """The bad examples by (shard, row), after checking that the rest of the stream is what it would be without them."""
    order, shards = stream_order(spec), [shard.path for shard in read_manifest(spec.shards).shards]
    found = {}
    for batch in batches(spec, num_threads=2):
        bad = {(b.shard, b.row): b for b in batch.bad}
        seen = []
        for slot, (_, shard, row) in enumerate(order.rows_of_step(batch.step)):
            if (shards[shard], row) in bad:
                assert batch.rows[slot] == HOLE
                partner = batch.rows[slot ^ 1] != HOLE
                assert torch.equal(batch.images[slot], batch.images[slot ^ 1] * partner)
                seen.append((shards[shard], row))
            else:
                assert batch.rows[slot] != HOLE
        assert len(seen) == len(batch.bad)  # one that ends an epoch may begin the next in the same batch
        assert set(seen) == bad.keys()
        found |= bad
    return found


def glyph_shards(directory, examples_per_class=2):
    source = GlyphSource("s", examples_per_class=examples_per_class)
    write_shards(source, directory, name="glyphs", row_group_size=8, shard_examples=40)
    return spec(str(directory))


def test_a_missing_shard_leaves_holes_and_the_order_stays(tmp_path):
    stream = glyph_shards(tmp_path)
    (tmp_path / "shard-00001.parquet").unlink()
    found = holes_of(stream)
    assert sorted(found) == [("shard-00001.parquet", row) for row in range(40)]
    for bad in found.values():
        assert bad.id == ""
        assert bad.reason.startswith(f"{tmp_path}/shard-00001.parquet: is in the manifest but missing")


def test_a_manifest_that_is_given_is_not_read_from_the_store(tmp_path):
    stream = glyph_shards(tmp_path)
    manifest = read_manifest(tmp_path)
    (tmp_path / MANIFEST).unlink()
    give_manifest(str(tmp_path), pickle.loads(pickle.dumps(manifest)))
    assert next(batches(stream)).images.shape == (BATCH, 32, 32, 3)


def test_a_truncated_shard_leaves_holes(tmp_path):
    stream = glyph_shards(tmp_path)
    path = tmp_path / "shard-00002.parquet"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-50])
    found = holes_of(stream)
    assert sorted(found) == [("shard-00002.parquet", row) for row in range(20)]
    (reason,) = {bad.reason for bad in found.values()}
    assert reason.startswith(f"{path}: {size - 50} bytes; accepted: {size}, as in the manifest")


def test_an_image_that_was_written_bad_is_one_hole_with_its_id(tmp_path):
    stream = glyph_shards(tmp_path, examples_per_class=1)
    path = tmp_path / "shard-00000.parquet"
    data = path.read_bytes()
    # The pixels of the first image, damaged in place: sizes and footers stay as they are.
    start = data.index(b"IDAT") + 8
    path.write_bytes(data[:start] + bytes(40) + data[start + 40 :])
    found = holes_of(replace(stream, manifest_digest=vouch_for(tmp_path).digest))
    [(place, bad)] = found.items()
    assert place == ("shard-00000.parquet", 0)
    assert bad.id == read_rows(str(tmp_path), read_manifest(tmp_path), 0, [0])["id"][0].as_py()
    assert bad.reason


@pytest.mark.parametrize("part", ["id", "image", "labels"])
def test_a_bit_that_has_flipped_is_never_trained_on(tmp_path, part):
    stream = glyph_shards(tmp_path, examples_per_class=1)
    manifest = read_manifest(tmp_path)
    path = tmp_path / "shard-00000.parquet"
    with local_shard(path) as (_, file):
        group = file.footer.group(0)
        chunk = group.chunks[file.footer.columns.index(part)]
    data = bytearray(path.read_bytes())
    data[chunk.offset + chunk.length // 2] ^= 1
    path.write_bytes(data)
    found = holes_of(stream)
    assert sorted(found) == [("shard-00000.parquet", row) for row in range(group.num_rows)]
    assert {bad.reason.partition(";")[0] for bad in found.values()} == {
        f"{path}: row group 0 does not have the manifest's checksum"
    }
    with pytest.raises(DataError, match="row group 0 does not have the manifest's checksum"):
        read_rows(str(tmp_path), manifest, 0, [0])


def test_a_label_or_an_id_that_cannot_be_is_one_hole(tmp_path):
    stream = glyph_shards(tmp_path, examples_per_class=1)
    manifest = read_manifest(tmp_path)
    path = tmp_path / "shard-00000.parquet"
    table = pq.read_table(path)
    labels, ids = table["labels"].to_pylist(), [id.encode() for id in table["id"].to_pylist()]
    labels[0], labels[1], labels[2], ids[3] = [manifest.num_classes], [-1], [0, 0], b"\xff" + ids[3]
    wrong = [pa.array(ids, pa.binary()).view(pa.string()), table["image"], pa.array(labels, table["labels"].type)]
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pq.write_table(pa.table(wrong, schema=table.schema), path, row_group_size=manifest.row_group_size, **plain)
    found = holes_of(replace(stream, manifest_digest=vouch_for(tmp_path).digest))
    assert {row: bad.reason for (_, row), bad in found.items()} == {
        0: f"label {manifest.num_classes}; accepted: 0 to {manifest.num_classes - 1}",
        1: f"label -1; accepted: 0 to {manifest.num_classes - 1}",
        2: "2 labels; accepted: one",
        3: f"id is not UTF-8 text ({ids[3]!r})",
    }
    assert found["shard-00000.parquet", 0].id == ids[0].decode()
    with pytest.raises(DataError, match="row 0: label") as caught:
        read_rows(str(tmp_path), read_manifest(tmp_path), 0, [0])
    assert "\n" not in str(caught.value)


def test_a_set_that_was_written_anew_is_refused(tmp_path):
    for seed in (0, 1):
        directory = tmp_path / str(seed)
        write_shards(GlyphSource("s", examples_per_class=2, seed=seed), directory, name="glyphs")
    stream = spec(str(tmp_path / "0"))
    (tmp_path / "0").rename(tmp_path / "old")
    (tmp_path / "1").rename(tmp_path / "0")
    with pytest.raises(DataError) as caught:
        list(batches(stream))
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"{tmp_path}/0: changed since the run began (digest ")


def test_a_consumer_that_stops_early_ends_its_stream(shards):
    stream = batches(spec(shards, stop_step=1000))
    assert next(stream).step == 0
    stream.close()
    assert_same(read(spec(shards, stop_step=2)), read(spec(shards, stop_step=2)))


def test_a_ray_that_was_there_before_is_used_and_left_running():
    with cluster() as resources:
        assert resources.num_cpus == 6
        assert not resources.local
    assert ray.is_initialized()


def test_the_bench_measures_each_part_and_says_which_binds(shards):
    result = bench_shards(shards, crop_size=32, batch_size=24, num_threads=2, seconds=0.3)
    assert set(result.decode_paths) == {"full"}  # glyphs are PNG
    assert result.num_bad == 0
    assert min(result.read_images_per_s, result.decode_images_per_s, result.stream_images_per_s) > 0
    assert 0 < result.first_batch_s < 60
    slower = result.read_images_per_s < 2 * result.decode_images_per_s
    assert result.bound_by == ("reading" if slower else "decoding")
