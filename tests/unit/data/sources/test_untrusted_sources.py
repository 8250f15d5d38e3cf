"""Sources as others hand them over: whatever they hold, they are read within bounds or refused in one line."""

import io
import json
import os
import pickle
import resource
import struct
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bit_ray.cli.main import main
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.shards.read import read_tables, to_examples
from bit_ray.data.shards.report import read_skipped
from bit_ray.data.shards.write import write_shards
from bit_ray.data.shards.writing import Writing
from bit_ray.data.sources.base import Example
from bit_ray.data.sources.files import FileSource, open_files
from bit_ray.data.sources.parquet import open_parquet
from bit_ray.data.sources.published.pickled import read_pickle
from bit_ray.data.sources.vtab.index import Index, load_index, read_index
from bit_ray.data.sources.vtab.tasks import find_task
from bit_ray.data.sources.webdataset import open_webdataset
from bit_ray.errors import BitRayError


def png(i=0):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


SMALL = {"name": "test", "row_group_size": 4, "shard_examples": 12}


@pytest.fixture
def photos(tmp_path):
    """A table of two photographs, to which a test may add."""
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    (tmp_path / "list.csv").write_text("path,label\n0.png,a\n1.png,b\n")
    return tmp_path


def refused(function, *arguments, **options):
    """The message of the error that the call ends with."""
    with pytest.raises(BitRayError) as raised:
        function(*arguments, **options)
    assert str(raised.value).isprintable()
    return str(raised.value)


# What is no file, and files that are too large


SPECIAL = {
    "pipe": (lambda path: os.mkfifo(path), "a pipe; accepted: a file"),
    "link to a pipe": (lambda path: (os.mkfifo(f"{path}.pipe"), path.symlink_to(f"{path}.pipe")), "a pipe"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "a device; accepted: a file"),
    "directory": (lambda path: path.mkdir(), "a directory; accepted: a file"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "no such file"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_file_is_a_bad_image_by_name(photos, kind):
    make, reason = SPECIAL[kind]
    make(photos / "odd.png")
    with (photos / "list.csv").open("a") as file:
        file.write("odd.png,a\n")
    message = refused(write_shards, photos / "list.csv", photos / "set", **SMALL)
    assert message.startswith(f"odd.png: {reason}")
    report = write_shards(photos / "list.csv", photos / "set", on_bad="skip", **SMALL)
    assert report.num_examples == 2
    assert [id for id, _ in report.skipped] == ["odd.png"]


@pytest.mark.timeout(60)
def test_a_pipe_in_a_class_folder_is_named(tmp_path):
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "0.png").write_bytes(png())
    os.mkfifo(tmp_path / "images" / "a" / "1.png")
    message = refused(write_shards, tmp_path / "images", tmp_path / "set", **SMALL)
    assert message.startswith("a/1.png: a pipe; accepted: a file")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["list.csv", "list.parquet", "train.tar"])
def test_a_pipe_in_place_of_a_source_is_named(tmp_path, name):
    os.mkfifo(tmp_path / name)
    message = refused(write_shards, tmp_path / name, tmp_path / "set", **SMALL)
    assert message.startswith(f"{tmp_path / name}: a pipe; accepted: a file; ")


@pytest.mark.timeout(60)
def test_a_pipe_in_place_of_a_class_list_is_named(photos, capfd):
    os.mkfifo(photos / "names.txt")
    assert main(["shards", "write", f"{photos}/list.csv", f"{photos}/set", "--class-names", f"{photos}/names.txt"]) == 2
    assert capfd.readouterr().err == f"error: {photos}/names.txt: a pipe; accepted: a file; correct the path\n"


@pytest.mark.timeout(60)
def test_a_pipe_in_place_of_an_archive_is_named(tmp_path):
    os.mkfifo(tmp_path / "cifar-10-python.tar.gz")
    message = refused(write_shards, "cifar10:test", tmp_path / "set", data_dir=tmp_path, **SMALL)
    assert message.startswith(f"{tmp_path}/cifar-10-python.tar.gz: a pipe")


