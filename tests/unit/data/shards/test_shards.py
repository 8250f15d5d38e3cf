import csv
import dataclasses
import hashlib
import io
import json
import os
import struct
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bit_ray.data.shards.inspect import contact_sheet, inspect_shards
from bit_ray.data.shards.manifest import read_manifest, write_manifest
from bit_ray.data.shards.read import read_rows, row_group_checksums, to_examples
from bit_ray.data.shards.verify import verify_shards
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.base import Example
from bit_ray.data.sources.endings import named
from bit_ray.errors import BitRayError, ConfigError, DataError


def jpeg(i, kind="JPEG", mode="RGB", size=(12, 8)):
    rng = np.random.default_rng(i)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def examples(n=50, num_classes=3):
    return [Example(f"e{i:03d}", jpeg(i), (i % num_classes,)) for i in range(n)]


CLASSES = ("ant", "bee", "cat")
SMALL = {"name": "test", "row_group_size": 4, "shard_examples": 12}


def read_all(uri):
    manifest = read_manifest(uri)
    rows = []
    for i in range(len(manifest.shards)):
        for group in range(manifest.row_groups(i)):
            rows.extend(to_examples(read_rows(str(uri), manifest, i, [group])))
    return rows


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    for i, example in enumerate(examples(30)):
        path = root / CLASSES[i % 3] / ("deep/er" if i % 2 else "") / f"{example.id}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(example.image)
    (root / "bee" / ".DS_Store").write_bytes(b"hidden")
    (root / ".git").mkdir()
    (root / ".git" / "x.jpg").write_bytes(b"hidden")
    (root / "LICENSE").write_text("not in a class folder")
    return root


@pytest.fixture
def table(folder, tmp_path):
    """A CSV beside the images of ``folder``."""
    path = tmp_path / "list.csv"
    rows = [(p.relative_to(tmp_path), p.relative_to(folder).parts[0]) for p in sorted(folder.glob("[abc]*/**/*.jpg"))]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *rows])
    return path


def write_table(path, rows, columns=("path", "label")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def test_an_iterator_is_written_and_read_back_in_order_with_its_bytes(tmp_path):
    report = write_shards(iter(examples()), tmp_path / "set", class_names=CLASSES, **SMALL)
    assert read_all(tmp_path / "set") == examples()
    manifest = read_manifest(tmp_path / "set")
    assert [s.num_examples for s in manifest.shards] == [12, 12, 12, 12, 2]
    assert manifest.class_names == CLASSES
    assert manifest.median_image_size == (8, 12)
    assert (report.num_examples, report.num_shards, report.skipped) == (50, 5, ())
    assert report.num_bytes == sum((tmp_path / "set" / s.path).stat().st_size for s in manifest.shards)
    assert sorted(os.listdir(tmp_path / "set")) == ["manifest.json", *(s.path for s in manifest.shards)]


def test_every_row_group_but_a_shards_last_is_full(tmp_path):
    write_shards(examples(27), tmp_path / "set", class_names=CLASSES, name="t", row_group_size=4, shard_examples=13)
    sizes = []
    for path in sorted((tmp_path / "set").glob("*.parquet")):
        metadata = pq.read_metadata(path)
        sizes.append([metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)])
    assert sizes == [[4, 4, 4, 4], [4, 4, 3]]  # 13 examples are brought to whole row groups


def test_pyarrow_alone_reads_a_shard(tmp_path):
    write_shards(examples(5), tmp_path / "set", class_names=CLASSES, **SMALL)
    table = pq.read_table(tmp_path / "set" / "shard-00000.parquet")
    assert table.column_names == ["id", "image", "labels"]
    assert table.schema.types == [pa.string(), pa.binary(), pa.list_(pa.field("element", pa.int32(), nullable=False))]
    assert table["labels"].to_pylist() == [[0], [1], [2], [0], [1]]


