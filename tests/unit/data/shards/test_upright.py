"""Images that a camera stored on their side, as the rows of a shard."""

import io

import numpy as np
from PIL import Image

from bit_ray.data.images.decode import decode_image, orientation
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.shards.read import read_tables, to_examples
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.base import Example


def stored(tag):
    """A wide picture, as a camera held sideways stores it."""
    exif = Image.Exif()
    exif[0x0112] = tag
    pixels = np.linspace(0, 255, 240 * 320 * 3).reshape(240, 320, 3).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95, exif=exif)
    return file.getvalue()


def test_a_turned_image_is_stored_upright_and_can_be_seekable(tmp_path, extension):
    examples = [Example("upright", stored(1), (0,)), Example("turned", stored(6), (0,))]
    report = write_shards(examples, tmp_path / "set", name="x", class_names=["a"], upright=True, seekable=True)
    assert (report.num_turned, report.num_seekable) == (1, 2)
    manifest = read_manifest(tmp_path / "set")
    assert manifest.upright
    found = {e.id: e.image for table in read_tables(str(tmp_path / "set"), manifest) for e in to_examples(table)}
    assert decode_image(found["upright"]).shape == (240, 320, 3)
    assert decode_image(found["turned"]).shape == (320, 240, 3)
    assert orientation(found["turned"]) == 1