def test_a_file_larger_than_any_image_is_refused_before_it_is_read(photos):
    with (photos / "huge.jpg").open("wb") as file:
        file.truncate(3 * 10**9)
    with (photos / "list.csv").open("a") as file:
        file.write("huge.jpg,a\n")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = refused(write_shards, photos / "list.csv", photos / "set", **SMALL)
    assert message.startswith("huge.jpg: 3,000,000,000 bytes; accepted: at most 268,435,456")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_a_member_larger_than_any_image_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / "a.tar").open("wb") as file:
        for name, size in (("0.jpg", 300 * 2**20), ("0.cls", 1)):
            info = tarfile.TarInfo(name)
            info.size = size
            file.write(info.tobuf())
            file.write(b"0")
            file.seek(-(-size // 512) * 512 - 1, os.SEEK_CUR)  # a hole
        file.truncate(file.tell() + 1024)
    message = refused(write_shards, tmp_path / "a.tar", tmp_path / "set", **SMALL)
    assert message.startswith("a/0: 314,572,800 bytes; accepted: at most 268,435,456; 0 more bad images")


# Names


def test_a_file_name_that_is_not_utf_8_is_named(tmp_path):
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    (folder / "0.png").write_bytes(png())
    with open(os.fsencode(folder) + b"/b\xff.png", "wb") as file:
        file.write(png(1))
    message = refused(write_shards, tmp_path / "images", tmp_path / "set", **SMALL)
    assert message == f"{folder}/b\\udcff.png: the name is not UTF-8; accepted: names in UTF-8; rename it"


def test_a_class_folder_and_a_member_whose_names_are_not_utf_8_are_named(tmp_path):
    os.makedirs(os.fsencode(tmp_path) + b"/images/c\xe9")
    message = refused(write_shards, tmp_path / "images", tmp_path / "set", **SMALL)
    assert "/images/c\\udce9: the name is not UTF-8" in message
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as tar:
        for name, data in (("\xe9.png", png()), ("\xe9.cls", b"0")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    message = refused(write_shards, tmp_path / "a.tar", tmp_path / "set", **SMALL)
    assert message.startswith(f"{tmp_path}/a.tar: a/\\udce9: the name is not UTF-8")


@pytest.mark.parametrize("argument", [b"no\xff/such", b"list\xff.csv"])
def test_arguments_that_are_not_utf_8_are_one_line(tmp_path, argument, capfd):
    for source, output in ((os.fsdecode(argument), str(tmp_path / "a")), ("digits:test", os.fsdecode(argument))):
        assert main(["shards", "write", source, output]) == 2
        assert capfd.readouterr().err.count("\n") == 1


# Examples of iterators


HALF = "\udc80"
EXAMPLES = {
    "no image": (Example("a", None, (0,)), "a: image: NoneType; accepted: the bytes of its file"),
    "an image as text": (Example("a", "x", (0,)), "a: image: str"),
    "an array": (Example("a", np.zeros((4, 4, 3), np.uint8), (0,)), "a: image: ndarray"),
    "true": (Example("a", png(), (True,)), "a: label True; accepted: whole numbers"),
    "NumPy's true": (Example("a", png(), (np.True_,)), "a: label np.True_; accepted: whole numbers"),
    "a half": (Example("a", png(), (0.5,)), "a: label 0.5; accepted: whole numbers"),
    "one as a float": (Example("a", png(), (1.0,)), "a: label 1.0; accepted: whole numbers"),
    "a name": (Example("a", png(), ("bee",)), "a: label 'bee'; accepted: whole numbers"),
    "no labels": (Example("a", png(), None), "a: labels: None; accepted: a tuple of class indices"),
    "labels that are a number": (Example("a", png(), 0), "a: labels: 0; accepted: a tuple"),
    "labels that are text": (Example("a", png(), "0"), "a: labels: '0'; accepted: a tuple"),
    "labels that come once": (Example("a", png(), iter((0,))), "a: labels: <tuple_iterator"),
    "a huge label": (Example("a", png(), (2**70,)), "a: label 1180591620717411303424; accepted: 0 to 1"),
    "half of a character": (Example(f"a{HALF}", png(), (0,)), r"id: 'a\udc80'; accepted: text in UTF-8"),
    "an id that is a number": (Example(7, png(), (0,)), "id: 7; accepted: text"),
}


@pytest.mark.parametrize("kind", EXAMPLES)
def test_an_example_that_is_none_is_one_line_also_when_it_is_passed_over_in_a_second_run(tmp_path, kind):
    example, message = EXAMPLES[kind]
    good = [Example(f"e{i}", png(i), (i % 2,)) for i in range(5)]
    options = {"class_names": ["ant", "bee"], **SMALL, "shard_examples": 4}
    assert refused(write_shards, [*good, example], tmp_path / "set", **options).startswith(
        message.replace("\\\\", "\\")
    )
    assert not (tmp_path / "set").exists()

    def broken():
        yield from good
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(broken(), tmp_path / "set", **options)
    again = [*good[:2], example, *good[3:]]
    assert refused(write_shards, again, tmp_path / "set", **options).startswith(message)


def test_labels_of_numpy_are_labels(tmp_path):
    given = [Example("a", png(), (np.int64(1),)), Example("b", png(), np.array([0])), Example("c", png(), [1])]
    write_shards(given, tmp_path / "set", class_names=["ant", "bee"], **SMALL)
    rows = [
        row
        for table in read_tables(str(tmp_path / "set"), read_manifest(tmp_path / "set"))
        for row in to_examples(table)
    ]
    assert [row.labels for row in rows] == [(1,), (0,), (1,)]


@pytest.mark.parametrize("name", ["", " ", HALF, None, 3])
def test_a_class_without_a_name_is_one_line(photos, name):
    options = {"class_names": ["a", name, "b"], **SMALL}
    place = {"iterator": "class_names", "table": str(photos / "list.csv")}
    for kind, source in (("iterator", [Example("a", png(), (0,))]), ("table", photos / "list.csv")):
        message = refused(write_shards, source, photos / "set", **options)
        assert message.startswith(f"{place[kind]}: class 1 is called "), message
    assert not (photos / "set").exists()


def test_a_source_of_ones_own_with_a_class_without_a_name_is_refused(tmp_path):
    class Own:
        class_names, multi_label, identity = ("a", ""), False, {}

        def __len__(self):
            return 1

        def part(self, indices):
            return [Example("a", png(), (0,))]

    assert refused(write_shards, Own(), tmp_path / "set", **SMALL).startswith("source: class 1 is called ''")


def test_the_name_of_a_set_is_text(photos):
    message = refused(write_shards, photos / "list.csv", photos / "set", name=HALF)
    assert message == "name: not UTF-8; accepted: text; name the set"


# Tables, WebDataset, Parquet


def tar_of(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (b'{"label": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "a.json: neither text nor JSON"),
        (b'{"label": "\\udc80"}', "a.json: label '\\udc80'; accepted: an index or a name"),
        (b'{"label": true}', "a.json: label True; accepted: an index or a name"),
        (b'{"label": 0.5}', "a.json: label 0.5; accepted: an index or a name"),
        (b'{"label": ' + b"1" * 5000 + b"}", "a.json: neither text nor JSON"),
        (b'{"la\\nbel": 1}', "a.json: no key label in it; accepted: one of la\\nbel"),
        (b'{"label": 1}' + b" " * 2**24, "a.json: 16,777,228 bytes; accepted: at most 16,777,216 with a label"),
    ],
)
def test_labels_of_webdataset_that_are_none_are_one_line(tmp_path, label, message):
    path = tar_of(tmp_path / "a.tar", {"a.png": png(), "a.json": label})
    assert message in refused(open_webdataset, path)


def broken_text(name):
    """A Parquet column whose text is not UTF-8."""
    values = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(struct.pack("<ii", 0, 2)), pa.py_buffer(b"\xff\xfe")]
    )
    return {name: values}


@pytest.mark.parametrize("column", ["path", "label", "id"])
def test_a_table_whose_text_is_not_utf_8_is_one_line(tmp_path, column):
    columns = {"path": pa.array(["0.png"]), "label": pa.array(["a"]), "id": pa.array(["x"]), **broken_text(column)}
    pq.write_table(pa.table(columns), tmp_path / "list.parquet")
    message = refused(write_shards, tmp_path / "list.parquet", tmp_path / "set", **SMALL)
    assert "list.parquet: not readable as a table (" in message


@pytest.mark.parametrize(
    "labels",
    [
        pa.array([0.5, 1.0]),
        pa.array([[["a"]], [["b"]]]),
        pa.array([{"a": 1}, {"a": 2}]),
        pa.array([b"a", b"b"]),
        pa.array([float("nan"), 1.0]),
    ],
)
def test_labels_of_a_type_that_has_no_names_are_one_line(photos, labels):
    pq.write_table(pa.table({"path": ["0.png", "1.png"], "label": labels}), photos / "list.parquet")
    message = refused(write_shards, photos / "list.parquet", photos / "set", **SMALL)
    assert message.startswith(f"{photos}/list.parquet: labels of the type ")


def test_labels_that_are_a_dictionary_as_of_pandas_are_names(photos):
    labels = pa.array(["b", "a"]).dictionary_encode()
    pq.write_table(pa.table({"path": ["0.png", "1.png"], "label": labels}), photos / "list.parquet")
    assert open_files(photos / "list.parquet").class_names == ("a", "b")


def images(values):
    return pa.array(
        [{"bytes": value, "path": ""} for value in values], pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )


def test_parquet_files_that_say_of_themselves_that_they_become_what_no_images_become_are_refused(tmp_path):
    path = tmp_path / "a.parquet"
    nothing = pa.nulls(200_000, images([]).type)
    pq.write_table(pa.table({"image": nothing, "label": np.zeros(len(nothing), np.int64)}), path)
    assert path.stat().st_size < 200_000
    assert "a.parquet: not readable as Parquet (200,000 rows in a file of " in refused(open_parquet, str(path))
    pq.write_table(pa.table({"image": images([bytes(32 * 2**20)]), "label": [0]}), path, compression="zstd")
    assert "a.parquet: not readable as Parquet (a row group of 33,55" in refused(open_parquet, str(path))


@pytest.mark.parametrize(
    "features",
    [
        b"[" * 100_000,
        b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": 3}}}}',
        b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": {"a": 1}}}}}',
        b'{"info": {"features": [1]}}',
        b"\xff",
        b"null",
    ],
)
def test_names_of_hugging_face_that_are_none_are_as_if_there_were_none(tmp_path, features):
    table = pa.table({"image": images([png()]), "label": [0]})
    pq.write_table(table.replace_schema_metadata({b"huggingface": features}), tmp_path / "a.parquet")
    assert open_parquet(f"{tmp_path}/a.parquet").class_names == ("0",)


class Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("place", ["image", "label", "list"])
def test_what_ray_data_would_unpickle_is_refused(place, photos):
    from ray.data.extensions import ArrowPythonObjectType  # from now on pyarrow knows this type

    pickled = pa.array([pickle.dumps(Runs(str(photos / "made")))] * 2, pa.large_binary())
    harm = pa.ExtensionArray.from_storage(ArrowPythonObjectType(), pickled)
    harm.storage.validate(full=True)
    label, path = pa.array(["a", "b"]), pa.array(["0.png", "1.png"])
    image = pa.StructArray.from_arrays([harm if place == "image" else path.cast("binary"), path], ["bytes", "path"])
    columns = {"path": path} if place == "list" else {"image": image}
    pq.write_table(pa.table({**columns, "label": label if place == "image" else harm}), photos / "a.parquet")
    message = refused(write_shards, photos / "a.parquet", photos / "set", **SMALL)
    assert f"column {'image' if place == 'image' else 'label'!r} has the extension type 'ray.data." in message
    assert not (photos / "made").exists()


def test_parquet_files_whose_columns_differ_are_one_line(tmp_path):
    pq.write_table(pa.table({"image": images([png()]), "label": ["a"]}), tmp_path / "a-0.parquet")
    for column in ({"image": ["x"], "label": ["a"]}, {"image": images([png()]), **broken_text("label")}):
        pq.write_table(pa.table(column), tmp_path / "a-1.parquet")
        assert refused(open_parquet, f"{tmp_path}/a-*.parquet").startswith(f"{tmp_path}/a-1.parquet: ")


# Whatever small documents hold


TEXT = st.text(st.characters(codec=None), max_size=8)  # with halves of characters
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)
SETTINGS = settings(max_examples=150, deadline=None)