def test_a_folder_of_class_folders(folder, tmp_path):
    (folder / "dog").mkdir()
    report = write_shards(folder, tmp_path / "set", **SMALL)
    assert read_manifest(tmp_path / "set").class_names == ("ant", "bee", "cat", "dog")
    assert report.empty_classes == ("dog",)
    rows = read_all(tmp_path / "set")
    assert len(rows) == 30
    for row in rows:
        assert row.image == (folder / row.id).read_bytes()
        assert row.labels == (("ant", "bee", "cat").index(row.id.split("/")[0]),)
    classes_of_first_shard = {row.labels for row in rows[:12]}
    assert len(classes_of_first_shard) == 3  # shards mix the classes


def test_the_seed_decides_the_order_and_nothing_else(folder, tmp_path):
    sets = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_shards(folder, tmp_path / name, seed=seed, **SMALL)
        sets[name] = read_all(tmp_path / name)
    assert read_manifest(tmp_path / "a").digest == read_manifest(tmp_path / "b").digest
    assert sets["a"] == sets["b"] != sets["c"]
    assert sorted(sets["a"], key=lambda e: e.id) == sorted(sets["c"], key=lambda e: e.id)


def test_a_table_of_paths_and_names_gives_the_same_examples_as_the_folder(folder, table, tmp_path):
    write_shards(folder, tmp_path / "a", **SMALL)
    write_shards(table, tmp_path / "b", **SMALL)
    by_bytes = {row.image: row.labels for row in read_all(tmp_path / "a")}
    assert {row.image: row.labels for row in read_all(tmp_path / "b")} == by_bytes
    assert read_manifest(tmp_path / "b").class_names == CLASSES


def test_a_table_with_root_ids_and_indices(folder, tmp_path):
    path = tmp_path / "elsewhere" / "list.csv"
    path.parent.mkdir()
    files = sorted(p.relative_to(folder) for p in folder.glob("[abc]*/**/*.jpg"))
    write_table(path, [(f, i % 2, f"id{i}") for i, f in enumerate(files)], ("path", "label", "id"))
    write_shards(path, tmp_path / "set", root=str(folder), class_names=["no", "yes"], **SMALL)
    rows = {row.id: row for row in read_all(tmp_path / "set")}
    assert rows["id7"].image == (folder / files[7]).read_bytes()
    assert rows["id7"].labels == (1,)


def test_multi_label_tables_csv_and_parquet(folder, tmp_path):
    files = [str(p) for p in sorted(folder.glob("[abc]*/**/*.jpg"))[:4]]
    labels = [["bee", "ant"], ["cat"], [], ["ant"]]
    write_table(tmp_path / "list.csv", [(f, " ; ".join(ls)) for f, ls in zip(files, labels, strict=True)])
    write_shards(tmp_path / "list.csv", tmp_path / "a", multi_label=True, **SMALL)
    pq.write_table(pa.table({"path": files, "label": labels}), tmp_path / "list.parquet")
    write_shards(tmp_path / "list.parquet", tmp_path / "b", **SMALL)
    for name in "ab":
        manifest = read_manifest(tmp_path / name)
        assert manifest.multi_label
        assert manifest.class_names == CLASSES
        by_id = {row.id: row.labels for row in read_all(tmp_path / name)}
        assert [by_id[f] for f in files] == [(1, 0), (2,), (), (0,)]


def test_bad_images_stop_the_writing_and_leave_nothing(folder, tmp_path):
    (folder / "ant" / "gray.jpg").write_bytes(jpeg(1, mode="L"))
    with pytest.raises(DataError) as caught:
        write_shards(folder, tmp_path / "set", **SMALL)
    assert str(caught.value).startswith("ant/gray.jpg: grayscale; 0 more bad images in the same shard")
    assert "--on-bad skip" in str(caught.value)
    assert "--convert-images" in str(caught.value)
    assert not (tmp_path / "set").exists()
    (folder / "ant" / "grayer.jpg").write_bytes(jpeg(1, mode="L"))
    with pytest.raises(DataError, match=r"; 1 more bad images in the same shard \(1 grayscale\); accepted"):
        write_shards(folder, tmp_path / "set", **SMALL)


def test_where_no_image_can_be_read_the_error_counts_the_reasons(tmp_path):
    for name, data in {"a": jpeg(1, mode="L"), "b": jpeg(2, mode="L"), "c": b"no image"}.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "1.jpg").write_bytes(data)
    with pytest.raises(DataError) as caught:
        write_shards(tmp_path / "images", tmp_path / "set", on_bad="skip", **SMALL)
    assert "no readable image (3 refused: 2 grayscale, 1 not an image of a known format" in str(caught.value)
    assert str(caught.value).endswith("check the source, or add --convert-images (convert_images)")


