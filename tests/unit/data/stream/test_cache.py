import dataclasses
import fcntl
import os
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs as pafs

from bit_ray import store
from bit_ray.data.shards import fetch
from bit_ray.data.shards.footer import SCHEMA
from bit_ray.data.shards.manifest import Manifest, Shard
from bit_ray.data.shards.read import index_rows, read_rows, row_group_checksums
from bit_ray.data.stream import cache
from bit_ray.data.stream.cache import NodeCache
from bit_ray.data.stream.requests import ReadRequest, read
from bit_ray.data.stream.settings import CacheConfig
from bit_ray.errors import ConfigError, DamagedShardError, DataError
from bit_ray.store import file_sha256

ROWS = 8


def make_table(num_rows, sizes, seed=0):
    rng = np.random.default_rng(seed)
    columns = {
        "id": [f"n{seed}/é{i}.jpg" for i in range(num_rows)],
        "image": [rng.bytes(sizes[i % len(sizes)]) for i in range(num_rows)],
        "labels": [list(range(i % 3)) for i in range(num_rows)],
    }
    return pa.table([pa.array(columns[field.name], field.type) for field in SCHEMA], schema=SCHEMA)


def write(path, table, row_group_size=ROWS, **options):
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pq.write_table(table, path, row_group_size=row_group_size, **{**plain, **options})


def images_at(path, index):
    data = path.read_bytes()
    return [data[o : o + n] for o, n in zip(index["offset"].to_pylist(), index["length"].to_pylist(), strict=True)]


@pytest.mark.parametrize(
    ("sizes", "page_size"),
    [
        ([1, 0, 7, 3], 2**20),
        ([100_000], 2**20),
        ([3_000_000, 1, 1_500_000, 40], 2**20),
        ([300, 20, 4_091, 4_096, 1], 64),  # a page for every few values, lengths across every window
    ],
)
def test_the_index_of_a_row_group_is_what_pyarrow_reads(tmp_path, sizes, page_size):
    path = tmp_path / "shard"
    write(path, make_table(29, sizes), row_group_size=12, data_page_size=page_size, write_batch_size=2)
    parquet = pq.ParquetFile(path)
    for group in range(3):
        expected = parquet.read_row_group(group)
        index = index_rows(path, group)
        assert images_at(path, index) == expected["image"].to_pylist()
        assert index.select(["id", "labels"]).equals(expected.select(["id", "labels"]))
        assert index.schema.names == ["id", "labels", "offset", "length"]


