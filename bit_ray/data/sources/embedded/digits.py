"""The embedded downstream data set: scikit-learn's 1,797 handwritten digits, 8x8 resized to 32x32, dark ink on white.

The split is fixed. ``numpy.random.default_rng((0, class))`` permutes each class; its first examples are for test, as
many as the class's share of 800 (largest remainders), and the others for training: 800 and 997.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from bit_ray.data.images.png import rgb_png
from bit_ray.data.sources.base import Example
from bit_ray.data.sources.embedded.glyphs import IMAGE_SIZE
from bit_ray.errors import ConfigError

NUM_TEST = 800
_MAX_LEVEL = 16


@dataclass(frozen=True)
class DigitsPart:
    """Some digits, by their index in scikit-learn's order."""

    indices: list[int]

    def __iter__(self) -> Iterator[Example]:
        """Encode the digits in order."""
        test = set(split_indices("test").tolist())
        for index in self.indices:
            split = "test" if index in test else "train"
            image, label = digit(index)
            yield Example(f"digits/{split}/{index:05d}", rgb_png(image), (label,))


class DigitsSource:
    """All digits, or one side of the fixed split: a ``Source``."""

    class_names = tuple("0123456789")
    multi_label = False

    def __init__(self, split: Literal["all", "train", "test"] = "all") -> None:
        """Open one side of the split, or all."""
        if split not in ("all", "train", "test"):
            raise ConfigError.of("split", split, "all, train, test", "choose one")
        self.split = split
        self.indices = np.sort(np.concatenate([split_indices("train"), split_indices("test")]))
        if split != "all":
            self.indices = split_indices(split)

    def __len__(self) -> int:
        """Return the number of digits."""
        return len(self.indices)

    @property
    def identity(self) -> dict[str, Any]:
        """The split, and the version of the drawing method."""
        return {"kind": "digits", "version": 1, "split": self.split}

    def part(self, indices: npt.NDArray[np.int64]) -> DigitsPart:
        """Return the digits at these indices."""
        return DigitsPart(self.indices[indices].tolist())


def digit(index: int) -> tuple[npt.NDArray[np.uint8], int]:
    """Return one digit, [32, 32] uint8 by bilinear interpolation, and its class."""
    levels, labels = _load()
    ink = np.round(levels[index] * (255 / _MAX_LEVEL)).astype(np.uint8)
    image = Image.fromarray(255 - ink).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
    return np.asarray(image), int(labels[index])


@cache
def split_indices(split: Literal["train", "test"]) -> npt.NDArray[np.int64]:
    """Return the indices, in scikit-learn's order, of one side of the fixed split."""
    _, labels = _load()
    shares = np.bincount(labels) * (NUM_TEST / len(labels))
    num_test = np.floor(shares).astype(int)
    by_remainder = np.argsort(num_test - shares, kind="stable")
    num_test[by_remainder[: NUM_TEST - num_test.sum()]] += 1
    chosen = []
    for label, count in enumerate(num_test):
        members = np.flatnonzero(labels == label)
        order = np.random.default_rng((0, label)).permutation(len(members))
        chosen.append(members[order[:count] if split == "test" else order[count:]])
    return np.sort(np.concatenate(chosen))


@cache
def _load() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return bunch.images, bunch.target
