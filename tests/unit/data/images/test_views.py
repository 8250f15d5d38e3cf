import numpy as np
import pytest
import torch
from PIL import Image

from bit_ray.data.images.resize import eval_view, train_view
from bit_ray.data.images.views import TrainView, example_keys, inception_box, uniforms
from bit_ray.errors import ConfigError


@pytest.fixture(scope="module")
def photo():
    y, x = np.mgrid[0:90, 0:140]
    return np.stack([x + y, 255 - x, (x * y) % 256], axis=-1).astype(np.uint8)


def test_uniforms_are_uniform_and_uncorrelated():
    u = uniforms(7, 3, example_keys([f"e{i}" for i in range(20_000)]), count=4)
    assert u.shape == (20_000, 4)
    assert 0 <= u.min() < 1e-3
    assert 1 - 1e-3 < u.max() < 1
    for column in u.T:
        histogram = np.histogram(column, bins=20, range=(0, 1))[0]
        assert ((histogram - 1000) ** 2 / 1000).sum() < 43.8  # chi-square, 19 degrees of freedom, p = 0.001
    assert np.abs(np.corrcoef(u.T) - np.eye(4)).max() < 0.03


def test_uniforms_depend_on_seed_epoch_and_example_alone():
    keys = example_keys(["a", "b", "c"])
    u = uniforms(1, 2, keys)
    assert (uniforms(1, 2, keys[[2, 0]]) == u[[2, 0]]).all()
    assert (uniforms(1, np.array([2, 5, 2]), keys)[[0, 2]] == u[[0, 2]]).all()
    for other in (uniforms(2, 2, keys), uniforms(1, 3, keys), uniforms(1, np.array([5, 5, 5]), keys)):
        assert not (other == u).any()


def test_inception_boxes_keep_to_area_and_aspect():
    rng = np.random.default_rng(0)
    for height, width in ((375, 500), (500, 333), (224, 224), (600, 100)):
        areas = []
        for _ in range(300):
            top, left, h, w = inception_box(height, width, rng.random(23), (0.05, 1.0), (3 / 4, 4 / 3))
            assert 0 <= top <= height - h
            assert 0 <= left <= width - w
            if (h, w) != (height, width):
                assert 0.05 <= h * w / (height * width) <= 1
                assert 3 / 4 - 0.02 <= w / h <= 4 / 3 + 0.02
            areas.append(h * w / (height * width))
        assert min(areas) < 0.1


def test_the_height_of_an_inception_box_is_uniform():
    # At aspect 1 on a square the height is uniform between the bounds; torchvision's uniform area would give mean 0.70.
    rng = np.random.default_rng(1)
    heights = [inception_box(1000, 1000, rng.random(23), (0.04, 1.0), (1.0, 1.0))[2] for _ in range(4000)]
    assert np.mean(heights) == pytest.approx(600, abs=12)  # (200 + 1000) / 2
    assert np.std(heights) == pytest.approx(800 / 12**0.5, rel=0.05)


def test_an_impossible_box_gives_the_whole_image():
    assert inception_box(10, 1000, np.full(23, 0.5), (0.9, 1.0), (0.75, 1.33)) == (0, 0, 10, 1000)


def test_views_are_what_pillow_resizes(photo):
    view = TrainView(crop="resize_crop", resize_size=64, crop_size=48, random_flip=True)
    u = np.zeros(23)
    u[-3], u[-2], u[-1] = 0.999, 0.0, 0.4  # bottom left, flipped
    got = train_view(photo, view, u)
    whole = np.asarray(Image.fromarray(photo).resize((64, 64), Image.Resampling.BILINEAR))
    assert got.shape == (48, 48, 3)
    assert np.abs(got.astype(int) - whole[16:64, :48][:, ::-1]).max() <= 1


def test_eval_views(photo):
    square = eval_view(photo, resize_mode="square", resize_size=0, crop_size=40)
    want = np.asarray(Image.fromarray(photo).resize((40, 40), Image.Resampling.BILINEAR))
    assert np.abs(square.astype(int) - want).max() <= 1
    centre = eval_view(photo, resize_mode="shorter_side", resize_size=45, crop_size=40)
    want = np.asarray(Image.fromarray(photo).resize((70, 45), Image.Resampling.BILINEAR))[2:42, 15:55]
    assert np.abs(centre.astype(int) - want).max() <= 1


def test_flip_is_fair(photo):
    view = TrainView(crop="resize", crop_size=32)
    straight = train_view(photo, TrainView(crop="resize", crop_size=32, random_flip=False), np.zeros(23))
    flips = [
        (train_view(photo, view, u) == straight[:, ::-1]).all()
        for u in uniforms(0, 0, example_keys(map(str, range(400))))
    ]
    assert 160 <= sum(flips) <= 240


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop_size": 16}, "crop_size: 16"),
        ({"crop": "resize_crop", "resize_size": 40}, "resize_size: 40"),
        ({"area_range": (0.5, 0.1)}, "area_range"),
        ({"aspect_range": (0.0, 1.0)}, "aspect_range"),
    ],
)
def test_bad_views_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        TrainView(**{"crop": "inception", "crop_size": 64, **change})


def test_views_do_not_touch_their_input(photo):
    before = torch.tensor(photo)
    train_view(photo, TrainView(crop="inception", crop_size=32), uniforms(0, 0, example_keys(["x"]))[0])
    assert torch.equal(before, torch.tensor(photo))
