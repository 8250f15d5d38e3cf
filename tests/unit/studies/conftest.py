"""Sets and weights that several tests start from; nothing is trained."""

import pytest
import torch

from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.embedded.glyphs import GlyphSource
from bit_ray.models.zoo import create_model
from bit_ray.weights.package import ModelSpec, save_package


@pytest.fixture(scope="session")
def init(tmp_path_factory):
    """A saved network of 3 classes."""
    folder, model = tmp_path_factory.mktemp("init"), "R1-1-1-1x0.5"
    torch.manual_seed(0)
    spec = ModelSpec(
        model=model,
        num_classes=3,
        class_names=("a", "b", "c"),
        multi_label=False,
        resize_mode="square",
        resize_size=32,
        crop_size=32,
    )
    save_package(folder, create_model(model, 3), spec)
    return str(folder)


@pytest.fixture(scope="session")
def storage(tmp_path_factory):
    """Where studies find the embedded data written already: all digits, and the glyphs with fewer of each class."""
    folder = tmp_path_factory.mktemp("storage")
    for name, source in {
        "digits-train": "digits:train",
        "digits-test": "digits:test",
        "glyphs-s": GlyphSource("s", examples_per_class=4),
        "glyphs-s-val": GlyphSource("s", split="val", examples_per_class=1),
        "glyphs-m": GlyphSource("m", examples_per_class=1),
        "glyphs-m-val": GlyphSource("m", split="val", examples_per_class=1),
    }.items():
        write_shards(source, folder / "shards" / name, name=name)
    return str(folder)