def changed(record):
    """The record, or with a value somewhere replaced by any other."""

    def places(value, path=()):
        yield path
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            yield from places(inner, (*path, key))

    def replaced(value, path, new):
        if not path:
            return new
        copy = value.copy()
        copy[path[0]] = replaced(value[path[0]], path[1:], new)
        return copy

    return st.builds(
        lambda path, new: replaced(record, path, new), st.sampled_from(sorted(places(record), key=str)), VALUES
    )


def documents(record):
    """Files that hold such a record, nearly such a one, any other, or no JSON."""
    return st.one_of(changed(record), VALUES).map(lambda value: json.dumps(value).encode()) | st.binary(max_size=60)


def ends_well(function):
    """Return what the call returns, or None after an error of one line."""
    try:
        return function()
    except BitRayError as error:
        text = str(error)
    assert text.isprintable()
    return None


CSV = st.one_of(
    st.binary(max_size=80),
    st.lists(st.lists(TEXT, min_size=1, max_size=3), max_size=5).map(
        lambda rows: "\n".join(",".join(row) for row in [["path", "label"], *rows]).encode("utf-8", "surrogatepass")
    ),
)


@SETTINGS
@given(CSV, st.booleans(), st.none() | st.lists(TEXT, max_size=3))
def test_any_table_is_a_source_or_an_error(data, multi_label, class_names):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "list.csv"
        path.write_bytes(data)
        found = ends_well(lambda: open_files(path, class_names=class_names, multi_label=multi_label))
        if found is not None:
            assert isinstance(found, FileSource)
            assert len(found) >= 1
            assert len(list(found.part(np.arange(len(found))).ids)) == len(found)
            assert len(found.identity["sha256"]) == 64


