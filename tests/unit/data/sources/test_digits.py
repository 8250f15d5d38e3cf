import hashlib
import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from bit_ray.data.sources.embedded.digits import DigitsSource, digit, split_indices
from bit_ray.errors import ConfigError


def test_the_split_is_fixed_stratified_and_disjoint():
    train, test = split_indices("train"), split_indices("test")
    assert (len(train), len(test)) == (997, 800)
    assert sorted([*train, *test]) == list(range(1797))
    labels = load_digits().target
    share = np.bincount(labels[test]) / np.bincount(labels)
    assert np.abs(np.bincount(labels[test]) - np.bincount(labels) * 800 / 1797).max() < 1
    assert share.min() > 0.44
    # The split stands in published tables: it must never change.
    assert test[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 13, 14]
    assert hashlib.sha256(test.astype("<i8").tobytes()).hexdigest().startswith("66d3fd0265cb1d48")


def test_a_digit_is_its_8x8_levels_as_dark_ink_on_white():
    levels = load_digits().images
    for index in (0, 100, 1796):
        image, label = digit(index)
        assert label == load_digits().target[index]
        assert (image.shape, image.dtype) == ((32, 32), np.uint8)
        # Every 4x4 block averages to the level it was drawn from, but for the interpolation with its neighbours.
        blocks = image.reshape(8, 4, 8, 4).mean((1, 3))
        assert np.corrcoef(blocks.ravel(), levels[index].ravel())[0, 1] < -0.97
        assert image.min() < 60
        assert image.max() == 255


def test_ids_name_the_split_and_the_index():
    for split in ("train", "test"):
        source = DigitsSource(split)
        rows = list(source.part(np.arange(len(source))))
        assert [row.id for row in rows] == [f"digits/{split}/{i:05d}" for i in split_indices(split)]
    both = DigitsSource()
    rows = list(both.part(np.arange(1797)))
    assert sum(row.id.startswith("digits/test/") for row in rows) == 800
    assert [row.labels[0] for row in rows] == load_digits().target.tolist()
    assert both.class_names == tuple("0123456789")
    with Image.open(io.BytesIO(rows[5].image)) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (32, 32))
        np.testing.assert_array_equal(np.asarray(image)[:, :, 0], digit(5)[0])


def test_a_split_that_is_not_there():
    with pytest.raises(ConfigError, match="split: val; accepted: all, train, test"):
        DigitsSource("val")
