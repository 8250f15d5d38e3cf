import dataclasses
import json

import pytest

from bit_ray.config import digest
from bit_ray.data.shards.manifest import Manifest, Shard, read_manifest, to_json, write_manifest
from bit_ray.errors import DataError

SHARDS = tuple(
    Shard(
        path=f"shard-{i:05d}.parquet", num_examples=n, num_bytes=100 * n, sha256=f"{i:064x}", checksums=g * "0123abcd"
    )
    for i, (n, g) in enumerate(((10, 3), (10, 3), (3, 1)))
)
MANIFEST = Manifest(
    name="test",
    class_names=("ant", "bee"),
    multi_label=False,
    row_group_size=4,
    median_image_size=(375, 500),
    num_examples=23,
    shards=SHARDS,
)


def test_a_manifest_comes_back(tmp_path):
    write_manifest(tmp_path / "set", MANIFEST)
    read = read_manifest(tmp_path / "set")
    assert read == MANIFEST
    assert read.digest == MANIFEST.digest
    assert read.num_bytes == 2300
    assert [read.row_groups(i) for i in range(3)] == [3, 3, 1]


def test_a_manifest_of_format_1_comes_back_as_it_was(tmp_path):
    shards = tuple(dataclasses.replace(shard, checksums="") for shard in SHARDS)
    old = dataclasses.replace(MANIFEST, format=1, shards=shards)
    write_manifest(tmp_path, old)
    record = json.loads((tmp_path / "manifest.json").read_text())
    assert set(record["shards"][0]) == {"path", "num_examples", "num_bytes", "sha256"}
    assert "optional_columns" not in record
    assert read_manifest(tmp_path) == old
    assert read_manifest(tmp_path).digest == MANIFEST.digest
    assert [SHARDS[0].checksum(2), old.shards[0].checksum(2)] == ["0123abcd", ""]


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"name": "other"}, True),
        ({"median_image_size": (1, 1)}, True),
        ({"plan_digest": "x"}, True),
        ({"shards": tuple(dataclasses.replace(s, path="x" + s.path) for s in SHARDS)}, True),
        ({"class_names": ("bee", "ant")}, False),
        ({"multi_label": True}, False),
        (
            {"format": 1, "row_group_size": 5, "shards": tuple(dataclasses.replace(s, checksums="") for s in SHARDS)},
            False,
        ),
        ({"format": 1, "shards": tuple(dataclasses.replace(s, checksums="") for s in SHARDS)}, True),
        ({"optional_columns": ("annotation",)}, False),
        ({"convert_images": True}, False),
        ({"shards": SHARDS[::-1]}, False),
        ({"shards": (dataclasses.replace(SHARDS[0], sha256="f" * 64), *SHARDS[1:])}, False),
    ],
)
def test_the_digest_is_of_the_content_not_of_the_name(change, same):
    assert (dataclasses.replace(MANIFEST, **change).digest == MANIFEST.digest) is same


def test_the_digest_is_that_of_the_codec():
    content = {"class_names": ["ant", "bee"], "multi_label": False, "row_group_size": 4, "convert_images": False}
    assert MANIFEST.digest == digest({**content, "shards": [[s.sha256, s.num_examples] for s in SHARDS]})


def changed(**changes):
    return json.dumps({**to_json(MANIFEST), **changes})


