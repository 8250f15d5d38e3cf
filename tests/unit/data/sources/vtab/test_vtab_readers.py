import io
import json
import pickle
import re

import numpy as np
import pytest
import vtab_files as files
from PIL import Image

from bit_ray.data.images.decode import decode_image
from bit_ray.data.sources.base import Unreadable
from bit_ray.data.sources.vtab.readers import READERS
from bit_ray.data.sources.vtab.records import read_records
from bit_ray.data.sources.vtab.specialized import prepare_eye
from bit_ray.data.sources.vtab.splits import draw_index, open_task
from bit_ray.data.sources.vtab.structured import kitti_split
from bit_ray.data.sources.vtab.tasks import TASKS, find_task
from bit_ray.errors import DataError


def opened(name, part, data):
    return READERS[name](find_task(name), data, part)


def examples(source, indices=None):
    """All examples by id, read from a part that has been to another process."""
    indices = np.arange(len(source)) if indices is None else np.asarray(indices)
    read = list(pickle.loads(pickle.dumps(source.part(indices))))
    assert [example.id for example in read] == [source.ids[i] for i in indices]
    assert not any(isinstance(example, Unreadable) for example in read)
    return {example.id: (example.labels[0], decode_image(example.image, convert=True)) for example in read}


def same(found, encoded):
    np.testing.assert_array_equal(found, np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")))


def test_caltech_trains_on_30_of_each_class_and_tests_on_the_rest(tmp_path):
    files.caltech(tmp_path)
    train, test = (opened("caltech101", part, tmp_path) for part in ("train", "test"))
    assert np.bincount(train.labels).tolist() == [30] * 102
    assert np.bincount(test.labels).tolist() == [7 if name == "thing_006" else 3 for name in train.class_names]
    assert not set(train.ids) & set(test.ids)
    assert train.class_names[0] == "BACKGROUND_Google"
    found = examples(train, [100, 5, 3059])
    for id, (label, image) in found.items():
        name, number = re.match(r"(.*)/image_(\d+)\.jpg", id).groups()
        assert train.class_names[label] == name
        same(image, files.picture(label, int(number) - 1, (9, 12), "JPEG"))
    again = opened("caltech101", "train", tmp_path)
    assert list(again.ids) == list(train.ids)


def test_cifar_flowers_and_pets_are_split_as_the_benchmark_does(tmp_path):
    files.cifar100(tmp_path)
    sets = files.flowers(tmp_path)
    files.pets(tmp_path)
    cifar, flowers, pets = (
        open_task(find_task(n), tmp_path) for n in ("cifar100", "oxford_flowers102", "oxford_iiit_pet")
    )
    assert [len(cifar.members[split]) for split in ("train", "val", "test")] == [36, 4, 20]  # 90 %, the rest
    assert [len(pets.members[split]) for split in ("train", "val", "test")] == [32, 8, 37]  # 80 %, the rest
    for split, name in (("train", "trnid"), ("val", "valid"), ("test", "tstid")):
        found = [flowers.source.ids[i] for i in flowers.members[split]]
        assert sorted(found) == sorted(f"oxford_flowers102/image_{n:05d}" for n in sets[name])
    for id, (label, image) in examples(cifar.source, cifar.members["val"]).items():
        number = int(id[-5:])
        assert label == number % 100
        assert (image == [number, 2 * number, 3 * number]).all()
    for id, (label, image) in examples(pets.source, pets.members["test"][[5, 1]]).items():
        same(image, files.picture(label, int(id.rpartition("test")[2]), (30, 40), "JPEG"))


def test_dtd_is_fold_one(tmp_path):
    lists = files.dtd(tmp_path)
    for part in ("train", "val", "test"):
        source = opened("dtd", part, tmp_path)
        assert list(source.ids) == lists[part]
        assert source.class_names == tuple(f"texture{i:02d}" for i in range(47))
        for id, (label, image) in examples(source, [93, 0, 47]).items():
            assert id.startswith(f"texture{label:02d}/")
            same(image, files.picture(label, int(id[-8:-4]), kind="JPEG"))


def test_sun_is_split_by_the_lists(tmp_path):
    files.sun(tmp_path)
    for number, part in enumerate(("train", "val", "test")):
        source = opened("sun397", part, tmp_path)
        assert len(source) == len(source.class_names) == 397
        assert source.class_names[:2] == ("a/abbey", "c/car_interior/backseat")
        label, image = examples(source, [1])["c/car_interior/backseat/sun_00" + f"1{number}0.jpg"]
        assert label == 1
        same(image, files.picture(1, number, (8, 8), "JPEG"))


def test_svhn_digits_and_colours(tmp_path):
    files.svhn(tmp_path)
    source = opened("svhn", "train", tmp_path)
    assert len(source) == 30
    assert len(opened("svhn", "test", tmp_path)) == 20
    for i, (label, image) in enumerate(examples(source).values()):
        assert label == i % 10
        assert image.shape == (32, 32, 3)
        assert image.min() >= 25 * label
        assert image.max() < 25 * label + 20


def test_camelyon_reads_rows_of_hdf5(tmp_path):
    files.camelyon(tmp_path)
    assert [len(opened("patch_camelyon", part, tmp_path)) for part in ("train", "val", "test")] == [12, 6, 8]
    source = opened("patch_camelyon", "test", tmp_path)
    rows = np.random.default_rng(8).integers(0, 60, (8, 96, 96, 3)) + 150 * (np.arange(8) % 2)[:, None, None, None]
    for id, (label, image) in examples(source, [5, 2, 7, 2]).items():
        assert label == int(id[-6:]) % 2
        np.testing.assert_array_equal(image, rows[int(id[-6:])])


@pytest.mark.parametrize(("name", "make", "count"), [("eurosat", files.eurosat, 100), ("resisc45", files.resisc, 225)])
def test_class_folders_in_a_zip_and_unpacked(tmp_path, name, make, count):
    make(tmp_path)
    source = opened(name, "all", tmp_path)
    assert len(source) == count
    size = (64, 64) if name == "eurosat" else (16, 16)
    for id, (label, image) in examples(source, [count - 1, 0, 17]).items():
        assert id.startswith(source.class_names[label] + "/")
        number = int(re.search(r"_(\d+)\.jpg", id)[1]) - 1
        same(image, files.picture(label, number, size, "JPEG"))


def test_retinopathy_splits_by_usage_and_prepares_the_eyes(tmp_path):
    files.retinopathy(tmp_path)
    found = {part: opened("diabetic_retinopathy", part, tmp_path) for part in ("train", "val", "test")}
    assert {part: len(source) for part, source in found.items()} == {"train": 10, "val": 5, "test": 5}
    assert list(found["val"].ids) == [f"test/{i}_right" for i in range(5)]
    assert found["test"].labels.tolist() == [0, 1, 2, 3, 4]
    _, image = examples(found["test"], [3])["test/8_right"]
    assert image.shape == (540, 540, 3)


def test_an_eye_is_scaled_flattened_and_cut_to_its_circle():
    pixels = np.asarray(Image.open(io.BytesIO(files.eye(2, radius=150))))
    image = prepare_eye(pixels).astype(int)
    assert image.shape == (540, 540, 3)
    rows, columns = np.mgrid[:540, :540] - 270
    distance = np.hypot(rows, columns)
    assert (image[distance > 271] == 128).all()
    # An even disc has no detail: well inside it only JPEG noise is left, four times enlarged.
    assert np.abs(image[distance < 200] - 128).mean() < 3
    uniform = prepare_eye(np.full((400, 500, 3), 90, np.uint8))
    assert (uniform == 128).all()


def test_clevr_counts_and_measures_the_same_scenes(tmp_path):
    depths = files.clevr(tmp_path)
    for part, count in (("train", 20), ("val", 8)):
        counted, measured = (opened(name, part, tmp_path) for name in ("clevr-count", "clevr-distance"))
        assert list(counted.ids) == list(measured.ids) == [f"CLEVR_{part}_{i:06d}.png" for i in range(count)]
        assert counted.labels.tolist() == [len(depths[id]) - 3 for id in counted.ids]
        assert measured.labels.tolist() == [i % 6 for i in range(count)]
        assert (len(counted.class_names), len(measured.class_names)) == (8, 6)
    for id, (_, image) in examples(counted, [6, 1]).items():
        number = int(id[-10:-4])
        same(image, files.picture(number % 8, number, (32, 48)))


def test_clevr_unpacked_is_the_same(tmp_path):
    import zipfile

    files.clevr(tmp_path)
    packed = opened("clevr-count", "val", tmp_path)
    with zipfile.ZipFile(tmp_path / "clevr" / "CLEVR_v1.0.zip") as archive:
        archive.extractall(tmp_path / "clevr")
    unpacked = opened("clevr-count", "val", tmp_path)
    assert list(unpacked.ids) == list(packed.ids)
    assert unpacked.labels.tolist() == packed.labels.tolist()
    for (_, a), (_, b) in zip(examples(unpacked).values(), examples(packed).values(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_dmlab_frames_are_read_where_they_lie_in_the_records(tmp_path):
    files.dmlab(tmp_path)
    for part, count in (("train", 14), ("val", 7), ("test", 9)):
        source = opened("dmlab", part, tmp_path)
        assert source.labels.tolist() == [i % 6 for i in range(count)]
        for id, (label, image) in examples(source, [count - 1, 0, 3]).items():
            same(image, files.picture(label, int(re.search(r"frame(\d+)", id)[1]), (36, 48), "JPEG"))


def test_records_of_the_protobuf_library_come_back(tmp_path):
    numbers = [0, 1, 127, 128, 300, 2**40, 2**63 - 1, -1, -(2**63)]
    path = tmp_path / "all.tfrecord"
    files.write_records(path, [{"n": n, "f": [0.5, -2.25], "b": bytes([i] * 2000)} for i, n in enumerate(numbers)])
    data = path.read_bytes()
    records = list(read_records(path))
    assert [record.integers["n"] for record in records] == [[n] for n in numbers]
    for i, record in enumerate(records):
        assert record.floats["f"] == [0.5, -2.25]
        [(offset, length)] = record.extents["b"]
        assert data[offset : offset + length] == bytes([i] * 2000)
    path.write_bytes(data[:-30])
    with pytest.raises(DataError, match="not a complete record"):
        list(read_records(path))


def test_kitti_takes_the_nearest_vehicle_and_splits_by_video(tmp_path):
    files.kitti(tmp_path)
    found = {part: opened("kitti-distance", part, tmp_path) for part in ("train", "val", "test")}
    assert {part: len(source) for part, source in found.items()} == {"train": 48, "val": 6, "test": 6}
    for source in found.values():
        assert source.labels.tolist() == [int(id) % 4 for id in source.ids]
    videos = [{int(id) % 20 for id in source.ids} for source in found.values()]
    assert sum(map(len, videos)) == len(set.union(*videos)) == 20
    for id, (label, image) in examples(found["train"], [40, 3]).items():
        same(image, files.picture(label, int(id), (12, 40)))


def test_the_split_of_kitti_is_that_of_numpys_legacy_draw():
    # np.random.seed(123), then choice without replacement, as in tensorflow_datasets: two of 20, then two of the rest.
    videos = [f"drive_{i:04d}" for i in range(20)]
    np.random.seed(123)  # noqa: NPY002
    test = set(np.random.choice(videos, 2, replace=False))  # noqa: NPY002
    val = set(np.random.choice(sorted(set(videos) - test), 2, replace=False))  # noqa: NPY002
    found = kitti_split(videos)
    assert {videos[i] for i in found["test"]} == test
    assert {videos[i] for i in found["val"]} == val


def test_dsprites_are_binned_and_spread_to_255(tmp_path):
    factors = files.dsprites(tmp_path)
    place, turn = (opened(name, "all", tmp_path) for name in ("dsprites-xpos", "dsprites-orientation"))
    assert place.labels.tolist() == [row[4] // 2 for row in factors.tolist()]
    assert turn.labels.tolist() == [int(row[3] / 2.5) for row in factors.tolist()]
    for id, (_, image) in examples(place, [399, 0, 17, 17]).items():
        _, _, _, turned, x, y = factors[int(id)]
        expected = np.zeros((64, 64, 3), np.uint8)
        expected[y : y + 8 + turned % 8, x : x + 8] = 255
        np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize("compressed", [True, False])
def test_smallnorb_is_the_first_camera(tmp_path, compressed):
    infos = files.smallnorb(tmp_path, compressed=compressed)
    for part, name in (("train", "training"), ("test", "testing")):
        info = infos[name]
        azimuth, elevation = (opened(f"smallnorb-{one}", part, tmp_path) for one in ("azimuth", "elevation"))
        assert azimuth.labels.tolist() == [value // 2 for value in info[:, 2].tolist()]
        assert elevation.labels.tolist() == info[:, 1].tolist()
        for id, (_, image) in examples(azimuth, [len(info) - 1, 2]).items():
            assert image.shape == (96, 96, 3)
            assert set(image.ravel().tolist()) == {10 * info[int(id[-5:]), 1] + 3 * info[int(id[-5:]), 2] // 2}


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_missing_data_is_one_line_with_what_to_fetch_and_where_to_put_it(task, tmp_path):
    with pytest.raises(DataError) as caught:
        open_task(task, tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{task.name}: ")
    assert str(tmp_path / task.folder) in message
    assert "fetch from http" in message
    assert "--" not in message  # no flag of another command


DAMAGED = [
    ("caltech101", files.caltech, "caltech101/101_ObjectCategories.tar.gz"),
    ("svhn", files.svhn, "svhn/test_32x32.mat"),
    ("patch_camelyon", files.camelyon, "patch_camelyon/camelyonpatch_level_2_split_valid_y.h5"),
    ("eurosat", files.eurosat, "eurosat/EuroSAT.zip"),
    ("clevr-count", files.clevr, "clevr/CLEVR_v1.0.zip"),
    ("dmlab", files.dmlab, "dmlab/dmlab-test.tfrecord-00000-of-00002"),
    ("kitti-distance", files.kitti, "kitti/devkit_object.zip"),
    ("dsprites-xpos", files.dsprites, "dsprites/dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"),
    ("smallnorb-azimuth", files.smallnorb, "smallnorb/smallnorb-5x01235x9x18x6x2x96x96-testing-dat.mat.gz"),
]


@pytest.mark.parametrize(("name", "make", "file"), DAMAGED, ids=[row[0] for row in DAMAGED])
def test_a_file_cut_short_is_one_line_that_names_it(name, make, file, tmp_path):
    make(tmp_path)
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(DataError) as caught:
        open_task(find_task(name), tmp_path)
    assert "\n" not in str(caught.value)
    assert path.name.removesuffix(".gz") in str(caught.value)


def test_a_class_that_is_missing_is_one_line(tmp_path):
    files.resisc(tmp_path)
    folder = tmp_path / "resisc45" / "NWPU-RESISC45" / "scene03"
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(DataError, match="44 classes; accepted: the 45 of resisc45"):
        open_task(find_task("resisc45"), tmp_path)


def test_a_clevr_scene_with_eleven_objects_is_refused(tmp_path):
    files.clevr(tmp_path)
    import zipfile

    with zipfile.ZipFile(tmp_path / "clevr" / "CLEVR_v1.0.zip") as archive:
        archive.extractall(tmp_path / "clevr")
    scenes = tmp_path / "clevr" / "CLEVR_v1.0" / "scenes" / "CLEVR_val_scenes.json"
    found = json.loads(scenes.read_text())
    found["scenes"][0]["objects"] *= 4
    scenes.write_text(json.dumps(found))
    with pytest.raises(DataError, match="objects: 12 in a CLEVR scene"):
        open_task(find_task("clevr-count"), tmp_path)


def test_a_draw_needs_as_many_images_as_asked_for(tmp_path):
    files.svhn(tmp_path)
    data = open_task(find_task("svhn"), tmp_path)
    with pytest.raises(DataError, match="27 train images; accepted: at least 800"):
        draw_index(data)
