"""A folder of small images of three classes, and a network to start from."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from bit_ray.models.zoo import create_model
from bit_ray.weights.package import ModelSpec, save_package

MODEL = "R1-1-1-1x0.5"


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A network with random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("start") / "random"
    spec = ModelSpec(
        model=MODEL, num_classes=2, class_names=("a", "b"), multi_label=False, resize_mode="square", resize_size=32,
        crop_size=32,
    )  # fmt: skip
    save_package(path, create_model(MODEL, 2), spec)
    return str(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 digits of each of 3 classes: gray, with transparency, or stored sideways; and files that are no images."""
    folder = tmp_path_factory.mktemp("data") / "Ziffern und Zahlen"
    pixels, labels = load_digits(return_X_y=True)
    for label in range(3):
        (folder / f"n° {label}").mkdir(parents=True)
        for i, row in enumerate(pixels[labels == label][:30]):
            image = Image.fromarray((row.reshape(8, 8) * 15).astype(np.uint8)).resize((40, 40))
            path = folder / f"n° {label}" / f"{i}.png"
            if i % 3 == 0:
                image.save(path)
            elif i % 3 == 1:
                image.convert("RGBA").save(path)
            else:
                exif = Image.Exif()
                exif[0x0112] = 6
                image.convert("RGB").transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    (folder / "n° 0" / "cut.png").write_bytes((folder / "n° 0" / "0.png").read_bytes()[:150])
    (folder / "readme.txt").write_text("x")
    return folder
