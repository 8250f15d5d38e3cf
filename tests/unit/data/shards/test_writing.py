import json
from pathlib import Path

import pytest

from bit_ray.data.shards import writing as module
from bit_ray.data.shards.build import ShardResult, shard_name
from bit_ray.data.shards.manifest import Shard
from bit_ray.data.shards.writing import Writing


def result(index: int) -> ShardResult:
    shard = Shard(path=shard_name(index), num_examples=1, num_bytes=1, sha256="0" * 64, checksums="0" * 8)
    return ShardResult(index=index, shard=shard, bad=(("ä", 'a "quoted" reason'),))


class Clock:
    """Time that passes by hand, and a second with every byte that is written."""

    def __init__(self) -> None:
        self.now, self.num_saves, self.save_s = 0.0, 0, 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize(("save_s", "num_saves"), [(0.0, 50), (2.0, 3)])
def test_saving_what_is_done_takes_a_small_share_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_s: float, num_saves: int
) -> None:
    clock, write = Clock(), module.store.write_bytes
    monkeypatch.setattr(module, "time", clock)
    record = Writing(str(tmp_path), {}, on_bad="error")

    def slow(uri: str, data: bytes) -> None:
        clock.now, clock.num_saves = clock.now + save_s, clock.num_saves + 1
        write(uri, data)

    monkeypatch.setattr(module.store, "write_bytes", slow)
    for index in range(101):
        clock.now += 1.1  # a shard in a second
        record.add(result(index))
    assert clock.num_saves == num_saves  # every two seconds, or a twentieth of the time


def test_the_record_holds_every_result_in_order(tmp_path: Path) -> None:
    record = Writing(str(tmp_path), {"source": "ä"}, on_bad="skip")
    for index in (2, 0, 1):
        (tmp_path / shard_name(index)).write_bytes(b"x")
        record.add(result(index))
        record.save()
    saved = json.loads((tmp_path / "_writing.json").read_text())
    assert [done["index"] for done in saved["done"]] == [0, 1, 2]
    again = Writing(str(tmp_path), {"source": "ä"}, on_bad="skip")
    assert again.done == {index: result(index) for index in range(3)}
