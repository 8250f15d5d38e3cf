import json

import numpy as np
import pytest
import vtab_files as files

from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.vtab.index import load_index, read_index, write_index
from bit_ray.data.sources.vtab.splits import draw_index, open_task
from bit_ray.data.sources.vtab.tasks import find_task
from bit_ray.errors import BitRayError, ConfigError, DataError


@pytest.fixture
def eurosat(tmp_path):
    files.eurosat(tmp_path)
    return open_task(find_task("eurosat"), tmp_path)


def ids(source):
    return [example.id for example in source.part(np.arange(len(source)))]


def test_splits_of_one_part_are_mixed_and_do_not_overlap(eurosat):
    whole = {split: ids(eurosat.subset(split, draw_index(eurosat, 0, 8, 4))) for split in ("train", "val", "test")}
    assert [len(found) for found in whole.values()] == [60, 20, 20]
    assert len(set().union(*whole.values())) == 100
    for found in whole.values():  # the publisher's order is by class: uncut it would give the test two classes
        assert len({id.split("/")[0] for id in found}) >= 7
        assert found != sorted(found)


def test_the_1000_are_the_800_and_the_200_of_their_splits(eurosat):
    index = draw_index(eurosat, 3, 8, 4)
    found = {name: ids(eurosat.subset(name, index)) for name in ("train800", "val200", "train800val200")}
    assert [len(names) for names in found.values()] == [8, 4, 12]
    assert found["train800"] == list(index.train)
    assert found["val200"] == list(index.val)
    assert found["train800val200"] == found["train800"] + found["val200"]
    assert set(index.train) <= set(ids(eurosat.subset("train", index)))
    assert set(index.val) <= set(ids(eurosat.subset("val", index)))


def test_another_seed_is_a_draw_that_says_so(eurosat):
    index = draw_index(eurosat, 1, 8, 4)
    assert index == draw_index(eurosat, 1, 8, 4)
    assert set(index.train) != set(draw_index(eurosat, 2, 8, 4).train)
    assert index.statement == "eurosat: 8 + 4 examples, drawn with seed 1, not the canonical subset of VTAB-1k"
    # From NumPy's documented PCG64 words alone.
    words = np.random.PCG64(np.random.SeedSequence((1, 0))).random_raw(60)
    order = eurosat.members["train"][np.argsort(words, kind="stable")[:8]]
    assert index.train == tuple(eurosat.source.ids[i] for i in order)


def test_the_first_in_storage_order_say_what_they_are(eurosat):
    index = draw_index(eurosat, 0, 8, 4)
    assert index.statement == (
        "eurosat: 8 + 4 examples, the first in the order of TensorFlow Datasets, but not of the whole published set"
    )
    assert list(index.train) == ids(eurosat.subset("train", index))[:8]
    assert list(index.val) == ids(eurosat.subset("val", index))[:4]


def test_caltech_has_no_known_order_and_a_test_set_of_its_own(tmp_path):
    files.caltech(tmp_path)
    task = find_task("caltech101")
    index = draw_index(open_task(task, tmp_path))
    assert index.origin == "drawn with seed 0, not the canonical subset of VTAB-1k"
    assert index.has_own_test(task)


def test_validation_and_test_of_smallnorb_are_halves_of_its_test(tmp_path):
    files.smallnorb(tmp_path)
    data = open_task(find_task("smallnorb-azimuth"), tmp_path)
    index = draw_index(data, 0, 10, 5)
    found = {split: ids(data.subset(split, index)) for split in ("train", "val", "test")}
    assert sorted(found["train"]) == [f"train/{i:05d}" for i in range(40)]
    assert sorted(found["val"] + found["test"]) == [f"test/{i:05d}" for i in range(30)]
    assert len(found["val"]) == 15


def test_images_of_several_parts_come_in_the_order_asked_for(tmp_path):
    files.svhn(tmp_path)
    data = open_task(find_task("svhn"), tmp_path)
    places = np.array([45, 3, 31, 0, 3, 49])
    read = list(data.source.part(places))
    assert [example.id for example in read] == [data.source.ids[i] for i in places]
    assert [example.labels[0] for example in read] == [5, 3, 1, 0, 3, 9]


def test_an_index_file_comes_back(eurosat, tmp_path):
    index = draw_index(eurosat, 0, 8, 4)
    write_index(index, tmp_path / "lists" / "eurosat.json")
    assert load_index(tmp_path / "lists" / "eurosat.json", find_task("eurosat")) == index
    assert read_index(tmp_path / "lists", find_task("eurosat")) == index
    assert read_index(tmp_path / "lists", find_task("svhn")) is None
    with pytest.raises(DataError, match="for the task eurosat; accepted: svhn"):
        load_index(tmp_path / "lists" / "eurosat.json", find_task("svhn"))


def test_lists_in_text_files_are_taken_with_a_test_of_their_own(eurosat, tmp_path):
    folder = tmp_path / "lists" / "eurosat"
    folder.mkdir(parents=True)
    train, val, test = eurosat.source.ids[:5], eurosat.source.ids[50:52], eurosat.source.ids[90:]
    for name, chosen in (("train800", train), ("val200", val), ("test", test)):
        (folder / f"{name}.txt").write_text("".join(f"{id} 3\n" for id in chosen))
    index = read_index(tmp_path / "lists", find_task("eurosat"))
    assert (index.train, index.val, index.test) == (tuple(train), tuple(val), tuple(test))
    assert "canonical if their author says so" in index.statement
    assert ids(eurosat.subset("train800val200", index)) == [*train, *val]
    assert ids(eurosat.subset("test", index)) == test
    (folder / "val200.txt").unlink()
    with pytest.raises(DataError, match="missing, but train800.txt exists"):
        read_index(tmp_path / "lists", find_task("eurosat"))


