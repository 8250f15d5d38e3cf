import json
import math
from pathlib import Path

import pytest

from bit_ray.tracking.spool import SEGMENT_OPERATIONS, Spool, local_path, read_segment, spool_directory


def test_operations_come_back_in_order_over_processes(tmp_path: Path):
    first = Spool(tmp_path / "q")
    for step in range(SEGMENT_OPERATIONS + 5):
        first.append({"step": step})
    second = Spool(tmp_path / "q")  # as after a restart
    second.append({"step": -1})
    assert len(second.segments()) == 3
    assert [operation["step"] for operation in second.waiting()] == [*range(SEGMENT_OPERATIONS + 5), -1]


def test_a_line_is_on_disk_when_append_returns(tmp_path: Path):
    spool = Spool(tmp_path / "q")
    spool.append({"metrics": {"loss": math.nan, "norm": -math.inf}})
    (line,) = (tmp_path / "q" / "00000001.jsonl").read_text().splitlines()
    values = json.loads(line)["metrics"]
    assert math.isnan(values["loss"])
    assert values["norm"] == -math.inf


def test_a_torn_line_loses_only_itself(tmp_path: Path):
    segment = tmp_path / "00000001.jsonl"
    segment.write_bytes(b'{"step": 1}\n{"step": 2}\n{"st')
    assert read_segment(segment) == [{"step": 1}, {"step": 2}]
    spool = Spool(tmp_path)
    spool.append({"step": 3})  # in a segment of its own, not behind the torn line
    assert [operation["step"] for operation in spool.waiting()] == [1, 2, 3]


def test_what_is_sealed_is_left_alone_by_later_operations(tmp_path: Path):
    spool = Spool(tmp_path / "q")
    spool.append({"step": 1})
    (sealed,) = spool.seal()
    spool.append({"step": 2})
    assert read_segment(sealed) == [{"step": 1}]
    sealed.unlink()
    assert spool.waiting() == [{"step": 2}]


def test_a_file_is_kept_as_it_was(tmp_path: Path):
    source = tmp_path / "plot.png"
    source.write_bytes(b"before")
    spool = Spool(tmp_path / "q")
    place = spool.add_file(source)
    source.write_bytes(b"after")
    assert (spool.directory / place).read_bytes() == b"before"
    spool.drop_file(place)
    spool.remove_if_empty()
    assert not spool.directory.exists()


def test_nothing_is_removed_while_something_waits_or_was_refused(tmp_path: Path):
    spool = Spool(tmp_path / "q")
    spool.append({"step": 1})
    spool.remove_if_empty()
    assert spool.waiting() == [{"step": 1}]
    spool.seal()[0].unlink()
    spool.refuse([{"step": 1}], "run deleted")
    spool.remove_if_empty()
    assert json.loads((tmp_path / "q" / "refused.jsonl").read_text()) == {"step": 1, "refused": "run deleted"}


def test_the_queue_of_remote_storage_lies_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BIT_RAY_CACHE", str(tmp_path / "cache"))
    assert spool_directory("s3://bucket/runs", "abc") == tmp_path / "cache" / "spool" / "abc"
    assert spool_directory(str(tmp_path), "abc") == tmp_path / "spool" / "abc"
    assert local_path("file:///a%20b/c") == Path("/a b/c")
    assert local_path("gs://bucket") is None
