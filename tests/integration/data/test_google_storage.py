"""Shard sets, files and claims on Google Cloud Storage: pyarrow's client against an emulator, also one that fails."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
import torch
from faulty_s3 import Faults
from gs_server import without_credentials

from bit_ray import claim, store
from bit_ray.claim import claimed
from bit_ray.data.images.views import TrainView
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.shards.read import read_rows
from bit_ray.data.shards.verify import verify_shards
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.embedded.digits import DigitsSource
from bit_ray.data.sources.files import open_files
from bit_ray.data.stream.batches import StreamSpec, batches
from bit_ray.data.stream.settings import CacheConfig, Shuffle
from bit_ray.errors import ConfigError, DataError, StoreError

pytestmark = pytest.mark.cluster
SMALL = {"name": "digits", "row_group_size": 16, "shard_examples": 256}


def test_a_set_in_a_bucket_is_the_same_as_on_disk(gs, tmp_path):
    uri = gs.uri("sets/digits")
    write_shards("digits:test", uri, **SMALL)
    write_shards("digits:test", tmp_path / "set", **SMALL)
    remote, local = read_manifest(uri), read_manifest(tmp_path / "set")
    assert remote.digest == local.digest
    assert read_rows(uri, remote, 1, [3, 0]).equals(read_rows(str(tmp_path / "set"), local, 1, [3, 0]))
    assert verify_shards(uri).ok
    names = ["manifest.json", *(shard.path for shard in remote.shards)]
    assert store.list_files(uri) == names
    assert gs.keys() == [f"sets/digits/{name}" for name in names]  # no lock, no half of a shard, no empty folder
    assert gs.read(f"sets/digits/{names[1]}") == (tmp_path / "set" / names[1]).read_bytes()


def test_an_interrupted_set_is_finished_by_the_same_call(gs):
    def interrupt(done, total):
        if done > 300:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards("digits:test", gs.uri("set"), progress=interrupt, **SMALL)
    with pytest.raises(DataError, match="an incomplete shard set; run the same"):
        read_manifest(gs.uri("set"))
    assert write_shards("digits:test", gs.uri("set"), **SMALL).num_resumed == 1
    assert verify_shards(gs.uri("set")).ok


def test_a_store_that_fails_while_a_set_is_written_leaves_a_whole_set(gs, faulty_gs):
    faulty_gs.fail(Faults(slow_down=0.1, internal_error=0.1, at_most=6))
    write_shards("digits:test", gs.uri("set"), **SMALL)
    counts = faulty_gs.counts
    assert counts["slow_down"] + counts["internal_error"] > 0, counts
    faulty_gs.fail(Faults())
    assert verify_shards(gs.uri("set")).ok


def test_missing_empty_and_truncated_shards_are_named(gs):
    uri = gs.uri("set")
    write_shards("digits:test", uri, **SMALL)
    paths = [store.join(uri, shard.path) for shard in read_manifest(uri).shards]
    store.delete_files([paths[0]])
    store.write_bytes(paths[1], b"")
    store.write_bytes(paths[2], store.read_bytes(paths[2])[:-50])
    assert verify_shards(uri).counts == {"missing": 1, "size": 2, "parquet": 2}


def test_a_folder_in_a_bucket_is_a_source(gs, tmp_path):
    for i, example in enumerate(DigitsSource("test").part(range(12))):
        store.write_bytes(gs.uri(f"images/{'ab'[i % 2]}/{i} %20.png"), example.image)
    assert store.list_tree(gs.uri("images"))[1] == ["a", "b"]
    assert store.list_tree(gs.uri(), recursive=False) == ([], ["images"])
    assert open_files(gs.uri("images")).class_names == ("a", "b")
    assert write_shards(gs.uri("images"), tmp_path / "set", name="x").num_examples == 12


def test_files_and_directories_go_there_and_back(gs, tmp_path):
    data = os.urandom(20 * 2**20)  # more than one part of a resumable upload
    (tmp_path / "big").write_bytes(data)
    uri = gs.uri("dir/sub dir/big%20.bin")
    store.upload_file(tmp_path / "big", uri)
    store.write_bytes(gs.uri("dir/small"), b"")
    assert gs.read("dir/sub dir/big%20.bin") == data
    assert [store.exists(gs.uri(path)) for path in ("dir/small", "dir", "di", "none")] == [True, True, False, False]
    assert store.file_sizes([uri, gs.uri("dir/small"), gs.uri("none")]) == [len(data), 0, None]
    store.download_directory(gs.uri("dir"), tmp_path / "copy")
    assert (tmp_path / "copy" / "sub dir" / "big%20.bin").read_bytes() == data
    store.write_bytes(gs.uri("dirty"), b"1")
    store.delete_directory(gs.uri("dir"))
    store.delete_directory(gs.uri("dir"))
    assert gs.keys() == ["dirty"]


BATCH, NUM_STEPS = 25, 12


def stream(shards, cache):
    return StreamSpec(
        shards=str(shards),
        manifest_digest=read_manifest(shards).digest,
        global_batch_size=BATCH,
        slots=range(BATCH),
        start_step=0,
        stop_step=NUM_STEPS,
        seed=3,
        shuffle=Shuffle(num_lanes=5, lane_window=20, full_up_to=1),
        view=TrainView(crop="inception", crop_size=32),
        cache=CacheConfig(directory=str(cache)),
    )


def test_a_store_that_fails_changes_no_batch(ray_local, gs, faulty_gs, tmp_path):
    write_shards("digits:test", tmp_path / "set", **SMALL | {"shard_examples": 64, "row_group_size": 8})
    for path in (tmp_path / "set").iterdir():
        store.upload_file(path, gs.uri(f"set/{path.name}"))
    expected = list(batches(stream(tmp_path / "set", tmp_path / "cache-1")))
    remote = stream(gs.uri("set"), tmp_path / "cache-2")
    faulty_gs.fail(
        Faults(slow_down=0.05, internal_error=0.05, reset=0.05, cut=0.05, short=0.05, stall=0.05, stall_s=1.0)
    )
    found = list(batches(remote))
    counts = faulty_gs.counts
    assert sum(counts[kind] for kind in Faults.KINDS) >= 5, counts
    assert [batch.step for batch in found] == list(range(NUM_STEPS))
    for a, b in zip(found, expected, strict=True):
        assert (a.ids, a.bad) == (b.ids, ())
        assert torch.equal(a.images, b.images)
    ids = [id for batch in found for id in batch.ids]
    assert len(set(ids)) == len(ids) == BATCH * NUM_STEPS  # the set has more: within an epoch each comes once


# A holder for as long as its input is open, on another machine as far as it knows.
HOLD = """
import sys, uuid
from bit_ray import claim
from bit_ray.errors import ConfigError
claim.BEAT_S, claim.STALE_S, claim.SETTLE_S = 0.3, 20.0, 3.0
name = uuid.uuid4().hex
claim._machine = lambda: name
print("ready", flush=True)
sys.stdin.readline()
try:
    with claim.claimed(sys.argv[1], "name: x is being run", remedy="wait for it"):
        print("held", flush=True)
        sys.stdin.readline()