def flip_page_header(data):
    at = data.index(b"PAR1") + 4
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def flip_image_length(data):
    first = make_table(ROWS, [5000])["image"][0].as_py()
    at = data.index(first) - 3
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda data: data[:-20], "magic"),
        (lambda data: b"", "magic"),
        (lambda data: bytes(len(data)), "magic"),
        (flip_page_header, "thrift"),
        (flip_image_length, "a page has fewer values than its header says|do not fill it"),
        (lambda data: data[:2000] + data[9000:], "its footer is damaged"),
    ],
)
def test_a_damaged_shard_is_named_in_one_line(tmp_path, harm, message):
    path = tmp_path / "shard"
    write(path, make_table(ROWS, [5000]))
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(DamagedShardError, match=f"(?i){message}") as caught:
        index_rows(path, 0)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_shard_of_another_layout_is_refused(tmp_path):
    path, table = tmp_path / "shard", make_table(ROWS, [50])
    for options, message in (
        ({"compression": "snappy"}, "is compressed"),
        ({"use_dictionary": True}, "has a dictionary"),
        ({"data_page_version": "2.0"}, "of another kind"),
    ):
        write(path, table, **options)
        with pytest.raises(DamagedShardError, match=message):
            index_rows(path, 0)
    write(path, table.select(["id", "image"]))
    with pytest.raises(DamagedShardError, match="columns id, image, not those of a shard"):
        index_rows(path, 0)
    write(path, table)
    with pytest.raises(DamagedShardError, match="has 1 row groups, no number 1"):
        index_rows(path, 1)
    with pytest.raises(DamagedShardError, match="no such file"):
        index_rows(tmp_path / "none", 0)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A directory that the code under test takes for an object store."""

    def filesystem(uri):
        return files, str(uri).replace("s3:/", str(tmp_path))

    files = pafs.LocalFileSystem()
    monkeypatch.setattr(store, "filesystem", filesystem)
    return tmp_path


def make_set(directory, num_shards=2, num_rows=20, size=10_000, format=1):
    """A shard set without a manifest file; its digest stands for its name."""
    directory.mkdir()
    shards = []
    for i in range(num_shards):
        path = directory / f"shard-{i}.parquet"
        write(path, make_table(num_rows, [size], seed=sum(directory.name.encode()) * 100 + i))
        shards.append(
            Shard(
                path=path.name,
                num_examples=num_rows,
                num_bytes=path.stat().st_size,
                sha256=file_sha256(path),
                checksums=row_group_checksums(path) if format == 2 else "",
            )
        )
    return Manifest(
        name=directory.name,
        class_names=("a", "b", "c"),
        multi_label=True,
        row_group_size=ROWS,
        median_image_size=(1, 1),
        num_examples=num_shards * num_rows,
        shards=tuple(shards),
        format=format,
    )


def groups_of(manifest):
    return [(s, g) for s in range(len(manifest.shards)) for g in range(manifest.row_groups(s))]


def locate(node, manifest, shard, group):
    uri = f"s3://{manifest.name}"
    return node.locate(uri, manifest.digest, manifest.shards[shard], group, manifest.row_group_size)


def request_for(manifest, config, shard, group):
    rows = min(ROWS, manifest.shards[shard].num_examples - group * ROWS)
    return ReadRequest(
        shards=f"s3://{manifest.name}",
        manifest_digest=manifest.digest,
        num_classes=manifest.num_classes,
        multi_label=manifest.multi_label,
        row_group_size=ROWS,
        groups=((manifest.shards[shard], group),),
        group=np.zeros(rows, np.int64),
        row=np.arange(rows),
        cache=config,
    )


def bytes_under(directory):
    return sum(path.stat().st_size for path in directory.rglob("*.parquet"))


def test_a_row_group_is_fetched_once_and_is_the_same_on_disk(bucket, tmp_path):
    manifest = make_set(bucket / "set")
    node = NodeCache(CacheConfig(directory=str(tmp_path / "cache")))
    for shard, group in groups_of(manifest):
        first = locate(node, manifest, shard, group)
        again = locate(NodeCache(CacheConfig(directory=str(tmp_path / "cache"))), manifest, shard, group)
        assert (first.hit, first.transient, again.hit, again.fetched_bytes) == (False, False, True, 0)
        assert (again.path, first.group) == (first.path, 0)
        expected = pq.ParquetFile(bucket / "set" / manifest.shards[shard].path).read_row_group(group)
        assert first.fetched_bytes == os.stat(first.path).st_size
        assert expected.nbytes < first.fetched_bytes < expected.nbytes + 3000
        assert pq.read_table(first.path).equals(expected)
        index = index_rows(first.path, first.group)
        assert images_at(tmp_path / first.path, index) == expected["image"].to_pylist()
    assert os.listdir(tmp_path / "cache" / "partial") == []


def test_remote_rows_are_those_of_the_files_and_columns_that_are_not_wanted_are_not_read(bucket, monkeypatch):
    manifest = make_set(bucket / "set", size=100_000)
    read = []
    read_range = store.read_range

    def counting(file, start, num_bytes):
        read.append(num_bytes)
        return read_range(file, start, num_bytes)

    monkeypatch.setattr(store, "read_range", counting)
    expected = pq.read_table(bucket / "set" / manifest.shards[0].path)
    assert read_rows("s3://set", manifest, 0, [2, 0]).equals(pa.concat_tables([expected[16:20], expected[0:8]]))
    assert len(read) == 1 + 2  # a footer, and one request a row group
    read.clear()
    assert read_rows("s3://set", manifest, 0, [1], ["id", "labels"]).equals(expected.select(["id", "labels"])[8:16])
    assert read_rows("s3://set", manifest, 0, [1], ["labels"]).equals(expected.select(["labels"])[8:16])
    assert read_rows(str(bucket / "set"), manifest, 0, [1], ["id"]).equals(expected.select(["id"])[8:16])
    assert sum(read) < 1000


def test_a_set_larger_than_the_cache_keeps_what_fits_and_never_evicts_itself(bucket, tmp_path):
    manifest = make_set(bucket / "set", num_shards=5, num_rows=32)
    one = 82_000
    config = CacheConfig(directory=str(tmp_path / "cache"), max_gb=10 * one / 1e9)
    hits = []
    for epoch in range(3):
        order = np.random.default_rng(epoch).permutation(groups_of(manifest)).tolist()
        found = []
        for shard, group in order:
            place = locate(NodeCache(config), manifest, shard, group)
            assert len(index_rows(place.path, place.group)) == ROWS
            if place.transient:
                os.unlink(place.path)
            found.append(place.hit and not place.transient)
            assert bytes_under(tmp_path / "cache") <= config.max_gb * 1e9
        hits.append(sum(found))
    assert hits == [0, 8, 8]  # an eighth of ten is for what passes through


def test_other_sets_give_way_the_least_recently_used_first_and_none_that_is_in_use(bucket, tmp_path):
    old, older, running, new = (make_set(bucket / name, num_rows=16) for name in ("old", "older", "running", "new"))
    node = NodeCache(CacheConfig(directory=str(tmp_path / "cache"), max_gb=16 * 82_000 * 8 / 7 / 1e9))
    kept = {}
    for manifest in (old, older, running):
        for shard, group in groups_of(manifest):
            place = locate(node, manifest, shard, group)
            assert not place.transient
            kept[manifest.name] = Path(place.path).parent
    for name, age in (("old", 2000), ("older", 3000), ("running", 10)):
        os.utime(kept[name], (time.time() - age,) * 2)

    def counts():
        return [len(list(kept[name].glob("*"))) for name in ("old", "older", "running", "new")]

    for shard, group in groups_of(new):
        place = locate(node, new, shard, group)
        assert not place.transient
        kept["new"] = Path(place.path).parent
    assert counts() == [4, 4, 4, 4]
    more = make_set(bucket / "more", num_shards=6, num_rows=16)
    transient = []
    for i, (shard, group) in enumerate(groups_of(more)):
        transient.append(locate(node, more, shard, group).transient)
        if i == 1:
            assert counts()[0] == counts()[2] == counts()[3] == 4
            assert counts()[1] < 4
    assert counts() == [0, 0, 4, 4]
    assert transient == [False] * 8 + [True] * 4


def test_what_passes_through_is_each_readers_own_and_serves_neighbours(bucket, tmp_path):
    manifest = make_set(bucket / "set", num_shards=4, num_rows=24)
    node = NodeCache(CacheConfig(directory=str(tmp_path / "cache"), max_gb=0.0016))  # 200 kB pass through
    node._kept.max_bytes = 0
    first, second = locate(node, manifest, 0, 0), locate(node, manifest, 0, 0)
    assert (first.hit, second.hit, first.transient, second.transient) == (False, True, True, True)
    assert os.path.samefile(first.path, second.path)
    os.unlink(first.path)
    assert len(index_rows(second.path, 0)) == ROWS
    for shard, group in groups_of(manifest)[1:]:
        os.unlink(locate(node, manifest, shard, group).path)
    assert len(index_rows(second.path, 0)) == ROWS
    os.unlink(second.path)
    assert bytes_under(tmp_path / "cache") <= 200_000
    assert not locate(node, manifest, 0, 0).hit
    assert locate(node, manifest, 3, 2).hit


def test_links_whose_readers_never_came_are_removed(bucket, tmp_path):
    manifest = make_set(bucket / "set")
    node = NodeCache(CacheConfig(directory=str(tmp_path / "cache"), max_gb=0))
    recent = locate(node, manifest, 0, 0).path
    stale = f"{recent.partition('.parquet.')[0]}.parquet.{int(time.time()) - 4000}-abc"
    os.link(recent, stale)
    locate(node, manifest, 1, 0)
    assert os.path.exists(recent)
    assert not os.path.exists(stale)


def test_what_a_killed_process_left_is_not_taken_for_whole_and_is_removed(bucket, tmp_path, monkeypatch):
    manifest = make_set(bucket / "set")
    directory = tmp_path / "cache"
    node = NodeCache(CacheConfig(directory=str(directory)))
    whole = locate(node, manifest, 0, 0).path
    lost = locate(node, manifest, 0, 1).path
    name = os.path.basename(lost)
    os.unlink(lost)
    (directory / "partial" / name).write_bytes(b"PAR1 half")
    (directory / "partial" / "dead").write_bytes(b"PAR1 half")
    held = open(directory / "partial" / "alive", "wb")  # noqa: SIM115
    fcntl.flock(held, fcntl.LOCK_EX)
    place = locate(node, manifest, 0, 1)
    assert not place.hit
    assert len(index_rows(place.path, 0)) == ROWS
    monkeypatch.setattr(cache, "_prepared", set())  # as in a new process
    assert locate(NodeCache(CacheConfig(directory=str(directory))), manifest, 0, 1).hit
    assert os.listdir(directory / "partial") == ["alive"]
    held.close()
    # A power failure may take the end of a file that had its final name.
    os.truncate(whole, 5000)
    assert not locate(node, manifest, 0, 0).hit
    assert len(index_rows(whole, 0)) == ROWS


def test_a_lost_or_wrong_count_is_made_again(bucket, tmp_path):
    manifest = make_set(bucket / "set", num_shards=4, num_rows=16)
    directory = tmp_path / "cache"
    node = NodeCache(CacheConfig(directory=str(directory), max_gb=4 * 82_000 * 8 / 7 / 1e9))
    places = [locate(node, manifest, shard, group) for shard, group in groups_of(manifest)]
    assert [place.transient for place in places] == [False] * 4 + [True] * 4
    (directory / "usage").unlink()
    assert locate(node, manifest, 3, 1).transient
    # Too high, as a killed process leaves it: believed for ten minutes.
    for path in (directory / "sets").rglob("*.parquet"):
        path.unlink()
    os.unlink(locate(node, manifest, 2, 0).path)
    num_bytes = int((directory / "usage").read_text().split()[0])
    (directory / "usage").write_text(f"{num_bytes:020d} {time.time() - 700:020.3f}\n")
    assert not locate(node, manifest, 0, 0).transient
    assert int((directory / "usage").read_text().split()[0]) == bytes_under(directory / "sets")


def test_the_disk_is_never_filled(bucket, tmp_path, monkeypatch):
    manifest = make_set(bucket / "set")
    node = NodeCache(CacheConfig(directory=str(tmp_path / "cache")))
    assert not locate(node, manifest, 0, 0).transient
    disk = SimpleNamespace(f_bavail=100, f_blocks=2000, f_frsize=2**20)  # 5 % are left free
    monkeypatch.setattr(os, "statvfs", lambda path: disk)
    assert locate(node, manifest, 0, 1).transient
    assert bytes_under(tmp_path / "cache" / "passing") == 0
    disk.f_bavail = 101
    assert not locate(node, manifest, 0, 2).transient


def test_threads_that_ask_for_the_same_fetch_it_once(bucket, tmp_path):
    manifest = make_set(bucket / "set", num_shards=4, num_rows=32)
    asked = groups_of(manifest) * 8
    node = NodeCache(CacheConfig(directory=str(tmp_path / "cache")))
    with ThreadPoolExecutor(16) as pool:
        places = list(pool.map(lambda pair: locate(node, manifest, *pair), asked))
    assert sum(not place.hit for place in places) == len(groups_of(manifest))
    assert sum(place.fetched_bytes for place in places) == bytes_under(tmp_path / "cache")
    for (shard, group), place in zip(asked, places, strict=True):
        expected = pq.ParquetFile(bucket / "set" / manifest.shards[shard].path).read_row_group(group)
        assert pq.read_table(place.path)["id"].equals(expected["id"])


def test_a_damaged_row_group_is_not_kept_and_is_right_once_the_shard_is_mended(bucket, tmp_path):
    manifest = make_set(bucket / "set")
    path = bucket / "set" / manifest.shards[0].path
    sound = path.read_bytes()
    node = NodeCache(CacheConfig(directory=str(tmp_path / "cache")))
    for harm, message in (
        (sound[:4] + bytes(40_000) + sound[40_004:], "damaged"),
        (sound[:-1000] + bytes(1000), "magic"),
        (sound[:-1], ".* bytes; accepted: "),
    ):
        path.write_bytes(harm)
        with pytest.raises(DamagedShardError, match=message) as caught:
            locate(node, manifest, 0, 0)
        assert "run `bit-ray shards verify s3://set`" in str(caught.value)
    path.unlink()
    with pytest.raises(DamagedShardError, match="is in the manifest but missing"):
        locate(node, manifest, 0, 0)
    assert bytes_under(tmp_path / "cache") == 0
    path.write_bytes(sound)
    assert locate(node, manifest, 0, 0).fetched_bytes > 80_000
    short = dataclasses.replace(manifest.shards[1], num_examples=19)
    with pytest.raises(DamagedShardError, match="not the rows of the manifest"):
        node.locate("s3://set", manifest.digest, short, 2, ROWS)


def test_a_local_shard_is_read_where_it_is(tmp_path):
    manifest = make_set(tmp_path / "set")
    node = NodeCache(CacheConfig(directory=str(tmp_path / "cache")))
    for uri in (str(tmp_path / "set"), f"file://{tmp_path}/set"):
        place = node.locate(uri, manifest.digest, manifest.shards[1], 2, ROWS)
        assert place == (f"{tmp_path}/set/shard-1.parquet", 2, 0, True, False)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(DamagedShardError, match="not the rows of the manifest"):
        node.locate(uri, manifest.digest, manifest.shards[1], 2, 9)
    os.truncate(tmp_path / "set" / "shard-0.parquet", 1000)
    (tmp_path / "set" / "shard-1.parquet").unlink()
    for shard, message in zip(manifest.shards, ("1000 bytes; accepted: ", "is in the manifest but missing")):  # noqa: B905
        with pytest.raises(DamagedShardError, match=message):
            node.locate(uri, manifest.digest, shard, 0, ROWS)


@pytest.mark.parametrize("part", ["id", "image", "labels"])
def test_a_copy_that_rots_on_the_nodes_disk_is_fetched_again(bucket, tmp_path, part):
    manifest = make_set(bucket / "set", format=2)
    config = CacheConfig(directory=str(tmp_path / "cache"))
    place = locate(NodeCache(config), manifest, 1, 2)
    expected = index_rows(place.path, place.group, manifest.shards[1].checksum(2))
    data = bytearray(Path(place.path).read_bytes())
    with fetch.local_shard(place.path) as (_, file):
        chunk = file.footer.groups[0].chunks[file.footer.columns.index(part)]
    data[chunk.offset + chunk.length - 1] ^= 4
    Path(place.path).write_bytes(data)
    with pytest.raises(DamagedShardError, match="does not have the manifest's checksum"):
        index_rows(place.path, place.group, manifest.shards[1].checksum(2))
    table = read(request_for(manifest, config, 1, 2))
    assert table["problem"].null_count == len(table) == 4
    for name in ("id", "labels", "offset", "length"):
        assert table[name].to_pylist() == expected[name].to_pylist()
    assert table["fetched_bytes"][0].as_py() == len(data)


def test_a_row_group_with_other_bytes_than_its_checksum_is_not_kept(bucket, tmp_path):
    manifest = make_set(bucket / "set", format=2)
    path = bucket / "set" / manifest.shards[0].path
    data = bytearray(path.read_bytes())
    data[50_000] ^= 1  # in an image: the pages can still be walked
    path.write_bytes(data)
    with pytest.raises(DamagedShardError, match="row group 0 does not have the manifest's checksum"):
        locate(NodeCache(CacheConfig(directory=str(tmp_path / "cache"))), manifest, 0, 0)
    assert bytes_under(tmp_path / "cache") == 0
    with pytest.raises(DamagedShardError, match="row group 0 does not have the manifest's checksum"):
        read_rows("s3://set", manifest, 0, [0])
    with pytest.raises(DamagedShardError, match="row group 0 does not have the manifest's checksum"):
        read_rows("s3://set", manifest, 0, [0], ["id", "image"])


def test_no_set_is_given_what_another_set_claims_to_hold(bucket, tmp_path):
    good = make_set(bucket / "good", num_shards=1)
    hostile = make_set(bucket / "hostile", num_shards=1)
    # The hostile set's manifest says that its shard is the good set's.
    size = hostile.shards[0].num_bytes
    assert size == good.shards[0].num_bytes
    claims = dataclasses.replace(good, name="hostile")
    assert claims.digest == good.digest
    for max_gb in (1.0, 0.0):  # kept, and passing through
        node = NodeCache(CacheConfig(directory=str(tmp_path / f"cache-{max_gb}"), max_gb=max_gb))
        assert not locate(node, claims, 0, 0).hit
        place = locate(node, good, 0, 0)
        assert not place.hit
        assert (
            index_rows(place.path, 0)["id"][0].as_py()
            == pq.read_table(bucket / "good/shard-0.parquet")["id"][0].as_py()
        )


def test_the_default_directory_is_one_that_nobody_else_can_write(bucket, tmp_path, monkeypatch):
    manifest = make_set(bucket / "set")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    default = tmp_path / f"bit_ray_cache-{os.getuid()}"
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "partial").mkdir(parents=True)
    (elsewhere / "partial" / "notes").write_text("mine")
    default.symlink_to(elsewhere)
    with pytest.raises(DataError, match="runtime.cache.directory: .*: cannot be written .is a symbolic link"):
        locate(NodeCache(CacheConfig()), manifest, 0, 0)
    assert (elsewhere / "partial" / "notes").read_text() == "mine"
    assert [entry.name for entry in elsewhere.iterdir()] == ["partial"]
    default.unlink()
    default.mkdir()
    default.chmod(0o777)
    with pytest.raises(DataError, match="can be written by other users"):
        locate(NodeCache(CacheConfig()), manifest, 0, 0)
    default.chmod(0o700)
    assert locate(NodeCache(CacheConfig()), manifest, 0, 0).path.startswith(str(default))


def test_a_directory_that_cannot_be_written_and_a_bound_that_cannot_be(bucket, tmp_path):
    manifest = make_set(bucket / "set")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError) as caught:
        locate(NodeCache(CacheConfig(directory=str(tmp_path / "file" / "cache"))), manifest, 0, 0)
    assert str(caught.value).startswith(f"runtime.cache.directory: {tmp_path}/file/cache: cannot be written (Not a dir")
    assert "\n" not in str(caught.value)
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="max_gb: .*; accepted: 0 or more"):
            CacheConfig(max_gb=value)


def test_a_store_that_fails_for_a_while_is_waited_for_and_no_longer_than_the_patience(monkeypatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    failures = [OSError("AWS Error SLOW_DOWN"), OSError("curlCode: 56"), OSError("the answer was too short")] * 3

    def attempt():
        if failures:
            raise failures.pop()
        return "done"

    assert store.patiently("s3://b/x", attempt) == "done"
    assert len(pauses) == 9
    assert all(0.05 * 2**i <= pause <= min(10, 0.1 * 2**i) for i, pause in enumerate(pauses) if i < 7)
    assert max(pauses) <= 10
    failures = [OSError("curlCode: 7")] * 100
    with pytest.raises(DataError, match="cannot be reached"):
        store.patiently("s3://b/x", attempt, patience_s=0)
    assert len(failures) == 99
    for text in ("ACCESS_DENIED during HeadObject", "ExpiredToken", "HTTP status 400", "SIGNATURE_DOES_NOT_MATCH"):
        failures = [OSError(f"AWS Error {text}")] * 2
        with pytest.raises(DataError, match="refused by .* renew expired credentials"):
            store.patiently("s3://b/x", attempt)
        assert len(failures) == 1
    failures = [OSError("disk error")] * 2
    with pytest.raises(DataError, match="disk error"):
        store.patiently("/local/x", attempt)
    failures = [FileNotFoundError()] * 2
    with pytest.raises(FileNotFoundError):
        store.patiently("s3://b/x", attempt)
    assert len(failures) == 1


def test_an_answer_shorter_than_asked_for_is_an_error(tmp_path):
    (tmp_path / "x").write_bytes(bytes(100))
    with pafs.LocalFileSystem().open_input_file(str(tmp_path / "x")) as file:
        assert store.read_range(file, 10, 90) == bytes(90)
        assert store.read_range(file, 100, 0) == b""
        with pytest.raises(OSError, match="too short"):
            store.read_range(file, 10, 91)


def test_few_shards_stay_open(bucket, monkeypatch):
    monkeypatch.setattr(fetch, "_MOST_OPEN", 3)
    monkeypatch.setattr(fetch, "_opened", OrderedDict())
    manifest = make_set(bucket / "set", num_shards=6, num_rows=8, size=10)
    for shard in manifest.shards:
        assert len(fetch.fetch_group("s3://set", shard, 0, 8)) == 3
    assert [key[0] for key in fetch._opened] == [f"s3://set/shard-{i}.parquet" for i in (3, 4, 5)]