PLAN = {"name": "x", "seed": 0}
RESULT = {
    "index": 0,
    "shard": {"path": "shard-00000.parquet", "num_examples": 4, "num_bytes": 3, "sha256": "0" * 64},
    "bad": [["a", "b"]],
    "convertible": False,
    "median_image_size": [4, 4],
    "num_seekable": 0,
    "num_shrunk": 0,
    "num_small": 0,
    "source_digest": "",
}


@SETTINGS
@given(documents({"plan": PLAN, "done": [RESULT]}))
def test_any_record_of_an_unfinished_set_is_continued_or_an_error(data):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "_writing.json").write_bytes(data)
        (Path(folder) / "shard-00000.parquet").write_bytes(b"abc")
        found = ends_well(lambda: Writing(folder, PLAN, on_bad="skip"))
        if found is not None:
            assert set(found.done) <= {0}
            again = Writing(folder, PLAN, on_bad="skip")
            assert again.done == found.done


@SETTINGS
@given(documents([{"id": "a", "reason": "b"}]))
def test_any_list_of_skipped_images_is_read_or_an_error(data):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "skipped.json").write_bytes(data)
        found = ends_well(lambda: read_skipped(folder))
        assert found is None or all(isinstance(text, str) for row in found for text in row)


@SETTINGS
@given(documents({"label": 1, "other": [1, "a"]}), st.booleans())
def test_any_label_of_webdataset_is_read_or_an_error(data, multi_label):
    with tempfile.TemporaryDirectory() as folder:
        path = tar_of(Path(folder) / "a.tar", {"a.png": b"image", "a.json": data})
        found = ends_well(lambda: open_webdataset(path, multi_label=multi_label))
        if found is not None:
            (example,) = found.part(np.arange(1))
            assert all(0 <= label < len(found.class_names) for label in example.labels)


