import io

import numpy as np
import pytest
from PIL import Image

from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.shards.verify import verify_shards
from bit_ray.data.shards.write import write_shards
from bit_ray.errors import DataError

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_local")]
SMALL = {"name": "test", "row_group_size": 8, "shard_examples": 16}


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(100):
        path = tmp_path / "images" / "abc"[i % 3] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(path)
    return tmp_path / "images"


def gray():
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "JPEG")
    return buffer.getvalue()


def test_ray_writes_the_same_bytes_as_one_process(folder, tmp_path):
    for source in (folder, "digits:test"):
        name = str(source).rpartition("/")[2]
        write_shards(source, tmp_path / f"{name}-here", **SMALL)
        calls = []
        report = write_shards(
            source,
            tmp_path / f"{name}-ray",
            num_workers=3,
            progress=lambda done, total, calls=calls: calls.append((done, total)),
            **SMALL,
        )
        here, there = (read_manifest(tmp_path / f"{name}-{where}") for where in ("here", "ray"))
        assert there == here
        assert there.digest == here.digest
        assert report.num_examples == here.num_examples
        assert calls == sorted(calls)
        assert calls[-1] == (here.num_examples, here.num_examples)


def test_relative_paths_mean_the_same_in_a_worker(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the workers were started elsewhere
    write_shards("images", "set", num_workers=2, **SMALL)
    assert verify_shards("set", num_workers=2).ok
    assert read_manifest(tmp_path / "set").num_examples == 100


def test_a_bad_image_met_in_a_ray_task_is_one_line_and_leaves_nothing(folder, tmp_path):
    (folder / "a" / "bad.jpg").write_bytes(gray())
    with pytest.raises(DataError) as caught:
        write_shards(folder, tmp_path / "set", num_workers=3, **SMALL)
    assert str(caught.value).startswith("a/bad.jpg: grayscale; 0 more bad images in the same shard")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "set").exists()
    report = write_shards(folder, tmp_path / "set", num_workers=3, on_bad="skip", **SMALL)
    assert report.skipped == (("a/bad.jpg", "grayscale"),)


def test_a_refusal_inside_a_ray_task_keeps_its_type(folder, tmp_path):
    class Doubled:
        class_names = ("a",)
        multi_label = False
        identity = {"kind": "doubled"}  # noqa: RUF012

        def __len__(self):
            return 20

        def part(self, indices):
            from bit_ray.data.sources.base import Example

            return [Example("same", gray(), (0,)) for _ in indices]

    with pytest.raises(DataError, match="^same: duplicate id"):
        write_shards(Doubled(), tmp_path / "set", num_workers=2, convert_images=True, **SMALL)
    assert not (tmp_path / "set").exists()


def test_a_run_begun_here_is_finished_by_ray(folder, tmp_path):
    write_shards(folder, tmp_path / "whole", **SMALL)

    def interrupt(done, total):
        if done > 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(folder, tmp_path / "set", progress=interrupt, **SMALL)
    assert write_shards(folder, tmp_path / "set", num_workers=2, **SMALL).num_resumed == 2
    assert read_manifest(tmp_path / "set") == read_manifest(tmp_path / "whole")


def test_ray_verifies_as_one_process_does(folder, tmp_path):
    write_shards(folder, tmp_path / "set", **SMALL)
    assert verify_shards(tmp_path / "set", num_workers=3).ok
    shard = tmp_path / "set" / "shard-00002.parquet"
    shard.write_bytes(shard.read_bytes()[:-9])
    (tmp_path / "set" / "shard-00004.parquet").unlink()
    report = verify_shards(tmp_path / "set", num_workers=3)
    assert report == verify_shards(tmp_path / "set")
    assert report.counts == {"size": 1, "parquet": 1, "missing": 1}
