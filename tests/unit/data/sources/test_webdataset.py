"""WebDataset tar files and Hugging Face Parquet: made as those who publish them make them."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.shards.read import read_tables, to_examples
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.base import Example, Unreadable
from bit_ray.data.sources.parquet import open_parquet
from bit_ray.data.sources.pattern import matching_files, short_names
from bit_ray.data.sources.webdataset import open_webdataset
from bit_ray.errors import ConfigError, DataError


def photo(i, kind="JPEG"):
    rng = np.random.default_rng(i)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (24, 36, 3), np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def read_all(source):
    return list(source.part(np.arange(len(source))))


def one_line(raised):
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.fixture
def tars(tmp_path):
    """Three tar files of four examples, keys starting anew in each; class i % 3."""
    for t in range(3):
        files = []
        for i in range(4):
            number = 4 * t + i
            files += [(f"{i:04d}.jpg", photo(number)), (f"{i:04d}.cls", f"{number % 3}\n".encode())]
            files += [(f"{i:04d}.json", json.dumps({"label": "abc"[number % 3], "tags": [number % 3, 3]}).encode())]
        write_tar(tmp_path / f"train-{t:03d}.tar", files)
    return tmp_path


def test_tar_files_are_read_in_order_and_keys_need_be_unique_in_each_only(tars):
    source = open_webdataset(f"{tars}/train-{{000..002}}.tar")
    expected = [Example(f"train-{n // 4:03d}/{n % 4:04d}", photo(n), (n % 3,)) for n in range(12)]
    assert read_all(source) == expected
    assert source.class_names == ("0", "1", "2")
    assert list(source.part(np.array([7, 0, 11]))) == [expected[i] for i in (7, 0, 11)]
    assert read_all(open_webdataset(f"{tars}/train-*.tar")) == expected
    assert [e.labels for e in read_all(open_webdataset(f"{tars}/train-001.tar"))] == [(n % 3,) for n in range(4, 8)]


def test_labels_of_webdataset_are_indices_names_or_several(tars):
    pattern = f"{tars}/train-*.tar"
    names = open_webdataset(pattern, label="label", class_names=["x", "c", "b", "a"])
    assert [e.labels for e in read_all(names)] == [((3, 2, 1)[n % 3],) for n in range(12)]
    assert open_webdataset(pattern, label="label").class_names == ("a", "b", "c")
    several = open_webdataset(pattern, label="tags", multi_label=True)
    assert [e.labels for e in read_all(several)] == [(n % 3, 3) for n in range(12)]
    assert several.multi_label
    for options, reason in (
        ({"label": "tags"}, r"0000.json: label \[0, 3\]; accepted: an index or a name, or lists with --multi-label"),
        ({"label": "kind"}, "0000.json: no key kind in it; accepted: one of label, tags"),
        ({"class_names": ["a", "b"]}, "train-000/0002: label '2' is outside the class list"),
        ({"label": "label", "class_names": ["a", "b"]}, "train-000/0002: label 'c' is outside the class list"),
    ):
        with pytest.raises(DataError, match=reason) as raised:
            open_webdataset(pattern, **options)
        one_line(raised)


def test_sparse_ids_are_refused_unless_they_are_the_class_list(tmp_path):
    ids = (101, 2050, 777)
    write_tar(
        tmp_path / "a.tar", [x for i, n in enumerate(ids) for x in ((f"{i}.jpg", photo(i)), (f"{i}.cls", b"%d" % n))]
    )
    with pytest.raises(DataError, match="3 different numbers up to 2,050: ids, not indices.*--class-names") as raised:
        open_webdataset(f"{tmp_path}/a.tar")
    one_line(raised)
    source = open_webdataset(f"{tmp_path}/a.tar", class_names=["101", "777", "2050"])
    assert [e.labels for e in read_all(source)] == [(0,), (2,), (1,)]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([("a.jpg", b"x"), ("a.txt", b"1")], r"a.tar: a: no label among .jpg, .txt; accepted: .cls or .json"),
        ([("a.cls", b"1")], r"a.tar: a: no image among .cls"),
        ([("a.jpg", b"x"), ("a.cls", b"\xff\xfe")], "a.cls: neither text nor JSON"),
        ([("a.jpg", b"x"), ("a.json", b"{")], "a.json: neither text nor JSON"),
        ([("a.jpg", b"x"), ("a.json", b"{}")], "a.json: no key label in it"),
        ([("a.jpg", b"x"), ("a.json", b'{"label": null}')], "a.json: label None"),
        ([("a.jpg", b"x"), ("a.cls", b"")], "a.cls: label ''"),
        (
            [("a.jpg", b"x"), ("a.cls", b"0"), ("b.cls", b"0"), ("b.jpg", b"x"), ("a.jpg", b"x"), ("a.cls", b"0")],
            "a/a is there twice",
        ),
        ([("README", b"x"), (".hidden.jpg", b"x"), ("x/._a.jpg", b"x")], "no example"),
        ([], "no example"),
    ],
)
def test_tar_files_that_are_no_webdataset_are_one_line(tmp_path, files, reason):
    write_tar(tmp_path / "a.tar", files)
    with pytest.raises(DataError, match=reason) as raised:
        open_webdataset(f"{tmp_path}/a.tar")
    one_line(raised)


def test_patterns(tmp_path):
    for name in ("a-1.tar", "a-2.tar", "a-10.tar", "b/c-1.tar", "b/d/c-1.tar", "we{i}rd.tar"):
        write_tar(tmp_path / name, [])
    found = {
        "a-{1..2}.tar": ["a-1.tar", "a-2.tar"],
        "a-{10,1}.tar": ["a-10.tar", "a-1.tar"],
        "a-*.tar": ["a-1.tar", "a-10.tar", "a-2.tar"],
        "a-?.tar": ["a-1.tar", "a-2.tar"],
        "*/c-*.tar": ["b/c-1.tar"],
        "b/{d/,}c-1.tar": ["b/d/c-1.tar", "b/c-1.tar"],
        "we{i}rd.tar": ["we{i}rd.tar"],
    }
    for pattern, names in found.items():
        assert matching_files(f"{tmp_path}/{pattern}") == [f"{tmp_path}/{name}" for name in names]
    for pattern, reason in (
        ("a-{1..3}.tar", "a-3.tar: no such file"),
        ("z*.tar", "matches no file"),
        ("a-{1..2.tar", "unbalanced braces"),
        ("a-{2..1}.tar", "accepted: 1 to"),
        ("a-{0..99999999}.tar", "accepted: 1 to"),
    ):
        with pytest.raises(DataError, match=reason) as raised:
            matching_files(f"{tmp_path}/{pattern}")
        one_line(raised)
    assert short_names(["/x/y/a/1.tar", "/x/y/b/1.tar"]) == ["a/1", "b/1"]
    assert short_names(["1.tar"]) == ["1"]


NAMES = ["ant", "bee", "cat"]


def write_parquet(path, numbers, labels, feature=None, row_group_size=5, column="label", kind=None):
    """Write a file as `datasets` does: struct of bytes and path, features in the schema's metadata, compressed."""
    images = [{"bytes": photo(n, "PNG") if n is not None else None, "path": f"{n}.png"} for n in numbers]
    image = pa.array(images, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    table = pa.table({"image": image, column: pa.array(labels, kind)})
    features = {"image": {"_type": "Image"}} | ({column: feature} if feature else {})
    info = json.dumps({"info": {"features": features}})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata({"huggingface": info}), path, row_group_size=row_group_size)
    return path