def broken(index, **changes):
    return {
        "format": 1,
        "task": index.task,
        "origin": "x",
        "train": list(index.train),
        "val": list(index.val),
        **changes,
    }


def test_an_index_that_names_absent_examples_is_one_line(eurosat, tmp_path):
    index = draw_index(eurosat, 0, 8, 4)
    (tmp_path / "i.json").write_text(json.dumps(broken(index, val=["Land3/Land3_11.jpg"])))
    wrong = load_index(tmp_path / "i.json", eurosat.task)
    with pytest.raises(DataError) as caught:
        eurosat.subset("val200", wrong)
    assert str(caught.value).startswith(
        "eurosat: Land3/Land3_11.jpg is in the index but not in the data; accepted: ids"
    )
    assert "\n" not in str(caught.value)


def test_an_index_may_not_train_on_the_test_set(eurosat, tmp_path):
    index = draw_index(eurosat, 0, 8, 4)
    leaked = ids(eurosat.subset("test", index))[3]
    (tmp_path / "i.json").write_text(json.dumps(broken(index, val=[leaked])))
    with pytest.raises(DataError, match=f"eurosat: {leaked} is in the index for training, but is in the test set"):
        eurosat.subset("train800val200", load_index(tmp_path / "i.json", eurosat.task))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "not an index file of format 1"),
        ({"train": []}, "0 train and 4 val examples"),
        ({"train": [1, 2]}, r"train: \[1, 2\]; accepted: a list of ids"),
        ({"val": ["a", "b", "a"]}, "a is there twice"),
        ({"origin": None}, "origin: None; accepted: text"),
    ],
)
def test_a_damaged_index_is_one_line(eurosat, tmp_path, changes, message):
    (tmp_path / "i.json").write_text(json.dumps(broken(draw_index(eurosat, 0, 8, 4), **changes)))
    with pytest.raises(DataError, match=message) as caught:
        load_index(tmp_path / "i.json", eurosat.task)
    assert "\n" not in str(caught.value)


def test_other_sizes_than_published_are_said(eurosat):
    assert eurosat.missing == (
        "not the published number of images: train 60 of 16,200, val 20 of 5,400, test 20 of 5,400"
    )


def test_an_unknown_split_is_one_line(eurosat):
    with pytest.raises(ConfigError, match="eurosat:trian: no such split; accepted: train800, val200"):
        eurosat.subset("trian", draw_index(eurosat, 0, 8, 4))


def test_a_subset_is_written_as_shards_by_name(tmp_path):
    files.svhn(tmp_path)
    write_shards("vtab:svhn:test", tmp_path / "shards", name="vtab:svhn:test", data_dir=tmp_path)
    manifest = read_manifest(tmp_path / "shards")
    assert (manifest.num_examples, manifest.num_classes, manifest.median_image_size) == (20, 10, (32, 32))
    for source, message in (
        ("vtab:svhn:all", "vtab:svhn:all: no such subset; accepted: train800, val200"),
        ("vtab:svnh:test", "tasks: svnh; accepted: .*; did you mean svhn?"),
        ("vtab:svhn:train800", "svhn: 27 train images; accepted: at least 800; fetch the whole set"),
    ):
        with pytest.raises(BitRayError, match=message):
            write_shards(source, tmp_path / "other", name="x", data_dir=tmp_path)


def test_a_task_that_others_republished_with_its_lists_is_taken_as_it_is(tmp_path):
    folder = tmp_path / "dsprites-xpos"
    for name, count in (("train800", 8), ("val200", 4), ("test", 5)):
        lines = []
        for i in range(count):
            path = f"images/{name}/{i:06d}.jpg"
            files.write_tree(folder, {path: files.picture(i, count, kind="JPEG")})
            lines.append(f"{path} {i}\n")
        (folder / f"{name}.txt").write_text("".join(lines))
    task = find_task("dsprites-xpos")
    data = open_task(task, tmp_path)
    index = draw_index(data, 3, 8, 4)
    assert index.statement == (
        "dsprites-xpos: 8 + 4 examples, from the lists next to the images, which are canonical if their author says so"
    )
    assert not index.has_own_test(task)
    assert ids(data.subset("train800val200", index)) == [
        *(f"images/train800/{i:06d}.jpg" for i in range(8)), *(f"images/val200/{i:06d}.jpg" for i in range(4))
    ]  # fmt: skip
    test = list(data.subset("test", index).part(np.arange(5)))
    assert [example.labels for example in test] == [(i,) for i in range(5)]
    assert test[2].image == files.picture(2, 5, kind="JPEG")
    assert data.missing.endswith("train 8 of 800, val 4 of 200, test 5 of 73,728")

    for text, message in (
        ("images/test/000009.jpg 3", "line 1: no file .*000009.jpg"),
        (
            "images/test/000001.jpg 16",
            "line 1: 'images/test/000001.jpg 16'; accepted: IMAGE LABEL, the label from 0 to 15",
        ),
        ("images/test/000001.jpg", "accepted: IMAGE LABEL"),
    ):
        (folder / "test.txt").write_text(f"{text}\n")
        with pytest.raises(DataError, match=message):
            open_task(task, tmp_path)
    (folder / "test.txt").unlink()
    with pytest.raises(DataError, match="test.txt is missing next to train800.txt"):
        open_task(task, tmp_path)