except ConfigError as error:
    print(error, flush=True)
"""


def test_of_processes_that_start_at_once_one_works_and_when_it_was_killed_another_does(gs, monkeypatch):
    for name, seconds in (("BEAT_S", 0.3), ("STALE_S", 3.0), ("_POLL_S", 0.1)):
        monkeypatch.setattr(claim, name, seconds)
    uri = gs.uri("runs/x/_running.json")
    starting = [
        subprocess.Popen([sys.executable, "-c", HOLD, uri], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    try:
        assert [process.stdout.readline() for process in starting] == ["ready\n"] * 3
        for process in starting:
            process.stdin.write("\n")
            process.stdin.flush()
        answers = [process.stdout.readline() for process in starting]
        assert answers.count("held\n") == 1, answers
        winner = starting[answers.index("held\n")]
        others = [answer for answer in answers if answer != "held\n"]
        assert all(answer.startswith(f"name: x is being run by PID {winner.pid} ") for answer in others), answers
        with (
            pytest.raises(ConfigError, match=f"x is being run by PID {winner.pid} "),
            claimed(uri, "x is being run", remedy="wait"),
        ):
            raise AssertionError("held twice")
        winner.kill()
        winner.wait()
        assert gs.keys() == ["runs/x/_running.json"]
        before = time.monotonic()
        with claimed(uri, "busy", remedy="wait"):
            assert claim.STALE_S <= time.monotonic() - before < claim.STALE_S + 10
            assert json.loads(gs.read("runs/x/_running.json"))["pid"] == os.getpid()
        assert gs.keys() == []
    finally:
        for process in starting:
            process.kill()
            process.communicate()


def in_one_line(call, *args):
    with pytest.raises(DataError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_bucket_or_object_that_is_not_there_is_named(gs):
    missing = "gs://no-such-bucket-1/x"
    assert in_one_line(store.write_bytes, missing, b"1") == f"{missing}: no such bucket; create it or correct the name"
    assert in_one_line(store.read_bytes, missing) == f"{missing}: no such file, directory or bucket; check the path"
    assert "no such path; give the directory of a shard set" in in_one_line(read_manifest, gs.uri("set"))


def test_credentials_that_are_missing_or_refused_are_told_at_once(gs, faulty_gs, monkeypatch, tmp_path):
    before = time.monotonic()
    faulty_gs.fail(Faults(expired=True))
    for call in (store.read_bytes, read_manifest, store.list_files):
        assert re.search(
            r"refused by Google Cloud Storage \(PERMISSION_DENIED\); check GOOGLE_APPLICATION_CREDENTIALS",
            in_one_line(call, gs.uri("x")),
        )
    faulty_gs.fail(Faults())
    for content in ("{}", "nothing", None):
        place = tmp_path / "key.json"
        place.unlink(missing_ok=True)
        if content is not None:
            place.write_text(content)
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(place))
        monkeypatch.setenv("GOOGLE_UNUSED", str(content))  # a client is kept for each set of variables
        told = in_one_line(store.read_bytes, gs.uri("x"))
        assert re.search(
            r"no credentials for Google Cloud Storage \(.*key\.json.*\); set GOOGLE_APPLICATION_CRED", told
        )
    without_credentials(monkeypatch, tmp_path)
    monkeypatch.setenv("GCE_METADATA_ROOT", "metadata.invalid")
    told = in_one_line(store.read_bytes, gs.uri("x"))
    assert told.startswith(
        f"gs://{gs.bucket}: no credentials for Google Cloud Storage (none are given); set GOOGLE_APPL"
    )
    assert time.monotonic() - before < 20


def test_a_store_that_cannot_be_reached_is_named():
    uri = "gs://anonymous@bucket/x?endpoint_override=127.0.0.1:9&scheme=http&retry_limit_seconds=1"
    with pytest.raises(StoreError, match=r"Google Cloud Storage cannot be reached \(.*\); check the network$"):
        store.exists(uri)
