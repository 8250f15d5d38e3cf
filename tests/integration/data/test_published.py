"""Published formats read from a real S3 server and in Ray tasks: the same shards as from this disk in one process."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bit_ray import store
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.shards.verify import verify_shards
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.embedded.digits import DigitsSource
from bit_ray.errors import DataError

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_local")]
SMALL = {"name": "test", "row_group_size": 8, "shard_examples": 16}


@pytest.fixture
def folder(tmp_path):
    """Sixty digits as WebDataset, as Parquet and as an ImageNet-21k of ten classes."""
    examples = list(DigitsSource("test").part(np.arange(60)))
    for t in range(3):
        with tarfile.open(tmp_path / f"train-{t}.tar", "w") as tar:
            for i, example in enumerate(examples[20 * t : 20 * t + 20]):
                for suffix, data in (("png", example.image), ("cls", b"%d" % example.labels[0])):
                    info = tarfile.TarInfo(f"{i:03d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        part = examples[20 * t : 20 * t + 20]
        label = {"names": [f"digit {i}" for i in range(10)], "_type": "ClassLabel"}
        features = {"image": {"_type": "Image"}, "label": label}
        table = pa.table(
            {
                "image": pa.array([{"bytes": e.image, "path": "x"} for e in part]),
                "label": pa.array([e.labels[0] for e in part]),
            }
        )
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        pq.write_table(table.replace_schema_metadata(metadata), tmp_path / f"train-{t}.parquet", row_group_size=7)
    (tmp_path / "imagenet21k").mkdir()
    for label in range(10):
        with tarfile.open(tmp_path / "imagenet21k" / f"n{label}.tar", "w") as tar:
            for i, example in enumerate(e for e in examples if e.labels == (label,)):
                info = tarfile.TarInfo(f"n{label}_{i}.JPEG")
                info.size = len(example.image)
                tar.addfile(info, io.BytesIO(example.image))
    return tmp_path


@pytest.mark.parametrize("pattern", ["train-{0..2}.tar", "train-*.parquet"])
def test_files_in_a_bucket_and_ray_tasks_give_the_same_shards(folder, s3, pattern, monkeypatch):
    for path in folder.glob("train-*"):
        store.upload_file(path, f"s3://{s3.bucket}/data/{path.name}")
    write_shards(str(folder / pattern), folder / "here", **SMALL)
    write_shards(f"s3://{s3.bucket}/data/{pattern}", f"s3://{s3.bucket}/set", **SMALL)
    monkeypatch.chdir(folder)  # the workers were started elsewhere
    write_shards(pattern, folder / "ray", num_workers=3, **SMALL)
    here = read_manifest(folder / "here")
    assert here.num_examples == 60
    assert here == read_manifest(folder / "ray") == read_manifest(f"s3://{s3.bucket}/set")
    assert verify_shards(folder / "here").ok
    for missing in ("train-{0..3}", "none-*"):
        with pytest.raises(DataError, match="no such file|matches no file"):
            write_shards(f"s3://{s3.bucket}/data/{missing}.tar", folder / "none", **SMALL)


def test_a_set_by_name_is_read_in_ray_tasks(folder, monkeypatch):
    write_shards("imagenet21k:train", folder / "here", data_dir=folder, **SMALL)
    monkeypatch.chdir(folder)
    write_shards("imagenet21k:train", folder / "ray", data_dir=".", num_workers=3, **SMALL)
    assert read_manifest(folder / "here") == read_manifest(folder / "ray")
    (folder / "imagenet21k" / "n3.tar").write_bytes(b"")
    with pytest.raises(DataError, match="n3.tar: damaged or incomplete tar file") as raised:
        write_shards("imagenet21k:train", folder / "none", data_dir=folder, num_workers=3, **SMALL)
    assert "\n" not in str(raised.value)
