import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from faulty_s3 import Faults

from bit_ray import claim, store, store_access
from bit_ray.data.shards.inspect import contact_sheet, inspect_shards
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.shards.read import read_rows
from bit_ray.data.shards.verify import verify_shards
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.embedded.digits import DigitsSource
from bit_ray.data.sources.files import open_files
from bit_ray.data.stream.history import StreamPlan, draw_views, uses_in_step, uses_of_image
from bit_ray.errors import ConfigError, DataError, StoreError

pytestmark = pytest.mark.cluster
SMALL = {"name": "digits", "row_group_size": 16, "shard_examples": 256}


def interrupt(done, total):
    if done > 300:
        raise KeyboardInterrupt


def test_a_set_in_a_bucket_is_the_same_as_on_disk(s3, tmp_path):
    uri = f"s3://{s3.bucket}/sets/digits"
    write_shards("digits:test", uri, **SMALL)
    write_shards("digits:test", tmp_path / "set", **SMALL)
    remote, local = read_manifest(uri), read_manifest(tmp_path / "set")
    assert remote == local
    assert remote.digest == local.digest
    assert read_rows(uri, remote, 1, [3, 0]).equals(read_rows(str(tmp_path / "set"), local, 1, [3, 0]))
    assert verify_shards(uri).ok
    assert inspect_shards(uri) == inspect_shards(tmp_path / "set")
    plan = StreamPlan(seed=1, global_batch_size=32, view={"crop": "resize", "crop_size": 32})
    seen = uses_in_step(tmp_path / "set", local, plan, 3)
    assert uses_in_step(uri, remote, plan, 3) == seen
    assert uses_of_image(uri, remote, plan, seen[5].id, num_epochs=1) == [seen[5]]
    draw_views(uri, remote, plan, seen, tmp_path / "step.png")
    draw_views(tmp_path / "set", local, plan, seen, tmp_path / "step-2.png")
    assert (tmp_path / "step.png").read_bytes() == (tmp_path / "step-2.png").read_bytes()
    contact_sheet(uri, tmp_path / "a.png", n=8)
    contact_sheet(tmp_path / "set", f"s3://{s3.bucket}/b.png", n=8)
    assert store.read_bytes(f"s3://{s3.bucket}/b.png") == (tmp_path / "a.png").read_bytes()
    assert store.list_files(uri) == ["manifest.json", *(shard.path for shard in remote.shards)]


def test_an_interrupted_set_in_a_bucket_is_finished_by_the_same_call(s3):
    uri = f"s3://{s3.bucket}/set"
    with pytest.raises(KeyboardInterrupt):
        write_shards("digits:test", uri, progress=interrupt, **SMALL)
    with pytest.raises(DataError, match="an incomplete shard set; run the same"):
        read_manifest(uri)
    assert write_shards("digits:test", uri, **SMALL).num_resumed == 1
    assert verify_shards(uri).ok


def test_a_refused_set_leaves_no_object(s3):
    class Wrong(DigitsSource):
        class_names = ("0", "1", "2")

    with pytest.raises(DataError, match="label [3-9]; accepted: 0 to 2"):
        write_shards(Wrong("test"), f"s3://{s3.bucket}/set", **SMALL)
    assert store.list_files(f"s3://{s3.bucket}/set") == []


# Waits while it reads its second shard.
WAITING = """
import os, sys, time
from bit_ray import claim
from bit_ray.data.sources.embedded.digits import DigitsSource
from bit_ray.data.shards.write import write_shards
from bit_ray.cli.training import exit_status

output, gate = sys.argv[1:]
claim.BEAT_S, claim.SETTLE_S = 1.0, 0.1

class Waiting(DigitsSource):
    parts = 0
    def part(self, indices):
        self.parts += 1
        if self.parts == 2:
            open(gate + ".reached", "w").close()
            while not os.path.exists(gate): time.sleep(0.01)
        return super().part(indices)

write = lambda: write_shards(Waiting("test"), output, name="digits", row_group_size=16, shard_examples=256)
sys.exit(exit_status(write))
"""


@contextmanager
def first_writer(uri, gate):
    """A process that has written a part of a set and waits for the gate."""
    with subprocess.Popen([sys.executable, "-c", WAITING, uri, str(gate)], stderr=subprocess.PIPE, text=True) as first:
        try:
            deadline = time.monotonic() + 100
            while not Path(f"{gate}.reached").exists():
                assert first.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
            yield first
        finally:
            first.kill()


def test_a_second_start_is_told_who_writes_and_the_first_ends_its_work(s3, tmp_path):
    uri, gate = f"s3://{s3.bucket}/set", tmp_path / "gate"
    with first_writer(uri, gate) as first:
        before = store.list_files(uri)
        with pytest.raises(
            ConfigError, match=f"^output: {uri} is being written by PID {first.pid} of .*; wait until it has"
        ):
            write_shards("digits:test", uri, **SMALL)
        assert store.list_files(uri) == before
        gate.touch()
        assert first.communicate(timeout=100)[1] == ""
        assert first.returncode == 0
    manifest = read_manifest(uri)
    assert store.list_files(uri) == ["manifest.json", *(shard.path for shard in manifest.shards)]
    assert verify_shards(uri).ok


def test_what_a_killed_writer_has_finished_is_kept_and_the_next_start_goes_on_at_once(s3, tmp_path):
    uri = f"s3://{s3.bucket}/set"
    with first_writer(uri, tmp_path / "gate") as first:
        first.kill()
        first.wait()
    assert "_writing.lock" in store.list_files(uri)
    before = time.monotonic()
    assert write_shards("digits:test", uri, **SMALL).num_shards == 4
    assert time.monotonic() - before < claim.STALE_S
    assert store.list_files(uri) == ["manifest.json", *(f"shard-{i:05d}.parquet" for i in range(4))]
    assert verify_shards(uri).ok