TASK = find_task("svhn")
INDEX = {"format": 1, "task": "svhn", "origin": "x", "train": ["a"], "val": ["b"], "test": [], "canonical": False}


@SETTINGS
@given(documents(INDEX))
def test_any_index_of_a_task_is_read_or_an_error(data):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "svhn.json").write_bytes(data)
        found = ends_well(lambda: load_index(f"{folder}/svhn.json", TASK))
        if found is not None:
            assert isinstance(found, Index)
            "".join((found.origin, *found.train, *found.val, *found.test)).encode()


@SETTINGS
@given(st.binary(max_size=40), st.binary(max_size=40))
def test_any_lists_of_a_task_are_read_or_an_error(train, val):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "svhn").mkdir()
        (Path(folder) / "svhn" / "train800.txt").write_bytes(train)
        (Path(folder) / "svhn" / "val200.txt").write_bytes(val)
        assert isinstance(ends_well(lambda: read_index(folder, TASK)), Index | None)


@SETTINGS
@given(documents({"info": {"features": {"label": {"_type": "ClassLabel", "names": ["a", "b"]}}}}))
def test_any_names_of_hugging_face_are_read_or_an_error(data):
    with tempfile.TemporaryDirectory() as folder:
        table = pa.table({"image": images([b"image"]), "label": [1]}).replace_schema_metadata({b"huggingface": data})
        pq.write_table(table, f"{folder}/a.parquet")
        found = ends_well(lambda: open_parquet(f"{folder}/a.parquet"))
        assert found is None or len(found.class_names) >= 2


@SETTINGS
@given(st.binary(max_size=200), st.binary(max_size=20))
def test_any_pickle_is_a_dictionary_or_an_error(head, tail):
    for data in (head, b"\x80\x02}" + head + b"u.", b"\x80\x02}(U\x01a" + tail + b"u."):
        try:
            assert isinstance(read_pickle(data), dict)
        except ValueError:
            continue
