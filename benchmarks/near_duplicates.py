"""Near-duplicates in a folder: which planted copies are found, which pairs of different files, and what it costs.

    python benchmarks/near_duplicates.py FOLDER        # images at any depth; 200 of them are copied

Every pair of files that is found is printed: whether they are the same is for the eye to judge.
"""

import argparse
import io
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from bit_ray.data.images.alike import SIDE, near_duplicates, thumbnail
from bit_ray.data.images.decode import ImageError, decode_image
from bit_ray.inference.inputs import IMAGE_SUFFIXES


def recompressed(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def cropped(image: Image.Image, share: float, draw: random.Random) -> Image.Image:
    width, height = (round(side * (1 - share)) for side in image.size)
    left, top = draw.randint(0, image.width - width), draw.randint(0, image.height - height)
    return image.crop((left, top, left + width, top + height))


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    draw = random.Random(0)
    paths, thumbnails, images = [], [], []
    small_s = decode_s = 0.0
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    chosen = set(draw.sample(files, min(200, len(files))))
    for path in files:
        data = path.read_bytes()
        try:
            began = time.process_time()
            pixels = decode_image(data, convert=True)
            decoded = time.process_time()
            thumbnails.append(thumbnail(data))
            small_s, decode_s = small_s + time.process_time() - decoded, decode_s + decoded - began
        except ImageError:
            continue
        paths.append(path)
        if path in chosen:
            image = Image.fromarray(pixels)
            image.thumbnail((600, 600))
            images.append(image)
    began = time.process_time()
    found = near_duplicates(np.stack(thumbnails))
    searched = time.process_time() - began
    print(f"{len(paths):,} images: CPU ms each: whole decoding {1e3 * decode_s / len(paths):.2f},", end=" ")
    print(f"thumbnail {1e3 * small_s / len(paths):.2f}, search {1e3 * searched / len(paths):.2f}")
    for a, b in found:
        print(f"  found: {paths[a].relative_to(folder)} and {paths[b].relative_to(folder)}")
    copies: dict[str, Callable[[Image.Image], Image.Image]] = {
        "JPEG of quality 50": lambda image: recompressed(image, 50),
        "JPEG of quality 20": lambda image: recompressed(image, 20),
        "half the size": lambda image: image.resize((max(1, image.width // 2), max(1, image.height // 2))),
        "32 x 32": lambda image: image.resize((32, 32)),
        "cropped by 3 %": lambda image: cropped(image, 0.03, draw),
        "cropped by 5 %": lambda image: cropped(image, 0.05, draw),
        "cropped by 10 %": lambda image: cropped(image, 0.1, draw),
        "3 %, half, quality 50": lambda image: recompressed(
            cropped(image, 0.03, draw).resize((max(1, image.width // 2), max(1, image.height // 2))), 50
        ),
    }
    whole = np.stack([thumbnail(encoded(image)) for image in images])
    for name, change in copies.items():
        other = np.stack([thumbnail(encoded(change(image))) for image in images])
        pairs = set(near_duplicates(np.concatenate([whole, other])))
        recall = sum((i, i + len(images)) in pairs for i in range(len(images))) / len(images)
        print(f"{name:24}{recall:6.0%} of {len(images)} found")
    some = np.random.default_rng(0).integers(0, 256, (20_000, SIDE, SIDE, 3), np.uint8)
    began = time.process_time()
    near_duplicates(some)
    print(f"search among 20,000 images of noise: {time.process_time() - began:.1f} s")


if __name__ == "__main__":
    main()
