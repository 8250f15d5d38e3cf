"""Near-duplicates of single images."""

import io

import numpy as np
import pytest
from photos import photo
from PIL import Image, ImageOps

from bit_ray.data.images.alike import near_duplicates, thumbnail
from bit_ray.data.sources.embedded.catalog import open_embedded


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


ORIGINALS = [photo(seed) for seed in range(8)]
WHOLE = np.stack([thumbnail(encoded(image)) for image in ORIGINALS])


@pytest.mark.parametrize(
    ("change", "least"),
    [
        (lambda image: encoded(image, "JPEG", quality=20), 8),
        (lambda image: encoded(image.resize((96, 72)), "WEBP"), 8),
        (lambda image: encoded(image.resize((32, 32))), 8),
        (lambda image: encoded(image.resize((960, 720)), "JPEG"), 8),  # decoded at a quarter
        (lambda image: encoded(image.crop((8, 0, 236, 172))), 7),
        (lambda image: encoded(image.crop((6, 4, 234, 176)).resize((120, 90)), "JPEG", quality=50), 7),
        (lambda image: encoded(image.point(lambda value: 0.8 * value + 20)), 8),
    ],
)
def test_a_changed_copy_is_found(change, least):
    changed = np.stack([thumbnail(change(image)) for image in ORIGINALS])
    pairs = near_duplicates(np.concatenate([WHOLE, changed]))
    assert len({(i, j) for i, j in pairs if j == i + 8}) >= least
    assert all(j == i + 8 for i, j in pairs)


def test_a_photo_that_is_stored_sideways_is_the_same_as_the_turned_one():
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = ORIGINALS[0].transpose(Image.Transpose.ROTATE_90)
    pair = [thumbnail(encoded(ORIGINALS[0])), thumbnail(encoded(stored, "JPEG", exif=exif))]
    assert near_duplicates(np.stack(pair)) == [(0, 1)]


def test_what_is_only_similar_is_not_the_same():
    mirrored = np.stack([thumbnail(encoded(ImageOps.mirror(image))) for image in ORIGINALS])
    assert near_duplicates(np.concatenate([WHOLE, mirrored])) == []
    digits = [thumbnail(example.image) for example in open_embedded("digits:train").part(np.arange(100))]
    assert near_duplicates(np.stack(digits)) == []


def test_flat_images_and_few_have_no_duplicates():
    flat = np.full((3, 32, 32, 3), 200, np.uint8)
    for images in (flat, WHOLE[:1], WHOLE[:0]):
        assert near_duplicates(images) == []


def test_many_copies_of_one_image_are_all_in_a_pair():
    noise = np.random.default_rng(0).integers(-2, 3, (30, 32, 32, 3))
    pairs = near_duplicates(np.clip(WHOLE[:1] + noise, 0, 255).astype(np.uint8))
    assert {i for pair in pairs for i in pair} == set(range(30))
    assert len(pairs) < 150
