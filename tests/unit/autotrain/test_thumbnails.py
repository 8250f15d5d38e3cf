"""What a machine makes of thumbnails."""

import io

import numpy as np
import pytest
from PIL import Image

from bit_ray.autotrain import thumbnails
from bit_ray.autotrain.thumbnails import thumbnail_accuracy
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.base import Example


def written(folder, seed, *, told):
    """40 images of two classes, which their brightness tells or nothing does."""
    draw = np.random.default_rng(seed)
    examples = []
    for i in range(40):
        file = io.BytesIO()
        level = 60 + 120 * (i % 2) if told else 128
        Image.fromarray((level + draw.integers(-40, 40, (24, 30, 3))).astype(np.uint8)).save(file, "PNG")
        examples.append(Example(f"{i}", file.getvalue(), (i % 2,)))
    write_shards(examples, folder, name="x", class_names=["dark", "light"])
    return str(folder), read_manifest(folder)


@pytest.mark.parametrize(("told", "lowest", "highest"), [(True, 1, 1), (False, 0.2, 0.8)])
def test_it_is_the_accuracy_on_other_images(tmp_path, monkeypatch, told, lowest, highest):
    sets = written(tmp_path / "train", 0, told=told), written(tmp_path / "val", 1, told=told)
    assert lowest <= thumbnail_accuracy(*sets, seed=0) <= highest
    monkeypatch.setattr(thumbnails, "_MOST_IMAGES", 15)
    assert lowest <= thumbnail_accuracy(*sets, seed=0) <= highest
