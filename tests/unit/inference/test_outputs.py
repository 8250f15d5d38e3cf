from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch

from bit_ray.errors import ConfigError, DataError
from bit_ray.inference.classifier import Classifier
from bit_ray.inference.inputs import open_images
from bit_ray.inference.outputs import check_output, prediction_schema, prediction_table, write_file
from bit_ray.models.zoo import create_model
from bit_ray.weights.package import ModelSpec

NAMES = ("a", 'b, "quoted"', "c\nd")


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    torch.manual_seed(0)
    spec = ModelSpec(
        model="R1-1-1-1x0.5",
        num_classes=3,
        class_names=NAMES,
        multi_label=False,
        resize_mode="square",
        resize_size=32,
        crop_size=32,
    )
    return Classifier(create_model(spec.model, 3), spec)


def rows(classifier: Classifier, features: bool = True) -> pa.Table:
    """Two batches of which one image in the middle cannot be read."""
    schema = prediction_schema(classifier, 2, features)
    results = []
    for size in (2, 1):
        best = np.full((size, 2), 0.25) + np.arange(size)[:, None] / 8
        classes = np.array([[2, 1], [1, 0]])[:size]
        vectors = np.arange(size * 4, dtype=np.float32).reshape(size, 4)
        results.append((best, classes, vectors) if features else (best, classes))
    return prediction_table(schema, ["w", "x", "y", "z"], [None, "zero bytes", None, None], results, NAMES)


def test_rows_stand_in_the_order_of_the_images_with_nulls_where_one_is_unreadable(classifier: Classifier) -> None:
    table = rows(classifier)
    assert table["path"].to_pylist() == ["w", "x", "y", "z"]
    assert table["class_1"].to_pylist() == ["c\nd", None, 'b, "quoted"', "c\nd"]
    assert table["class_2"].to_pylist() == ['b, "quoted"', None, "a", 'b, "quoted"']
    assert table["probability_1"].to_pylist() == [0.25, None, 0.375, 0.25]
    assert table["features"].to_pylist() == [[0, 1, 2, 3], None, [4, 5, 6, 7], [0, 1, 2, 3]]
    assert table["error"].to_pylist() == [None, "zero bytes", None, None]


def test_a_part_without_a_readable_image_has_the_same_columns(classifier: Classifier) -> None:
    schema = prediction_schema(classifier, 2, True)
    table = prediction_table(schema, ["x"], ["zero bytes"], [], NAMES)
    assert table.schema == rows(classifier).schema
    assert pa.concat_tables([table, rows(classifier)]).num_rows == 5


def test_parquet_and_csv_hold_the_same_rows(classifier: Classifier, tmp_path: Path) -> None:
    with_features, table = rows(classifier), rows(classifier, features=False)
    write_file(str(tmp_path / "new" / "a.parquet"), "parquet", [with_features, with_features], with_features.schema)
    assert pq.read_table(tmp_path / "new" / "a.parquet").equals(pa.concat_tables([with_features, with_features]))
    write_file(str(tmp_path / "a.csv"), "csv", [table], table.schema)
    options = pa.csv.ParseOptions(newlines_in_values=True)
    convert = pa.csv.ConvertOptions(strings_can_be_null=True, quoted_strings_can_be_null=False)
    found = pa.csv.read_csv(tmp_path / "a.csv", parse_options=options, convert_options=convert)
    assert found.to_pylist() == table.to_pylist()


def test_a_file_that_fails_half_way_is_not_left(classifier: Classifier, tmp_path: Path) -> None:
    table = rows(classifier, features=False)

    def tables():
        yield table
        raise DataError("the store went away")

    (tmp_path / "a.parquet").write_bytes(b"older")
    for name in ("a.parquet", "b.csv"):
        with pytest.raises(DataError, match="the store went away"):
            write_file(str(tmp_path / name), name.rpartition(".")[2], tables(), table.schema)
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]
    assert (tmp_path / "a.parquet").read_bytes() == b"older"


def test_the_kind_of_an_output_is_its_ending(tmp_path: Path) -> None:
    assert check_output(f"{tmp_path}/a.csv", False) == "csv"
    assert check_output(f"{tmp_path}/a.parquet", True) == "parquet"
    assert check_output(f"{tmp_path}/a/", True) == "folder"
    for output, features, said in (
        (f"{tmp_path}/a", False, r"ending in \.csv or \.parquet, or a folder ending in /"),
        (f"{tmp_path}/a.csv", True, "accepted: Parquet for vectors"),
    ):
        with pytest.raises(ConfigError, match=said):
            check_output(output, features)


def test_images_are_listed_in_order_whatever_their_endings_case(tmp_path: Path, monkeypatch) -> None:
    for name in ("b.JPG", "a/z.png", ".c.jpg", "a/.d/e.jpg", "readme.txt", "f.jpg.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    images = open_images([str(tmp_path), f"file://{tmp_path}/readme.txt"])  # a file that is named is taken
    assert images.others == {".txt": 2}
    monkeypatch.chdir(tmp_path)
    relative = open_images(["."])
    assert [image.name for image in relative.part(0)] == ["a/z.png", "b.JPG"]
    assert [image.read().data for image in relative.part(0)] == [b"x", b"x"]
    assert relative.digest != images.digest
    assert [Path(image.name).name for image in images.part(0)] == ["z.png", "b.JPG", "readme.txt"]
    with pytest.raises(DataError, match="nowhere: no such path"):
        open_images(["nowhere"])