def test_credentials_that_expire_in_the_middle_of_a_first_run_leave_what_is_finished(faulty_s3, s3):
    uri = f"s3://{s3.bucket}/set"
    faulty_s3.faults = Faults(expired=True, only="shard-00002")
    with pytest.raises(StoreError, match="refused by .*ExpiredToken.*; finished shards are kept: run the same command"):
        write_shards("digits:test", uri, **SMALL)
    assert store.list_files(uri) == ["_writing.json", "shard-00000.parquet", "shard-00001.parquet"]
    faulty_s3.faults = Faults()
    assert write_shards("digits:test", uri, **SMALL).num_resumed == 2
    assert verify_shards(uri).ok


def test_missing_empty_and_truncated_shards_in_a_bucket(s3):
    uri = f"s3://{s3.bucket}/set"
    write_shards("digits:test", uri, **SMALL)
    manifest = read_manifest(uri)
    paths = [store.join(uri, shard.path) for shard in manifest.shards]
    store.delete_files([paths[0]])
    store.write_bytes(paths[1], b"")
    store.write_bytes(paths[2], store.read_bytes(paths[2])[:-50])
    size = manifest.shards[1].num_bytes
    for index, message in (
        (0, "is in the manifest but missing; run `bit-ray shards verify"),
        (1, f"0 bytes; accepted: {size}, as in the manifest; run"),
        (2, "bytes; accepted: "),
    ):
        with pytest.raises(DataError, match=message) as caught:
            read_rows(uri, manifest, index, [0])
        assert str(caught.value).startswith(paths[index])
    assert verify_shards(uri).counts == {"missing": 1, "size": 2, "parquet": 2}


def test_a_folder_in_a_bucket_is_a_source(s3, tmp_path):
    for i, example in enumerate(DigitsSource("test").part(range(12))):
        store.write_bytes(f"s3://{s3.bucket}/images/{'ab'[i % 2]}/{i} %20.png", example.image)
    source = open_files(f"s3://{s3.bucket}/images")
    assert source.class_names == ("a", "b")
    assert write_shards(f"s3://{s3.bucket}/images", tmp_path / "set", name="x").num_examples == 12
    assert verify_shards(tmp_path / "set").ok


def test_files_and_directories_go_there_and_back(s3, tmp_path):
    data = os.urandom(40 * 2**20)  # more than one part of a multipart upload
    (tmp_path / "big").write_bytes(data)
    uri = f"s3://{s3.bucket}/dir/sub dir/big%20.bin"
    store.upload_file(tmp_path / "big", uri)
    store.write_bytes(f"s3://{s3.bucket}/dir/small", b"")
    assert store.exists(uri)
    assert store.exists(f"s3://{s3.bucket}/dir")
    assert not store.exists(f"s3://{s3.bucket}/di")
    assert store.file_sizes([uri, f"s3://{s3.bucket}/dir/small", f"s3://{s3.bucket}/none"]) == [len(data), 0, None]
    store.download_directory(f"s3://{s3.bucket}/dir", tmp_path / "copy")
    assert (tmp_path / "copy" / "sub dir" / "big%20.bin").read_bytes() == data
    assert store.list_files(tmp_path / "copy") == ["small", "sub dir/big%20.bin"]


def test_a_bucket_that_is_not_there_and_a_key_that_is_refused(s3, monkeypatch):
    with pytest.raises(DataError, match="^s3://no-such-bucket/x: no such bucket; create it or correct the name$"):
        store.write_bytes("s3://no-such-bucket/x", b"1")
    with pytest.raises(DataError, match="no such file, directory or bucket"):
        store.read_bytes("s3://no-such-bucket/x")
    with pytest.raises(DataError, match="no such path; give the directory of a shard set"):
        read_manifest("s3://no-such-bucket/set")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    for call in (lambda uri: store.read_bytes(uri), lambda uri: store.write_bytes(uri, b"1"), read_manifest):
        with pytest.raises(DataError, match=rf"refused by {s3.endpoint} \([A-Z_]+\); check AWS_ACCESS_KEY_ID"):
            call(f"s3://{s3.bucket}/x")


def test_a_store_that_cannot_be_reached_is_named(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(store_access, "_ATTEMPTS", 3)
    with pytest.raises(DataError, match="http://127.0.0.1:9 cannot be reached; check AWS_ENDPOINT_URL"):
        read_manifest(f"s3://{s3.bucket}/set")


def test_a_store_that_has_just_failed_is_asked_once_a_request_until_it_answers(s3, faulty_s3, monkeypatch):
    """Of several things that remain to be written, each would otherwise wait for all attempts."""
    monkeypatch.setattr(store_access, "_ATTEMPTS", 3)
    uri = s3.uri("x")
    store.write_bytes(uri, b"1")

    def num_asked():
        faulty_s3.forget()
        faulty_s3.faults = Faults(slow_down=1.0)
        with pytest.raises(StoreError, match="answers with errors again and again"):
            store.exists(uri)
        faulty_s3.faults = Faults()
        return faulty_s3.counts["slow_down"]

    assert [num_asked() for _ in range(3)] == [4, 1, 1]
    assert store.read_bytes(uri) == b"1"
    assert [num_asked() for _ in range(2)] == [4, 1]
