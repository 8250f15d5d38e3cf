"""Photographs as ImageNet's are: JPEG files of about 500x375 pixels and 103 kB, always the same ones.

python benchmarks/corpus.py /tmp/corpus --num-images 3000

ImageNet itself cannot be had by everyone. These are crops, at random scales, of the photographs that come with
scikit-learn, scikit-image and Matplotlib, with noise in the luma: the time of a JPEG decoder goes by bits per pixel, so
their number has to be right (4 bits, quality 90 to 96). Every image is a function of (seed, number) alone, and sizes
and subsampling follow a fixed pattern, so that a small corpus has the mean size of a large one.
"""

import os
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from PIL import Image
from sklearn.datasets import load_sample_images

from bit_ray.cluster.slots import num_local_cores
from bit_ray.errors import ConfigError

NUM_CLASSES = 100
_SKIMAGE_PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
# Width, height of 15 images of 20; the other five are drawn from the tails.
_COMMON = [(500, 375)] * 9 + [(375, 500)] * 2 + [(500, 333)] * 3 + [(333, 500)]
_PATTERN = 20
# (range, step of the sequence, power of the skew) of the longer side, pixels, and of width over height.
_TAILS = ((200, 1600), 0.7548776662466927, 2.3), ((2 / 3, 3 / 2), 0.5698402909980532, 1)
_QUALITIES = 90, 96
_NOISE = 3.0, 14.0  # standard deviation of the luma noise, of 255


@dataclass(frozen=True, kw_only=True)
class Config:
    """Write the corpus, or find it again."""

    directory: tyro.conf.Positional[str]
    """Folder of the class folders, new or that of an earlier run."""
    num_images: int = 3000
    """Images in all, in 100 classes."""
    seed: int = 0
    """Seed of the crops and the noise."""


def make_corpus(directory: str | Path, num_images: int = 3000, seed: int = 0) -> list[Path]:
    """Write the files that are missing, as ``directory/<class>/<seed>-<number>.jpg``.

    Args:
        directory: Folder of the class folders; nothing else may lie in it.
        num_images: Images in all.
        seed: Seed of the crops and the noise.

    Returns:
        The files, in the order of their numbers.

    Raises:
        ConfigError: The folder holds other files, as of a corpus made with other arguments.
    """
    directory = Path(directory).absolute()
    paths = [
        directory / f"{(i + i // NUM_CLASSES) % NUM_CLASSES:03d}" / f"{seed}-{i:06d}.jpg" for i in range(num_images)
    ]
    found = {path for path in directory.rglob("*") if path.is_file() and path.suffix != ".part"}
    if strange := found.difference(paths):
        given = f"{directory} has {min(strange)} and {len(strange) - 1} more files"
        accepted = f"a new folder, or a corpus of {num_images} images with seed {seed}"
        raise ConfigError.of("directory", given, accepted, "choose another folder")
    missing = [i for i, path in enumerate(paths) if path not in found]

    def write(i: int) -> None:
        part = paths[i].with_suffix(".part")
        part.parent.mkdir(parents=True, exist_ok=True)
        _write_image(part, seed, i)
        os.replace(part, paths[i])

    with ThreadPoolExecutor(num_local_cores()) as pool:
        list(pool.map(write, missing))
    return paths


@lru_cache(maxsize=1)
def _photographs() -> list[np.ndarray]:
    """``[H, W, 3] uint8`` each."""
    try:
        from skimage import data
    except ModuleNotFoundError:
        raise ConfigError("scikit-image is not installed; run pip install -r benchmarks/requirements.txt") from None
    grace_hopper = Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg")
    return [
        *load_sample_images().images,
        np.asarray(Image.open(grace_hopper).convert("RGB")),
        *(getattr(data, name)() for name in _SKIMAGE_PHOTOGRAPHS),
    ]


def _size(i: int) -> tuple[int, int]:
    """Width and height of image i."""
    place, turn = i * 7 % _PATTERN, i // _PATTERN
    if place < len(_COMMON):
        return _COMMON[place]
    # Sides and aspects of low discrepancy, so that every part of the corpus has the same mix.
    tail = turn * (_PATTERN - len(_COMMON)) + place - len(_COMMON) + 17  # from where even 300 images have the mean
    side, aspect = (low * (high / low) ** (tail * step % 1) ** power for (low, high), step, power in _TAILS)
    return round(side * min(1, aspect)), round(side * min(1, 1 / aspect))


def _write_image(path: Path, seed: int, i: int) -> None:
    rng = np.random.default_rng([seed, i])
    width, height = _size(i)
    photograph = _photographs()[i % len(_photographs())]
    largest = min(photograph.shape[0] / height, photograph.shape[1] / width)
    box_height, box_width = (int(rng.uniform(0.4, 1.0) * largest * side) for side in (height, width))
    top, left = (rng.integers(n - m + 1) for n, m in zip(photograph.shape, (box_height, box_width), strict=False))
    crop = photograph[top : top + box_height, left : left + box_width][:, :: rng.choice((-1, 1))]
    image = np.asarray(Image.fromarray(crop).resize((width, height), Image.Resampling.BICUBIC))
    noise = rng.normal(0, rng.uniform(*_NOISE), (height, width, 1))  # the same in R, G and B
    Image.fromarray((image + noise).clip(0, 255).astype(np.uint8)).save(
        path,
        format="JPEG",
        quality=int(rng.integers(_QUALITIES[0], _QUALITIES[1] + 1)),
        subsampling="4:4:4" if i % 5 == 0 else "4:2:0",
    )


def main(config: Config) -> None:
    paths = make_corpus(config.directory, config.num_images, config.seed)
    sizes = [path.stat().st_size for path in paths]
    pixels = [Image.open(path).size for path in paths]
    area = statistics.mean(width * height for width, height in pixels)
    print(
        f"{len(paths):,} images in {config.directory}: mean {statistics.mean(sizes) / 1e3:.1f} kB, median "
        f"{statistics.median(sizes) / 1e3:.1f} kB, mean {area / 1e3:.0f}k pixels, "
        f"{8 * statistics.mean(sizes) / area:.2f} bits per pixel"
    )


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except ConfigError as error:
        sys.exit(f"error: {error}")