LABEL = {"names": NAMES, "_type": "ClassLabel"}


@pytest.fixture
def parquet(tmp_path):
    """Two files of 13 and 8 rows in row groups of five; class n % 3."""
    write_parquet(tmp_path / "train-00000-of-00002.parquet", range(13), [n % 3 for n in range(13)], LABEL)
    write_parquet(tmp_path / "train-00001-of-00002.parquet", range(13, 21), [n % 3 for n in range(13, 21)], LABEL)
    return tmp_path


def row_id(n):
    return f"train-0000{int(n > 12)}-of-00002/{n - 13 * (n > 12):07d}"


def test_parquet_rows_have_the_names_of_the_metadata_and_any_part_is_read(parquet):
    source = open_parquet(f"{parquet}/train-*.parquet")
    assert source.class_names == tuple(NAMES)
    expected = [Example(row_id(n), photo(n, "PNG"), (n % 3,)) for n in range(21)]
    assert read_all(source) == expected
    some = np.array([20, 3, 14, 12, 0])
    assert list(source.part(some)) == [expected[i] for i in some]


def test_shards_of_parquet_mix_row_groups_that_are_each_read_once(tmp_path):
    """Rows sorted by class, as they may come: 24 row groups of five, shards of 20 rows."""
    for f in range(2):
        numbers = range(60 * f, 60 * f + 60)
        write_parquet(tmp_path / f"train-{f}.parquet", numbers, [n // 40 for n in numbers], LABEL)
    source = open_parquet(f"{tmp_path}/train-*.parquet")
    order = source.order(seed=1, window=20)
    assert sorted(order) == list(range(120))
    assert not np.array_equal(order, source.order(seed=2, window=20))
    parts = [order[i : i + 20] for i in range(0, 120, 20)]
    groups = [{n // 5 for n in part} for part in parts]
    assert [len(group) for group in groups] == [4] * 6  # each row group in one part
    assert not any(max(group) - min(group) == 3 for group in groups)  # from all over the files
    assert all(len({n // 5 for n in part[:8]}) > 2 for part in parts)  # and mixed inside
    for part in parts:
        assert [e.labels for e in source.part(part)] == [(n // 40,) for n in part]

    write_shards(
        f"{tmp_path}/train-*.parquet", tmp_path / "set", name="hf", row_group_size=4, shard_examples=20, seed=1
    )
    manifest = read_manifest(tmp_path / "set")
    rows = [row for table in read_tables(str(tmp_path / "set"), manifest) for row in to_examples(table)]
    assert rows == [example for part in parts for example in source.part(part)]
    assert manifest.class_names == tuple(NAMES)


def test_labels_of_parquet_columns(tmp_path):
    several = write_parquet(
        tmp_path / "m.parquet", range(3), [[0, 2], [], [1]], {"feature": LABEL, "_type": "Sequence"}
    )
    source = open_parquet(str(several))
    assert source.multi_label
    assert [e.labels for e in read_all(source)] == [(0, 2), (), (1,)]
    text = write_parquet(tmp_path / "t.parquet", range(3), ["b", "a", "b"], column="kind")
    with pytest.raises(DataError, match="the column of labels is not clear") as raised:
        open_parquet(str(text))
    one_line(raised)
    assert [e.labels for e in read_all(open_parquet(str(text), label="kind"))] == [(1,), (0,), (1,)]
    plain = write_parquet(tmp_path / "p.parquet", range(3), [0, 1, 0])
    assert open_parquet(str(plain)).class_names == ("0", "1")
    assert open_parquet(str(plain), class_names=["no", "yes"]).class_names == ("no", "yes")


@pytest.mark.parametrize(
    ("labels", "options", "reason"),
    [
        ([0, -1, 2], {}, "a, row 2: label '-1' is outside the class list; accepted: one of 3 classes"),
        ([0, 1, 3], {}, "a, row 3: label '3' is outside the class list"),
        ([0, None, 2], {}, "a, row 2 has an empty label"),
        ([0, 1, 2], {"label": "kind"}, "no column 'kind'; accepted: one of image, label"),
    ],
)
def test_labels_of_parquet_that_are_wrong_are_one_line(tmp_path, labels, options, reason):
    write_parquet(tmp_path / "a.parquet", range(3), labels, LABEL)
    with pytest.raises(DataError, match=reason) as raised:
        open_parquet(f"{tmp_path}/a.parquet", **options)
    one_line(raised)


def test_parquet_without_images_or_damaged_is_one_line(tmp_path):
    pq.write_table(pa.table({"x": [1]}), tmp_path / "a.parquet")
    write_parquet(tmp_path / "b.parquet", range(2), [0, 1], LABEL)
    write_parquet(tmp_path / "c.parquet", range(2), ["ant", "bee"])
    for pattern, reason in (
        ("{a,b}.parquet", "no column with images"),
        ("{b,a}.parquet", "no columns image and label"),
        ("{b,c}.parquet", "different types"),
    ):
        with pytest.raises(DataError, match=reason) as raised:
            open_parquet(f"{tmp_path}/{pattern}")
        one_line(raised)
    path = write_parquet(tmp_path / "d.parquet", [0, None], [0, 1], LABEL)
    assert read_all(open_parquet(str(path)))[1] == Unreadable("d/0000001", "no image in this row, or only its path")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="not readable as Parquet") as raised:
        open_parquet(str(path))
    one_line(raised)


def test_a_source_is_told_by_how_it_is_given(tars, tmp_path, monkeypatch):
    small = {"name": "t", "row_group_size": 2, "shard_examples": 4}
    report = write_shards(f"{tars}/train-*.tar", tmp_path / "tars", label="label", **small)
    assert (report.num_examples, report.num_small) == (12, 12)
    assert read_manifest(tmp_path / "tars").class_names == ("a", "b", "c")
    single = write_parquet(tmp_path / "one.parquet", range(4), [0, 1, 2, 0], LABEL)
    assert write_shards(single, tmp_path / "parquet", **small).num_examples == 4
    (tmp_path / "x.png").write_bytes(photo(0, "PNG"))
    pq.write_table(pa.table({"path": ["x.png"], "label": ["ant"]}), tmp_path / "table.parquet")
    assert write_shards(tmp_path / "table.parquet", tmp_path / "table", **small).num_examples == 1

    for source, options, reason in (
        (f"{tars}/train-*.tar", {"root": "x"}, "root: x, given with WebDataset tar files; accepted: only with a .csv"),
        (single, {"multi_label": True}, "multi_label: True, given with Parquet files with images inside"),
        ("digits:test", {"label": "x"}, "label: x, given with an embedded set"),
        ("cifar10:test", {"class_names": ["a"]}, "class_names: given with a set by name"),
        (tmp_path, {"download": True}, "download: True, given with a folder"),
        (iter([]), {"check_size": False, "class_names": ["a"]}, "check_size: False, given with an iterator"),
    ):
        with pytest.raises(ConfigError, match=reason) as raised:
            write_shards(source, tmp_path / "no", **options, **small)
        one_line(raised)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="cifar-10:train: neither a path nor a .*did you mean cifar10") as raised:
        write_shards("cifar-10:train", tmp_path / "no", **small)
    one_line(raised)