def with_shard(**changes):
    """The manifest with another second shard; a field set to None is left out."""
    record = {**dataclasses.asdict(SHARDS[1]), **changes}
    record = {name: value for name, value in record.items() if value is not None}
    return changed(shards=[dataclasses.asdict(SHARDS[0]), record, dataclasses.asdict(SHARDS[2])])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "no such path; give the directory of a shard set"),
        ({"x.txt": ""}, "not a shard set (no manifest.json in it)"),
        ({"_writing.json": "{}"}, "an incomplete shard set; run the same `bit-ray shards write` command again"),
        ({"manifest.json": changed()[:200]}, "manifest.json: not valid JSON"),
        ({"manifest.json": ""}, "manifest.json: not valid JSON"),
        ({"manifest.json": "[]"}, "manifest.json: not a manifest"),
        (
            {"manifest.json": changed(format=3)},
            "manifest.json: format: 3; accepted: 1, 2; use the version that wrote it",
        ),
        ({"manifest.json": changed(format="2" * 9999)}, "manifest.json: format: '222"),
        ({"manifest.json": changed(format=1)}, "format: 1; accepted: 2 for a set with checksums or optional columns"),
        ({"manifest.json": changed(class_names=[])}, "manifest.json: class_names: empty; accepted: at least one"),
        ({"manifest.json": changed(row_group_size=0)}, "row_group_size: 0; accepted: 1 to"),
        ({"manifest.json": changed(row_group_size=2**40)}, "row_group_size: 1099511627776; accepted: 1 to"),
        (
            {"manifest.json": changed(row_group_size=5)},
            "shards[0].checksums: incomplete; accepted: one for each of its 2 row groups",
        ),
        ({"manifest.json": changed(median_image_size=[0, 5])}, "median_image_size: (0, 5); accepted: 1 to"),
        (
            {"manifest.json": changed(optional_columns=["boxes"])},
            "optional_columns: ('boxes',); accepted: any of annot",
        ),
        ({"manifest.json": changed(optional_columns=["fingerprint", "annotation"])}, "in order"),
        (
            {"manifest.json": changed(shards=[dataclasses.asdict(SHARDS[0])] * 2)},
            "shards: a duplicate shard; accepted: each once",
        ),
        ({"manifest.json": with_shard(path="../shard-00001.parquet")}, "shards[1].path: '../shard-00001.parquet'; acc"),
        ({"manifest.json": with_shard(path="/etc/passwd")}, "shards[1].path: '/etc/passwd'; accepted: the name of a"),
        ({"manifest.json": with_shard(path="a?endpoint_override=h")}, "shards[1].path: 'a?endpoint_override=h'"),
        ({"manifest.json": with_shard(path="")}, "shards[1].path: ''"),
        (
            {"manifest.json": with_shard(sha256="/home/me/notes")},
            "shards[1].sha256: given '/home/me/notes'; accepted: a SHA",
        ),
        ({"manifest.json": with_shard(sha256="../" * 30)}, "shards[1].sha256: given '../"),
        ({"manifest.json": with_shard(checksums="0123ABCD" * 3)}, "shards[1].checksums: '0123ABCD"),
        ({"manifest.json": with_shard(num_examples=-10)}, "shards[1].num_examples: -10; accepted: 1 or more"),
        ({"manifest.json": with_shard(num_examples=10**18)}, "shards[1].num_examples: 1000000000000000000; accepted"),
        (
            {"manifest.json": with_shard(num_examples=10**18, num_bytes=2**62)},
            "shards[1].num_bytes: 4611686018427387904",
        ),
        ({"manifest.json": "[" * 100_000}, "manifest.json: not valid JSON"),
        ({"manifest.json": changed(name="\ud800")}, "manifest.json: name: given '\\ud800'"),
        ({"manifest.json": changed(num_examples=24)}, "num_examples: 24; accepted: 23, as in its 3 shards"),
        ({"manifest.json": changed(shards=[], num_examples=0)}, "the manifest is damaged"),
        ({"manifest.json": changed(extra=1)}, "manifest.json: extra"),
        ({"manifest.json": changed(class_names=3)}, "manifest.json: class_names"),
        ({"manifest.json": with_shard(num_examples="10")}, "shards[1].num_examples: given '10' (str); accepted: a who"),
        ({"manifest.json": with_shard(num_examples=True)}, "shards[1].num_examples: given True (bool)"),
        ({"manifest.json": with_shard(num_bytes=1.5)}, "shards[1].num_bytes: given 1.5 (float)"),
        ({"manifest.json": with_shard(sha256=None)}, "shards[1].sha256: missing"),
        ({"manifest.json": with_shard(size=3)}, "shards[1].size: unknown"),
        ({"manifest.json": changed(shards=[dataclasses.asdict(SHARDS[0]), 3])}, "shards[1]: given 3 (int)"),
        ({"manifest.json": changed(shards={"a": 1})}, "manifest.json: shards: given {'a': 1} (dict)"),
        ({"manifest.json": json.dumps({"format": 1, "shards": []})}, "manifest.json: name: missing"),
        ({"manifest.json": json.dumps({"format": 2, "shards": []})}, "manifest.json: name: missing"),
        ({"manifest.json": json.dumps(dataclasses.asdict(SHARDS[0]))}, "manifest.json: not a manifest"),
    ],
)
def test_what_is_not_a_whole_set_is_said_in_one_line(tmp_path, files, message):
    directory = tmp_path / "set"
    for name, text in (files or {}).items():
        directory.mkdir(exist_ok=True)
        (directory / name).write_text(text)
    with pytest.raises(DataError) as caught:
        read_manifest(directory)
    assert str(caught.value).startswith(str(directory))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_manifest_itself_is_no_set(tmp_path):
    write_manifest(tmp_path, MANIFEST)
    with pytest.raises(DataError, match="the path of a manifest; give the directory that it is in"):
        read_manifest(tmp_path / "manifest.json")
