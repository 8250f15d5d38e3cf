"""Small valid things that several kinds damage: images, a network, archives."""

import io
import tarfile
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from bit_ray.models.resnet import ResNetV2
from bit_ray.models.zoo import create_model
from bit_ray.weights.package import ModelSpec

MODEL = "R1-1-1-1x0.5"
CLASSES = ("ant", "bee", "cat")


def picture(width: int, height: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Smooth colours with edges and a little noise, ``[height, width, 3]``."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [127 + 120 * np.sin(x / 9 + seed) * np.cos(y / 7), (x * 5 + y * 3) % 256, 255 * ((x // 11 + y // 13) % 2)]
    noise = np.random.default_rng(seed).integers(0, 25, (height, width, 3))
    return (np.stack(waves, -1) * 0.9 + noise).clip(0, 255).astype(np.uint8)


def encoded(pixels: npt.NDArray[Any], kind: str = "JPEG", mode: str = "RGB", **options: Any) -> bytes:
    """A file of the pixels, by Pillow."""
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if image.mode != mode else image).save(buffer, kind, **options)
    return buffer.getvalue()


def flat_png(width: int, height: int) -> bytes:
    """A black image, a thousandth of its pixels in bytes."""
    squeezed = zlib.compressobj(1)
    body = b"".join(squeezed.compress(bytes(1 + 3 * width)) for _ in range(height)) + squeezed.flush()
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    chunks = (b"IHDR", head), (b"IDAT", body), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, body) for kind, body in chunks)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG file, with its checksum."""
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


def network() -> ResNetV2:
    """A small network of three classes, float16."""
    torch.manual_seed(0)
    model = create_model(MODEL, len(CLASSES))
    torch.nn.init.normal_(model.head.weight)
    return model.half()


def spec(**changes: Any) -> ModelSpec:
    """What the small network is."""
    settings = {"model": MODEL, "num_classes": 3, "class_names": CLASSES, "multi_label": False}
    view = {"resize_mode": "shorter_side", "resize_size": 40, "crop_size": 32}
    return ModelSpec(**{**settings, **view, "recipe": {"steps": [1, 2]}, "provenance": {"parent": "x"}, **changes})


def is_digest(text: str) -> bool:
    """Whether a text is a SHA-256 in hex."""
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


def tarred(files: Mapping[str, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zipped(files: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip file, the same every time."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return buffer.getvalue()