def bomb():
    """The header of a 20,000 x 20,000 PNG with a few of its pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(999)))


BAD = {
    "cmyk.jpg": ("CMYK", lambda: jpeg(0, mode="CMYK")),
    "gray.jpg": ("grayscale", lambda: jpeg(0, mode="L")),
    "deep.png": ("16-bit", lambda: jpeg(0, "PNG", mode="I;16")),
    "empty.jpg": ("zero bytes", lambda: b""),
    "short.jpg": ("truncated", lambda: jpeg(0, size=(90, 90))[:900]),
    "bomb.png": ("decompression bomb", bomb),
    "text.jpg": ("not an image", lambda: b"hello"),
}


def animated():
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


BAD["animated.gif"] = ("animated", animated)


@pytest.mark.parametrize("name", BAD)
def test_each_bad_image_is_named_with_its_reason(folder, tmp_path, name):
    reason, make = BAD[name]
    (folder / "bee" / name).write_bytes(make())
    with pytest.raises(DataError, match=f"^bee/{name}: .*{reason}.*; 0 more bad images") as caught:
        write_shards(folder, tmp_path / "set", **SMALL)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "set").exists()


def test_skipped_images_are_counted_and_listed(folder, table, tmp_path):
    for name, (_, make) in BAD.items():
        (folder / "bee" / name).write_bytes(make())
    report = write_shards(folder, tmp_path / "set", on_bad="skip", **SMALL)
    assert report.num_examples == 30
    assert {id for id, _ in report.skipped} == {f"bee/{name}" for name in BAD}
    listed = json.loads((tmp_path / "set" / "skipped.json").read_text())
    assert [(row["id"], row["reason"]) for row in listed] == list(report.skipped)
    for row in listed:
        assert BAD[row["id"].removeprefix("bee/")][0] in row["reason"]
    assert verify_shards(tmp_path / "set").ok
    again = write_shards(folder, tmp_path / "set", on_bad="skip", **SMALL)
    assert again.skipped == report.skipped


def test_files_with_other_endings_are_left_out_and_counted(folder, tmp_path):
    images = write_shards(folder, tmp_path / "without", **SMALL)
    for name in ("bee/sound.ogg", "bee/Thumbs.db", "cat/a/live.HEIC", "cat/b.heic", "bee/LICENSE", ".hidden/x.ogg"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    report = write_shards(folder, tmp_path / "set", **SMALL)
    assert report.others == {".heic": 2, ".db": 1, ".ogg": 1, "no ending": 1}
    assert (report.num_examples, report.skipped) == (images.num_examples, ())
    assert read_manifest(tmp_path / "set").digest == read_manifest(tmp_path / "without").digest
    assert named(report.others) == "2 .heic (convert to JPEG), 1 .db, 1 .ogg, 1 no ending"
    for path in [path for path in folder.rglob("*") if path.suffix in (".jpg", ".png")]:
        path.unlink()
    with pytest.raises(DataError, match=r"no image in any class folder \(2 .heic .*\); accepted: images at CLASS"):
        write_shards(folder, tmp_path / "none", **SMALL)


def test_a_listed_file_that_is_not_there_is_a_bad_image(table, tmp_path):
    with table.open("a") as file:
        file.write("gone.jpg,ant\n")
    with pytest.raises(DataError, match="^gone.jpg: no such file; 0 more"):
        write_shards(table, tmp_path / "set", **SMALL)
    report = write_shards(table, tmp_path / "set", on_bad="skip", **SMALL)
    assert report.skipped == (("gone.jpg", "no such file"),)


def test_converted_images_keep_their_bytes_and_the_manifest_says_so(folder, tmp_path):
    gray = jpeg(1, mode="L")
    (folder / "ant" / "gray.jpg").write_bytes(gray)
    write_shards(folder, tmp_path / "set", convert_images=True, **SMALL)
    assert read_manifest(tmp_path / "set").convert_images
    assert gray in [row.image for row in read_all(tmp_path / "set")]
    assert verify_shards(tmp_path / "set").ok


class Interrupted(Exception):
    pass


def interrupt_at(num_examples):
    def progress(done, total):
        if done >= num_examples:
            raise KeyboardInterrupt

    return progress


def test_an_interrupted_run_is_not_whole_and_is_finished_by_the_same_call(folder, tmp_path):
    write_shards(folder, tmp_path / "whole", **SMALL)
    output = tmp_path / "set"
    with pytest.raises(KeyboardInterrupt):
        write_shards(folder, output, progress=interrupt_at(20), **SMALL)
    first = output / "shard-00000.parquet"
    written = first.stat().st_mtime_ns
    with pytest.raises(DataError, match="an incomplete shard set; run the same `bit-ray shards write` command again"):
        read_manifest(output)
    calls = []
    report = write_shards(folder, output, progress=lambda done, total: calls.append((done, total)), **SMALL)
    assert report.num_resumed == 1
    assert first.stat().st_mtime_ns == written
    assert calls[0][0] > 12
    assert calls[-1] == (30, 30)
    assert read_manifest(output) == read_manifest(tmp_path / "whole")
    assert sorted(os.listdir(output)) == sorted(os.listdir(tmp_path / "whole"))


def test_a_done_shard_that_was_lost_or_cut_is_written_again(folder, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_shards(folder, tmp_path / "set", progress=interrupt_at(26), **SMALL)
    (tmp_path / "set" / "shard-00000.parquet").unlink()
    (tmp_path / "set" / "shard-00001.parquet").write_bytes(b"cut")
    assert write_shards(folder, tmp_path / "set", **SMALL).num_resumed == 0
    assert verify_shards(tmp_path / "set").ok


def test_a_half_written_set_is_not_continued_from_another_source_or_with_other_options(folder, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_shards(folder, tmp_path / "set", progress=interrupt_at(20), **SMALL)
    with pytest.raises(DataError, match="incomplete, written by another command .*seed was 0, now 1"):
        write_shards(folder, tmp_path / "set", seed=1, **SMALL)
    (folder / "ant" / "new.jpg").write_bytes(jpeg(0))
    with pytest.raises(DataError, match="incomplete, written by another command .*source was"):
        write_shards(folder, tmp_path / "set", **SMALL)


def test_an_iterator_is_continued_and_checked(tmp_path):
    def broken():
        yield from examples()[:30]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(broken(), tmp_path / "set", class_names=CLASSES, **SMALL)
    with pytest.raises(DataError, match=r"incomplete, with other examples \(shard 0 differs\)"):
        write_shards(examples()[1:], tmp_path / "set", class_names=CLASSES, **SMALL)
    with pytest.raises(DataError, match=r"incomplete, with other examples \(shard 1 differs\)"):
        write_shards(examples()[:12], tmp_path / "set", class_names=CLASSES, **SMALL)
    report = write_shards(examples(), tmp_path / "set", class_names=CLASSES, **SMALL)
    assert report.num_resumed == 2
    assert read_all(tmp_path / "set") == examples()


def test_a_whole_set_is_left_as_it_is_by_its_own_call_and_refused_to_others(folder, tmp_path):
    write_shards(folder, tmp_path / "set", **SMALL)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "set").iterdir()}
    assert write_shards(folder, tmp_path / "set", **SMALL).num_resumed == 3
    with pytest.raises(DataError, match="has the shard set 'test' already"):
        write_shards(folder, tmp_path / "set", **{**SMALL, "name": "other"})
    with pytest.raises(DataError, match="has the shard set 'test' already"):
        write_shards(examples(), tmp_path / "set", class_names=CLASSES, **SMALL)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "set").iterdir()} == before


def test_a_directory_with_other_things_is_not_written_into(folder, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "thesis.tex").write_text("mine")
    with pytest.raises(DataError, match="not empty, and not an unfinished shard set"):
        write_shards(folder, tmp_path / "set", **SMALL)
    assert os.listdir(tmp_path / "set") == ["thesis.tex"]


def test_what_an_iterator_raises_keeps_the_shards_that_are_finished_if_any(tmp_path):
    def broken(n):
        yield from examples(n)
        raise Interrupted

    with pytest.raises(Interrupted):
        write_shards(broken(10), tmp_path / "set", class_names=CLASSES, **SMALL)
    assert not (tmp_path / "set").exists()
    with pytest.raises(Interrupted):
        write_shards(broken(30), tmp_path / "set", class_names=CLASSES, **SMALL)
    assert sorted(os.listdir(tmp_path / "set")) == ["_writing.json", "shard-00000.parquet", "shard-00001.parquet"]
    assert write_shards(examples(), tmp_path / "set", class_names=CLASSES, **SMALL).num_resumed == 2
    assert read_all(tmp_path / "set") == examples()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([Example("a", jpeg(0), (3,))], "a: label 3; accepted: 0 to 2"),
        ([Example("a", jpeg(0), (-1,))], "a: label -1; accepted: 0 to 2"),
        ([Example("a", jpeg(0), (0, 1))], "a: 2 labels; accepted: one"),
        ([Example("a", jpeg(0), ())], "a: 0 labels; accepted: one"),
        ([Example("", jpeg(0), (0,))], "id: ''; accepted: text"),
        ([Example("a", jpeg(0), (0,)), Example("a", jpeg(1), (0,))], "a: duplicate id"),
        ([*examples(30), Example("e003", jpeg(1), (0,))], "e003: duplicate id"),
        ([("a", jpeg(0), 0)], "source: returned tuple; accepted: Example"),
        ([], "no readable image (0 refused)"),
    ],
)
def test_what_an_iterator_must_not_give(tmp_path, given, message):
    with pytest.raises(DataError) as caught:
        write_shards(given, tmp_path / "set", class_names=CLASSES, **SMALL)
    assert message in str(caught.value)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([("x.jpg", "dog")], {"class_names": CLASSES}, "row 1: label 'dog' is outside the class list"),
        ([("x.jpg", "0"), ("y.jpg", "3")], {"class_names": CLASSES}, "row 2: label '3' is outside the class list"),
        ([("x.jpg", "-1")], {}, "the class list is empty"),
        ([("x.jpg", "ant"), ("x.jpg", "bee")], {}, "path x.jpg is there 2 times; accepted: once"),
        ([("x.jpg", "ant"), ("", "bee")], {}, "row 2 has no path"),
        ([("x.jpg", "")], {}, "row 1 has no label"),
        ([], {}, "no rows"),
        ([("x.jpg", "")], {"multi_label": True}, "the class list is empty"),
        ([("x.jpg", "ant")], {"class_names": ["ant", "ant"]}, "class 'ant' is twice in the class list"),
    ],
)
def test_what_a_table_must_not_have(tmp_path, rows, options, message):
    write_table(tmp_path / "list.csv", rows)
    with pytest.raises(DataError) as caught:
        write_shards(tmp_path / "list.csv", tmp_path / "set", **options, **SMALL)
    assert str(caught.value).startswith(f"{tmp_path}/list.csv: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "set").exists()


def test_sources_that_are_not_there_or_empty(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "classes" / "ant").mkdir(parents=True)
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose" / "1.jpg").write_bytes(jpeg(1))
    (tmp_path / "both" / "ant").mkdir(parents=True)
    for path in ("1.jpg", "ant/2.jpg"):
        (tmp_path / "both" / path).write_bytes(jpeg(1))
    write_table(tmp_path / "bad.csv", [("x", 1)], ("file", "class"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not parquet")
    for source, message in {
        tmp_path / "none": "none: no such path; accepted: a folder of class folders, or a .csv or .parquet table",
        tmp_path / "empty": "empty: the class list is empty; accepted: a folder for each class",
        tmp_path / "loose": "loose: images lie directly in it, such as '1.jpg'; accepted: a folder for each class",
        tmp_path / "both": "; accepted: a folder for each class, with its images below; move them into",
        tmp_path / "classes": "classes: no image in any class folder",
        tmp_path / "bad.csv": "bad.csv: no column 'path'; accepted: the columns path and label",
        tmp_path / "bad.parquet": "bad.parquet: not readable as Parquet",
        "glyphs:xl": "glyphs:xl: no such embedded data set; accepted: glyphs:s, ",
    }.items():
        with pytest.raises(DataError) as caught:
            write_shards(source, tmp_path / "set", **SMALL)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="inside the source"):
        write_shards(folder, folder / "shards", **SMALL)
    with pytest.raises(DataError, match="label 'cat' is outside the class list"):
        write_shards(folder, tmp_path / "set", class_names=["ant", "bee"], **SMALL)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"row_group_size": 0}, "row_group_size: 0; accepted: 1 or more"),
        ({"shard_examples": -1}, "shard_examples: -1; accepted: 1 or more"),
        ({"on_bad": "ignore"}, "on_bad: ignore; accepted: error, skip"),
        ({"name": ""}, "name: empty"),
        ({"class_names": []}, "class_names: empty"),
        ({"num_workers": 2}, "num_workers: 2; accepted: 0 with an iterator"),
        ({"root": "x"}, "root: x, given with an iterator; accepted: only with a .csv or .parquet table"),
    ],
)
def test_options_that_cannot_work(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        write_shards(examples(), tmp_path / "set", **{**SMALL, "class_names": CLASSES, **options})
    assert not (tmp_path / "set").exists()


@pytest.fixture
def written(tmp_path):
    write_shards(examples(), tmp_path / "set", class_names=CLASSES, **SMALL)
    return tmp_path / "set"


def test_a_sound_set_is_verified(written):
    calls = []
    report = verify_shards(written, progress=lambda done, total: calls.append((done, total)))
    assert report.ok
    assert (report.num_examples, report.num_shards, report.problems) == (50, 5, ())
    assert calls == [(12, 50), (24, 50), (36, 50), (48, 50), (50, 50)]


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda p: p.unlink(), "is in the manifest but missing"),
        (lambda p: p.write_bytes(b""), "0 bytes; accepted: "),
        (lambda p: p.write_bytes(p.read_bytes()[:-100]), r"\d+ bytes; accepted: "),
        (lambda p: p.write_bytes(bytes(p.stat().st_size)), "Parquet magic bytes not found"),
    ],
)
def test_reading_a_missing_empty_or_truncated_shard_says_so(written, harm, message):
    manifest = read_manifest(written)
    harm(written / "shard-00003.parquet")
    assert read_rows(str(written), manifest, 2, [0, 2]).num_rows == 8
    with pytest.raises(DataError, match=message) as caught:
        read_rows(str(written), manifest, 3, [0])
    assert str(caught.value).startswith(f"{written}/shard-00003.parquet: ")
    assert f"run `bit-ray shards verify {written}`" in str(caught.value)
    assert "\n" not in str(caught.value)


def replace_shard(directory, index, table, row_group_size=4):
    """Put another table in place of a shard, with the manifest made to fit."""
    manifest = read_manifest(directory)
    path = directory / manifest.shards[index].path
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pq.write_table(table, path, row_group_size=row_group_size, **plain)
    changed = dataclasses.replace(
        manifest.shards[index],
        checksums=row_group_checksums(path)[: 8 * manifest.row_groups(index)],
        num_bytes=path.stat().st_size,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
    )
    shards = (*manifest.shards[:index], changed, *manifest.shards[index + 1 :])
    write_manifest(directory, dataclasses.replace(manifest, shards=shards))


def change_column(table, name, values):
    index = table.column_names.index(name)
    return table.set_column(index, table.schema.field(index), pa.array(values, table.schema.types[index]))


def test_verify_finds_each_kind_of_damage(written):
    paths = sorted(written.glob("*.parquet"))
    table = pq.read_table(paths[2])
    images = table["image"].to_pylist()
    images[1], images[5] = b"", jpeg(0, mode="L")
    table = change_column(table, "image", images)
    table = change_column(table, "id", ["e000", *table["id"].to_pylist()[1:]])
    table = change_column(table, "labels", [*table["labels"].to_pylist()[:-1], [7]])
    replace_shard(written, 2, table)
    replace_shard(written, 4, pq.read_table(paths[4]), row_group_size=1)
    paths[0].write_bytes(paths[0].read_bytes()[:-1])
    flipped = bytearray(paths[1].read_bytes())
    flipped[len(flipped) // 2] ^= 255
    paths[1].write_bytes(flipped)
    paths[3].unlink()
    report = verify_shards(written)
    assert not report.ok
    lines = [str(problem) for problem in report.problems]
    for expected in (
        f"shard-00000.parquet: {paths[0].stat().st_size} bytes; accepted: {paths[0].stat().st_size + 1}, as in ",
        "shard-00000.parquet: cannot be read as a shard",
        "shard-00001.parquet: not the SHA-256 in the manifest",
        "shard-00001.parquet: row group 1 does not have the manifest's checksum",
        "shard-00002.parquet: e025: zero bytes",
        "shard-00002.parquet: e029: grayscale",
        "shard-00002.parquet: e035: label 7; accepted: 0 to 2",
        "shard-00003.parquet: is in the manifest but missing",
        "shard-00004.parquet: row groups are not 4 rows each",
    ):
        assert any(line.startswith(expected) for line in lines), (expected, lines)
    wanted = {"size": 1, "parquet": 1, "label": 1, "missing": 1, "row_groups": 1}
    assert report.counts.items() >= wanted.items()
    assert report.counts["image"] >= 2


def test_verify_finds_an_id_that_comes_twice_in_different_shards(written):
    table = pq.read_table(written / "shard-00002.parquet")
    replace_shard(written, 2, change_column(table, "id", ["e000", *table["id"].to_pylist()[1:]]))
    report = verify_shards(written)
    assert report.counts == {"duplicate_id": 1}
    assert report.problems[0].id == "e000"


def test_verify_lists_a_hundred_problems_and_counts_all(tmp_path):
    write_shards(examples(130), tmp_path / "set", class_names=CLASSES, name="t")
    manifest = read_manifest(tmp_path / "set")
    write_manifest(tmp_path / "set", dataclasses.replace(manifest, class_names=("only",)))
    report = verify_shards(tmp_path / "set", decode=False)
    assert report.counts == {"label": 130 - 44}
    write_manifest(tmp_path / "set", dataclasses.replace(manifest, class_names=CLASSES * 2))
    table = pq.read_table(tmp_path / "set" / "shard-00000.parquet")
    replace_shard(tmp_path / "set", 0, change_column(table, "labels", [[6]] * 130), row_group_size=64)
    report = verify_shards(tmp_path / "set", decode=False)
    assert report.counts == {"label": 130}
    assert len(report.problems) == 100


def test_verify_counts_rows_against_the_manifest(written):
    replace_shard(written, 1, pq.read_table(written / "shard-00001.parquet").slice(0, 11))
    report = verify_shards(written)
    assert report.counts == {"rows": 1}
    assert "11 rows; accepted: 12, as in the manifest" in str(report.problems[0])
    with pytest.raises(DataError, match="not the rows of the manifest"):
        read_rows(str(written), read_manifest(written), 1, [2])


def test_inspect_counts_what_is_there(written):
    summary = inspect_shards(written)
    assert summary["num_examples"] == 50
    assert summary["num_shards"] == 5
    assert summary["largest_classes"][0] == ("ant", 17)
    assert summary["smallest_classes"][0] == ("cat", 16)
    assert summary["median_image_size"] == [8, 12]
    assert summary["digest"] == read_manifest(written).digest
    json.dumps(summary)


def test_a_contact_sheet_is_a_picture_of_n_examples(written, tmp_path):
    contact_sheet(written, tmp_path / "sheet.png", n=10)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (8 * 120 + 8, 2 * 154 + 8)
        pixels = np.asarray(sheet.convert("RGB"))
    assert len(np.unique(pixels[8:120, 8:968].reshape(-1, 3), axis=0)) > 500  # eight noise images, not one flat area
    with pytest.raises(ConfigError, match="num_images: 0"):
        contact_sheet(written, tmp_path / "none.png", n=0)


def test_what_is_wrong_with_data_is_never_a_traceback(tmp_path):
    for call in (verify_shards, inspect_shards, lambda uri: contact_sheet(uri, tmp_path / "x.png")):
        with pytest.raises(BitRayError, match="no such path; give the directory of a shard set"):
            call(tmp_path / "none")
