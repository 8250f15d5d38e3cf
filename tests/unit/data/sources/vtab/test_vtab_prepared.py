import io

import numpy as np
import pytest
import vtab_files as files
from PIL import Image

from bit_ray.data.images.decode import decode_image
from bit_ray.data.sources.vtab.index import fits, load_index, write_index
from bit_ray.data.sources.vtab.splits import draw_index, open_task
from bit_ray.data.sources.vtab.tasks import find_task
from bit_ray.errors import DataError


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def labels(source):
    return [example.labels[0] for example in source.part(np.arange(len(source)))]


def test_the_first_in_storage_order_are_taken_and_the_splits_are_cut_in_order(tmp_path):
    numbers = np.random.default_rng(0).integers(0, 10, 100).tolist()
    examples = [{"image": files.picture(n, i, (64, 64), "JPEG"), "label": n} for i, n in enumerate(numbers)]
    files.prepared(tmp_path, "eurosat", {"train": examples})
    data = open_task(find_task("eurosat"), tmp_path)
    index = draw_index(data, 0, 8, 4)
    assert index.train == tuple(f"all/{i:06d}" for i in range(8))
    assert index.val == tuple(f"all/{i:06d}" for i in range(60, 64))
    assert labels(data.subset("train800val200", index)) == [*numbers[:8], *numbers[60:64]]
    assert labels(data.subset("test", index)) == numbers[80:]
    [example] = data.subset("test", index).part(np.array([3]))
    np.testing.assert_array_equal(
        decode_image(example.image), np.asarray(Image.open(io.BytesIO(examples[83]["image"])))
    )
    # 100 of 27,000 images, and 8 + 4 of them, are not what the benchmark has.
    assert index.canonical is False
    assert (
        index.statement == "eurosat: 8 + 4 examples, the first in the order of TensorFlow Datasets, but not of the "
        "whole published set"
    )
    assert fits(index, 0, 8, 4)
    assert not fits(index, 0, 8, 5)


def test_the_whole_set_gives_the_canonical_subset(tmp_path):
    sizes = {"train": 1020, "validation": 1020, "test": 6149}
    image = files.picture(0, 0, (4, 4), "JPEG")
    files.prepared(
        tmp_path, "oxford_flowers102",
        {split: [{"image": image, "label": i % 102} for i in range(size)] for split, size in sizes.items()},
    )  # fmt: skip
    task = find_task("oxford_flowers102")
    index = draw_index(open_task(task, tmp_path))
    assert index.canonical
    assert index.statement.endswith(
        "800 + 200 examples, the first in the order of TensorFlow Datasets, the canonical subset of VTAB-1k"
    )
    assert index.val == tuple(f"val/{i:06d}" for i in range(200))
    write_index(index, tmp_path / "i.json")
    assert load_index(tmp_path / "i.json", task) == index


def test_labels_are_derived_from_features(tmp_path):
    image = files.picture(1, 1, (8, 8))
    depths = [[9.0, 7.5, 12.0], [8.6, 9.9, 11.0, 12.0]]
    scenes = [
        {"image": image, "objects/pixel_coords": [v for z in scene for v in (1.0, 2.0, z)], "file_name": b"x"}
        for scene in depths
    ]
    files.prepared(tmp_path, "clevr", {"train": scenes * 10, "validation": scenes})
    for name, expected in (("clevr-count", [0, 1]), ("clevr-distance", [0, 2])):
        data = open_task(find_task(name), tmp_path)
        assert labels(data.source)[-2:] == expected

    cars = [
        {"image": image, "objects/type": 1, "objects/location": [0.0, 0.0, 15.0]},
        {"image": image, "objects/type": 3, "objects/location": [0.0, 0.0, 5.0]},
    ]
    files.prepared(tmp_path, "kitti", {"train": cars, "validation": cars, "test": cars})
    assert labels(open_task(find_task("kitti-distance"), tmp_path).source) == [1, 3] * 3

    norb = [
        {"image": png(np.full((96, 96), 40 + i, np.uint8)), "label_azimuth": i, "label_elevation": 8 - i}
        for i in range(4)
    ]
    files.prepared(tmp_path, "smallnorb", {"train": norb, "test": norb})
    assert labels(open_task(find_task("smallnorb-azimuth"), tmp_path).source) == [0, 1, 2, 3] * 2
    assert labels(open_task(find_task("smallnorb-elevation"), tmp_path).source) == [8, 7, 6, 5] * 2


def test_sprites_of_0_and_1_become_0_and_255(tmp_path):
    pixels = np.zeros((64, 64), np.uint8)
    pixels[5:20, 30:40] = 1
    sprites = [{"image": png(pixels), "label_x_position": i, "label_orientation": i} for i in range(32)]
    files.prepared(tmp_path, "dsprites", {"train": sprites})
    data = open_task(find_task("dsprites-orientation"), tmp_path)
    assert labels(data.source) == [int(i / 2.5) for i in range(32)]
    [example] = data.source.part(np.array([3]))
    np.testing.assert_array_equal(decode_image(example.image), np.repeat(pixels[:, :, None] * 255, 3, axis=2))


def test_missing_shards_and_other_data_sets_are_one_line(tmp_path):
    image = files.picture(1, 1, (8, 8))
    place = files.prepared(
        tmp_path, "dmlab", {split: [{"image": image, "label": 2}] * 4 for split in ("train", "validation", "test")}
    )
    assert labels(open_task(find_task("dmlab"), tmp_path).source) == [2] * 12
    (place / "dmlab-test.tfrecord-00001-of-00002").unlink()
    with pytest.raises(DataError, match="1 of 2 shards of test; accepted: all of them") as caught:
        open_task(find_task("dmlab"), tmp_path)
    assert "\n" not in str(caught.value)
    files.prepared(tmp_path, "svhn", {split: [{"image": image, "label": 10}] for split in ("train", "test")})
    with pytest.raises(DataError, match="svhn: .* label 10; accepted: 0 to 9"):
        open_task(find_task("svhn"), tmp_path)
    files.prepared(tmp_path, "smallnorb", {split: [{"image": image, "label": 1}] for split in ("train", "test")})
    with pytest.raises(DataError, match="a record lacks what the task needs"):
        open_task(find_task("smallnorb-azimuth"), tmp_path)
