"""Labels as users have them: names, indices, sparse ids, several per image; what is wrong is one line."""

import csv
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.preprocessing import LabelEncoder, MultiLabelBinarizer

from bit_ray.cli.main import main
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.shards.read import read_tables, to_examples
from bit_ray.data.sources.labels import one_each, to_indices
from bit_ray.errors import DataError


def indices(labels, class_names=None):
    lists = pa.array(labels, pa.list_(pa.string())) if isinstance(labels[0], list) else one_each(pa.array(labels))
    found, classes = to_indices("list.csv", lists, class_names)
    return found.to_pylist(), classes


def test_names_are_numbered_in_sorted_order():
    names = np.random.default_rng(0).choice(["zebra", "ant", "bee 2", "éclair"], 50).tolist()
    encoder = LabelEncoder().fit(names)
    found, classes = indices(names)
    assert [i for (i,) in found] == encoder.transform(names).tolist()
    assert classes == tuple(encoder.classes_)


def test_lists_of_names_are_numbered_in_sorted_order():
    names = [["b", "a"], [], ["c"], ["a", "c"]]
    binarizer = MultiLabelBinarizer().fit(names)
    found, classes = indices(names)
    hot = [[int(i in row) for i in range(len(classes))] for row in found]
    assert hot == binarizer.transform(names).tolist()
    assert classes == tuple(binarizer.classes_)


def test_indices_stay_as_they_are_with_gaps_of_up_to_half():
    assert indices([0, 3, 1, 3]) == ([[0], [3], [1], [3]], ("0", "1", "2", "3"))
    assert indices(["0", "3"]) == ([[0], [3]], ("0", "1", "2", "3"))
    assert indices([1, 0], ["no", "yes"]) == ([[1], [0]], ("no", "yes"))


@pytest.mark.parametrize("text", [False, True])
def test_sparse_ids_need_a_class_list_and_are_then_names(text):
    ids = [205, 7, 1001, 7]
    labels = [str(i) for i in ids] if text else ids
    with pytest.raises(DataError) as raised:
        indices(labels)
    assert str(raised.value) == (
        "list.csv: labels: 3 different numbers up to 1,001: ids, not indices; accepted: indices from 0 on, or "
        "names; give the ids as class list, one per line: --class-names FILE (class_names)"
    )
    assert indices(labels, ["7", "205", "1001"]) == ([[1], [0], [2], [0]], ("7", "205", "1001"))
    with pytest.raises(DataError, match="row 3: label '1001' is outside the class list; accepted: one of 2 classes"):
        indices(labels, ["7", "205"])


def test_a_list_of_ids_is_never_taken_for_indices():
    assert indices([1, 5], ["1", "5", "9"]) == ([[0], [1]], ("1", "5", "9"))
    with pytest.raises(DataError, match="row 2: label '2' is outside the class list"):
        indices([1, 2], ["1", "5", "9"])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, -1], "row 2: label '-1' is outside the class list"),
        ([0, None], "row 2 has an empty label"),
        ([0.5, 1.0], "row 1: label '0.5' is outside the class list"),
    ],
)
def test_labels_that_are_none_are_one_line(labels, message):
    with pytest.raises(DataError, match=message) as raised:
        indices(labels, ["a", "b"])
    assert "\n" not in str(raised.value)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(4):
        buffer = io.BytesIO()
        Image.new("RGB", (64, 31 if i == 2 else 32), (i, 0, 0)).save(buffer, "PNG")
        (tmp_path / f"{i}.png").write_bytes(buffer.getvalue())


def write_csv(name, labels):
    with open(name, "w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *((f"{i}.png", label) for i, label in enumerate(labels))])


def read(uri):
    return {e.id: e.labels for table in read_tables(uri, read_manifest(uri)) for e in to_examples(table)}


def test_a_test_set_takes_the_class_list_of_the_training_set(photos, capfd):
    write_csv("train.csv", ["bee", "ant", "cat", "ant"])
    write_csv("test.csv", ["cat", "ant"])
    assert main(["shards", "write", "train.csv", "train"]) == 0
    assert main(["shards", "write", "test.csv", "other"]) == 0
    assert read_manifest("other").class_names == ("ant", "cat")
    assert main(["shards", "write", "test.csv", "test", "--class-names", "train"]) == 0
    assert read_manifest("test").class_names == read_manifest("train").class_names == ("ant", "bee", "cat")
    assert read("test") == {"0.png": (2,), "1.png": (0,)}
    out = capfd.readouterr().out
    assert "1 classes: bee" in out  # that the test set has no image of
    assert main(["shards", "write", "test.csv", "x", "--class-names", "none"]) == 2
    assert capfd.readouterr().err == (
        "error: --class-names: none: No such file or directory; accepted: a text file with one name per line, or a "
        "shard set; check the path\n"
    )


def test_images_below_32_pixels_are_taken_and_counted(photos, capfd):
    write_csv("train.csv", ["a", "b", "a", "b"])
    assert main(["shards", "write", "train.csv", "train"]) == 0
    shown = " ".join(capfd.readouterr().out.replace("│", " ").split())
    assert "below 32 pixels 1 images; training enlarges them" in shown
    assert read_manifest("train").num_examples == 4


def test_labels_of_a_parquet_table_that_are_numbers_are_ids_where_the_class_list_has_them(photos):
    pq.write_table(pa.table({"path": ["0.png", "1.png"], "label": [900, 17]}), "list.parquet")
    with open("ids.txt", "w") as file:
        file.write("17\n900\n")
    assert main(["shards", "write", "list.parquet", "set", "--class-names", "ids.txt"]) == 0
    assert read("set") == {"0.png": (1,), "1.png": (0,)}
