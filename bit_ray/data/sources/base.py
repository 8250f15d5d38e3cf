"""What every source gives: examples, which can be cut into parts."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

# Parquet addresses the values of a page by 32-bit offsets.
MAX_IMAGE_BYTES = 2**28


@dataclass(frozen=True)
class Example:
    """One image: a stable id, the encoded bytes and the class indices."""

    id: str
    image: bytes
    labels: tuple[int, ...]
    annotation: bytes = b""
    """What else is known of the image, such as boxes; for sets with this optional column."""
    fingerprint: bytes = b""
    """By which near-duplicates are found; for sets with this optional column."""


@dataclass(frozen=True)
class Unreadable:
    """In place of an example whose bytes could not be had, as a file that is not there."""

    id: str
    reason: str


class Source(Protocol):
    """Examples that can be cut into parts, each of them readable in another process."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names in the order of the class indices."""

    @property
    def multi_label(self) -> bool:
        """Whether an example may have any number of labels."""

    @property
    def identity(self) -> dict[str, Any]:
        """Plain data that differs when the examples differ."""

    def __len__(self) -> int:
        """Number of examples."""

    def part(self, indices: npt.NDArray[np.int64]) -> Iterable[Example | Unreadable]:
        """Return the examples at these indices, in this order, as a small object that pickles."""
