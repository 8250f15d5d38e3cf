import hashlib

import pytest
import vtab_files as files

from bit_ray.data.sources.vtab.splits import draw_index, open_task
from bit_ray.data.sources.vtab.storage_order import storage_order
from bit_ray.data.sources.vtab.tasks import TASKS, find_task

# The first of CIFAR-10's training set (3.0.2) as users of TensorFlow Datasets print them; CIFAR-100 has the same keys.
CIFAR = [16399, 1680, 47917, 17307, 27051, 48736, 26263, 1456, 19135, 31598, 12970, 4223]

# Our ids, and the keys that the builders of TensorFlow Datasets give the same examples.
KEYS = [
    ("dtd", "val", {f"banded/banded_{i:04d}.jpg": f"banded/banded_{i:04d}.jpg" for i in range(9)}, "validation"),
    ("oxford_flowers102", "test", {f"oxford_flowers102/image_{i:05d}": f"image_{i:05d}.jpg" for i in range(9)}, "test"),
    ("oxford_iiit_pet", "train", {f"oxford_iiit_pet/Bengal_{i}": f"Bengal_{i}.jpg" for i in range(9)}, "train"),
    ("sun397", "train", {f"a/abbey/sun_{i}.jpg": f"/a/abbey/sun_{i}.jpg" for i in range(9)}, "train"),
    ("svhn", "test", {f"test/{i:05d}": str(i) for i in range(12)}, "test"),
    ("patch_camelyon", "val", {f"val/{i:06d}": f"valid_{i}" for i in range(12)}, "validation"),
    ("eurosat", "all", {f"Forest/Forest_{i}.jpg": f"Forest_Forest_{i}.jpg" for i in range(9)}, "train"),
    ("resisc45", "all", {f"sea_ice/sea_ice_{i:03d}.jpg": f"sea_ice_sea_ice_{i:03d}.jpg" for i in range(9)}, "train"),
    ("diabetic_retinopathy", "val", {f"test/{i}_left": f"{i}_left" for i in range(9)}, "validation"),
    ("clevr", "val", {f"CLEVR_val_{i:06d}.png": f"CLEVR_val_{i:06d}.png" for i in range(9)}, "validation"),
    ("dmlab", "test", {f"test/a/{i}.png": f"a/{i}.png" for i in range(9)}, "test"),
    ("kitti", "train", {f"{i:06d}": f"{i:06d}.png" for i in range(9)}, "train"),
    ("dsprites", "all", {f"{i:06d}": str(i) for i in range(12)}, "train"),
    ("smallnorb", "test", {f"test/{i:05d}": str(i) for i in range(12)}, "test"),
]


def test_the_order_of_cifar_is_the_one_that_is_known():
    assert storage_order("cifar100", "train", [f"cifar100/train/{i:05d}" for i in range(50_000)])[:12].tolist() == CIFAR


@pytest.mark.parametrize(("dataset", "part", "keys", "split"), KEYS, ids=[row[0] for row in KEYS])
def test_keys_are_those_of_the_builders(dataset, part, keys, split):
    ids = list(keys)
    expected = sorted(range(len(ids)), key=lambda i: int(hashlib.md5((split + keys[ids[i]]).encode()).hexdigest(), 16))
    assert storage_order(dataset, part, ids).tolist() == expected
    assert expected != sorted(expected)


def test_all_data_sets_but_one_have_an_order():
    assert {task.folder for task in TASKS} - {row[0] for row in KEYS} == {"cifar100", "caltech101"}
    assert storage_order("caltech101", "train", ["a/image_0001.jpg"]) is None


def test_publishers_files_give_the_canonical_examples(tmp_path):
    sets = files.flowers(tmp_path, counts=(1020, 1020, 6149), size=(2, 2))
    data = open_task(find_task("oxford_flowers102"), tmp_path)
    index = draw_index(data)
    for split, name, found in (("train", "trnid", index.train), ("validation", "valid", index.val)):
        keys = [f"image_{n:05d}.jpg" for n in sets[name]]
        keys.sort(key=lambda key: int(hashlib.md5((split + key).encode()).hexdigest(), 16))
        assert [f"{id.rpartition('/')[2]}.jpg" for id in found] == keys[: len(found)]
    assert index.canonical
    assert index.statement == (
        "oxford_flowers102: 800 + 200 examples, the first in the order of TensorFlow Datasets, the canonical subset of "
        "VTAB-1k"
    )
    assert not draw_index(data, seed=1).canonical
