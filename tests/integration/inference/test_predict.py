"""Predictions over folders and shard sets: rows that equal `Classifier.predict`, whole files, one-line errors."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from s3_server import Bucket

import bit_ray
from bit_ray import store
from bit_ray.cli.main import main
from bit_ray.cluster.slots import Resources
from bit_ray.data.images.decode import decode_image
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.shards.read import read_tables
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.embedded.glyphs import GlyphSource
from bit_ray.errors import ConfigError, DataError
from bit_ray.inference import inputs
from bit_ray.inference.classifier import load_model
from bit_ray.inference.predict import PredictReport, predict_folder
from bit_ray.models.zoo import create_model
from bit_ray.weights.package import ModelSpec, save_package

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_started_here")]
NAME = "R1-1-1-1x0.5"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = create_model(NAME, 7)
    torch.nn.init.normal_(model.head.weight)
    spec = ModelSpec(
        model=NAME,
        num_classes=7,
        class_names=("a", 'b, "quoted"', "c", "d", "e", "f", "g"),
        multi_label=False,
        resize_mode="shorter_side",
        resize_size=36,
        crop_size=32,
    )
    directory = tmp_path_factory.mktemp("predict") / "model"
    save_package(directory, model, spec)
    return directory


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """45 images in folders, 40 of them readable, beside files that are none."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    (folder / "more" / ".hidden").mkdir(parents=True)
    for i in range(40):
        pixels = generator.integers(0, 256, (6, 5 + i % 3, 3)).astype(np.uint8)
        suffix = ("jpg", "png", "JPEG", "webp")[i % 4]
        Image.fromarray(pixels).resize((40 + i, 50)).save(folder / ("more" if i % 5 else ".") / f"{i:02d}.{suffix}")
    whole = (folder / "00.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[:200])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("not an image")
    Image.new("L", (40, 40), 9).save(folder / "gray.png")
    (folder / "x").mkdir()
    os.symlink(folder / "nowhere.jpg", folder / "x" / "dangling.jpg")
    (folder / "notes.txt").write_text("left out")
    (folder / "more" / ".hidden" / "a.jpg").write_bytes(whole)
    (folder / ".b.jpg").write_bytes(whole)
    return folder


BAD = {"cut.jpg", "empty.png", "text.jpg", "gray.png"}


def expected(package: Path, paths: list[str], top_k: int, convert: bool = False) -> list[list[tuple[str, float]]]:
    return load_model(package).predict(paths, top_k, convert=convert)


def check_rows(table: pa.Table, package: Path, top_k: int, **options: bool) -> None:
    """Compare every readable row with the classifier's own prediction for its path."""
    rows = [row for row in table.to_pylist() if not row["error"]]
    assert len(rows) >= 40
    for row, best in zip(rows, expected(package, [row["path"] for row in rows], top_k, **options), strict=True):
        assert [row[f"class_{k}"] for k in range(1, top_k + 1)] == [name for name, _ in best]
        assert [row[f"probability_{k}"] for k in range(1, top_k + 1)] == pytest.approx([p for _, p in best], rel=1e-4)


def check_whole(table: pa.Table, report: PredictReport, folder: Path, package: Path) -> None:
    """Compare a table of all the photos, three classes each, and the report on it, with what they are."""
    assert table.column_names == [
        "path", "class_1", "probability_1", "class_2", "probability_2", "class_3", "probability_3", "error",
    ]  # fmt: skip
    names = [str(Path(path).relative_to(folder)) for path in table["path"].to_pylist()]
    assert names == sorted(names)
    errors = {Path(row["path"]).name: row["error"] for row in table.to_pylist() if row["error"]}
    assert set(errors) - {"dangling.jpg"} == BAD
    assert errors["empty.png"] == "zero bytes"
    assert errors["text.jpg"] == "not an image of a known format, or its header is damaged"
    assert errors["gray.png"] == "grayscale; set convert (--convert-images) to convert it"
    assert errors["cut.jpg"].startswith("truncated or damaged")
    check_rows(table, package, top_k=3)
    assert (report.num_images, report.num_unreadable) == (len(names), len(errors))
    assert sum(report.others.values()) == 1
    assert dict(report.reasons)["zero bytes"] == 1


@pytest.fixture(scope="module")
def whole(ray_started_here: None, photos: Path, package: Path, tmp_path_factory) -> tuple[PredictReport, Path]:
    """The photos classified into a Parquet file."""
    output = tmp_path_factory.mktemp("whole") / "new" / "predictions.parquet"
    return predict_folder(photos, package, output, top_k=3, batch_size=7), output


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on one core: each process loads PyTorch first, and what two of them do is tested with whole folders."""
    monkeypatch.setattr(Resources, "slots_for", lambda self, num_parts, *, use_gpu=None: 1)


def test_a_folder_becomes_a_file_with_a_row_for_each_image(whole, photos: Path, package: Path):
    report, output = whole
    check_whole(pq.read_table(output), report, photos, package)
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_the_command_writes_and_counts_and_the_same_bytes_come_out_again(
    photos: Path, package: Path, tmp_path: Path, capfd, monkeypatch
):
    monkeypatch.chdir(photos.parent)
    output, again = tmp_path / "new" / "predictions.csv", tmp_path / "new" / "again.csv"
    assert main(["predict", photos.name, "--model", str(package), "--output", str(output), "--top-k", "3"]) == 0
    out, err = capfd.readouterr()
    assert "unreadable" in out
    assert "zero bytes" in out
    assert "error" not in err
    table = pa.csv.read_csv(output)
    assert table["path"][0].as_py() == f"{photos.name}/00.jpg"  # as it was given
    assert output.read_text().startswith('"path","class_1","probability_1"')

    report = predict_folder(photos.name, package, again, top_k=3)
    check_whole(table, report, Path(photos.name), package)
    assert again.read_bytes() == output.read_bytes()
    assert {path.name for path in output.parent.iterdir()} == {output.name, again.name}


@pytest.mark.usefixtures("one_process")
def test_features_are_what_the_head_sees_also_of_single_files_and_a_folder(photos: Path, package: Path, tmp_path: Path):
    single = [path for path in sorted(photos.glob("[!.]*.*")) if path.name != "notes.txt"]
    output = tmp_path / "f.parquet"
    bit_ray.predict_folder(
        [*single, photos / "more"], load_model(package), output, features=True, convert=True, top_k=9
    )
    table = pq.read_table(tmp_path / "f.parquet")
    classifier = load_model(package)
    assert {len(vector) for vector in table["features"].drop_null().to_pylist()} == {classifier.model.num_features}
    assert table.schema.names[-4:] == ["class_7", "probability_7", "features", "error"]
    check_rows(table, package, top_k=7, convert=True)
    rows = table.to_pylist()
    assert {Path(row["path"]).name for row in rows if row["features"] is None} - {"dangling.jpg"} == BAD - {"gray.png"}
    row = next(row for row in rows if row["path"].endswith("17.png"))
    view = torch.from_numpy(classifier.view(decode_image(Path(row["path"]).read_bytes())).copy())[None]
    with torch.inference_mode():
        pixels = view.permute(0, 3, 1, 2).float() / 127.5 - 1
        reference = classifier.model.forward_features(pixels)[0]
    np.testing.assert_allclose(row["features"], reference, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("one_process")
def test_a_shard_set_is_classified_by_the_ids_of_its_examples(package: Path, tmp_path: Path):
    write_shards(GlyphSource("s", examples_per_class=2), tmp_path / "set", name="glyphs", row_group_size=9)
    predict_folder(tmp_path / "set", package, tmp_path / "out.parquet", top_k=1)
    table = pq.read_table(tmp_path / "out.parquet")
    manifest = read_manifest(tmp_path / "set")
    examples = [row for part in read_tables(tmp_path / "set", manifest) for row in part.to_pylist()]
    assert table["path"].to_pylist() == [row["id"] for row in examples]
    best = [prediction[0] for prediction in load_model(package).predict([row["image"] for row in examples], 1)]
    assert table["class_1"].to_pylist() == [name for name, _ in best]
    assert table["probability_1"].to_pylist() == pytest.approx([p for _, p in best], rel=1e-4)
    assert table["error"].null_count == 100


def test_parts_equal_the_file_and_an_interrupted_folder_is_continued(
    whole, photos: Path, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    report = predict_folder(photos, package, f"{tmp_path}/parts/", top_k=3, batch_size=7)
    table = pq.read_table(whole[1])
    assert pa.dataset.dataset(tmp_path / "parts").to_table().equals(table)
    names = sorted(path.name for path in (tmp_path / "parts").iterdir())
    assert names == [
        "_plan.json",
        "_predictions.json",
        "part-00000.parquet",
        "part-00001.parquet",
        "part-00002.parquet",
    ]
    with pytest.raises(ConfigError, match="has finished predictions"):
        predict_folder(photos, package, f"{tmp_path}/parts/", top_k=3, batch_size=7)

    (tmp_path / "parts" / "_predictions.json").unlink()  # as if interrupted
    (tmp_path / "parts" / "part-00001.parquet").unlink()
    kept = (tmp_path / "parts" / "part-00002.parquet").stat().st_mtime_ns
    with pytest.raises(
        ConfigError, match="was begun with other top_k; accepted: the same settings; choose another folder"
    ):
        predict_folder(photos, package, f"{tmp_path}/parts/", top_k=2)
    again = predict_folder(photos, package, f"{tmp_path}/parts/", top_k=3, batch_size=7)
    assert (again.num_images, again.num_unreadable) == (report.num_images, report.num_unreadable)
    assert pa.dataset.dataset(tmp_path / "parts").to_table().equals(table)
    assert (tmp_path / "parts" / "part-00002.parquet").stat().st_mtime_ns == kept


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("one_process")
def test_images_and_predictions_in_an_object_store(photos: Path, package: Path, tmp_path: Path, s3: Bucket):
    for name in store.list_files(photos):
        if (photos / name).exists():
            store.upload_file(photos / name, s3.uri(f"in/{name}"))
    outputs = [f"{s3.uri('results')}/{ending}" for ending in ("out.parquet", "out.csv", "parts/")]
    for output in outputs:
        report = predict_folder(s3.uri("in"), package, output)
        assert (report.num_images, report.num_unreadable) == (44, 4)
        local = tmp_path / output.rstrip("/").rpartition("/")[2]
        if output.endswith("/"):
            store.download_directory(output, local)
            table = pa.dataset.dataset(local).to_table()
        else:
            store.download_file(output, local)
            table = pq.read_table(local) if output.endswith("parquet") else pa.csv.read_csv(local)
        assert table["path"][0].as_py() == s3.uri("in/00.jpg")
        row = next(row for row in table.to_pylist() if row["path"].endswith("more/17.png"))
        [best] = load_model(package).predict(photos / "more" / "17.png", 1)
        assert (row["class_1"], row["probability_1"]) == (best[0][0], pytest.approx(best[0][1], rel=1e-4))


@pytest.mark.usefixtures("one_process")
def test_a_failure_half_way_leaves_no_file(package: Path, tmp_path: Path):
    write_shards(GlyphSource("s", examples_per_class=4), tmp_path / "set", name="glyphs", shard_examples=64)
    shard = tmp_path / "set" / "shard-00002.parquet"
    shard.write_bytes(shard.read_bytes()[:-50])
    with pytest.raises(DataError, match="shard-00002.parquet: .* bytes; accepted: ") as caught:
        predict_folder(tmp_path / "set", package, tmp_path / "out" / "predictions.parquet")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_no_more_is_worked_on_than_is_taken():
    from concurrent.futures import ThreadPoolExecutor

    drawn: list[int] = []

    def items():
        for i in range(100):
            drawn.append(i)
            yield i

    with ThreadPoolExecutor(2) as pool:
        stream = inputs.ahead(pool, lambda i: i * i, items(), 8)
        assert [next(stream) for _ in range(5)] == [0, 1, 4, 9, 16]
        assert len(drawn) <= 13
        assert list(stream) == [i * i for i in range(5, 100)]


def test_millions_of_paths_make_thousands_of_parts():
    sizes = {}
    for count in (1, 100, 10_000, 1_000_000, 14_000_000):
        files = inputs.ImageFiles(pa.nulls(count, pa.large_string()), "/", {})
        sizes[count] = (files.part_size, files.num_parts)
    assert sizes[1] == (16, 1)
    assert sizes[10_000] == (40, 250)
    assert sizes[1_000_000] == (3907, 256)
    assert sizes[14_000_000] == (4096, 3418)


def test_a_few_images_on_the_screen_need_no_ray(photos: Path, package: Path):
    code = """
import sys
from bit_ray.cli.main import main
assert main(sys.argv[1:]) == 2
assert "ray" not in sys.modules and "mlflow" not in sys.modules
"""
    damaged = next(path for path in photos.rglob("*") if path.is_file() and not path.stat().st_size)
    command = [sys.executable, "-c", code, "predict", str(damaged), str(photos / "00.jpg"), "--model", str(package)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert load_model(package).predict(photos / "00.jpg")[0][0][0] in out
    assert "zero bytes" in out  # one that cannot be read does not hide the others


def test_a_prediction_in_which_nothing_could_be_read_is_no_success(package: Path, tmp_path: Path, capfd):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(b"")
    output = tmp_path / "out.csv"
    assert main(["predict", str(tmp_path), "--model", str(package), "--output", str(output)]) == 2
    out, err = capfd.readouterr()
    assert "zero bytes" in out
    assert err.splitlines()[-1] == (
        f"error: {output}: none of 3 images could be read; accepted: at least one; see its column error, and delete it "
        "before the next try"
    )


@pytest.fixture
def refused(package: Path, tmp_path: Path, capfd) -> Callable[..., str]:
    def run(*arguments: str, model: str = "") -> str:
        before = sorted(tmp_path.rglob("*"))
        status = main(["predict", *arguments, "--model", model or str(package)])
        out, err = capfd.readouterr()
        assert (status, err.count("\n")) == (2, 1), (out, err)
        assert sorted(tmp_path.rglob("*")) == before
        return err.removeprefix("error: ").strip()

    return run


def test_what_cannot_work_is_one_line(photos: Path, tmp_path: Path, refused: Callable[..., str]):
    output = f"{tmp_path}/out.parquet"
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "notes.txt").write_text("")
    nothing = refused(f"{tmp_path}/nothing", "--output", output)
    assert nothing.startswith(f"{tmp_path}/nothing: no image in it (1 .txt); accepted: files ending in .jpg")
    assert refused("nowhere", "--output", output).startswith("nowhere: no such path; accepted: an image file, a folder")
    assert "ending in .csv or .parquet, or a folder ending in /" in refused(str(photos), "--output", "a.json")
    assert "accepted: Parquet for vectors" in refused(str(photos), "--output", f"{tmp_path}/a.csv", "--features")
    assert refused(str(photos), "--features").startswith("--features: given without output")
    assert refused(str(photos)).startswith(f"{photos}: a folder; accepted: image files; for folders add --output")
    assert refused("s3://bucket/photos").startswith("s3://bucket/photos: a folder; accepted: image files")
    assert "--top-k: 0; accepted: at least 1" in refused(str(photos), "--output", output, "--top-k", "0")
    assert "no such directory" in refused(str(photos), "--output", output, model=str(tmp_path / "no-model"))
    assert "the cluster has no GPU" in refused(str(photos), "--output", output, "--device", "cuda")
    (tmp_path / "out.parquet").write_bytes(b"mine")
    assert refused(str(photos), "--output", output).startswith(
        f"--output: {output} exists; accepted: a new file; choose another"
    )
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("")
    assert "is not empty; accepted: a new or empty folder" in refused(str(photos), "--output", f"{tmp_path}/full/")
    write_shards(GlyphSource("s", examples_per_class=1), tmp_path / "set", name="glyphs")
    several = refused(f"{tmp_path}/set", str(photos), "--output", f"{tmp_path}/new.csv")
    assert "is a shard set, and there are 1 other sources" in several
