"""The interface of every source: examples, which can be split into parts."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from bit_ray.config import DEFAULT_STORAGE

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

DEFAULT_DATA_DIR = f"{DEFAULT_STORAGE}/datasets"
"""Folder of the publishers' files."""
# Parquet addresses the values of a page by 32-bit offsets.
MAX_IMAGE_BYTES = 2**28


@dataclass(frozen=True)
class Example:
    """One image: a stable id, the encoded bytes and the class indices."""

    id: str
    image: bytes
    labels: tuple[int, ...]
    annotation: bytes = b""
    """Other data about the image, such as boxes; for sets with this optional column."""
    fingerprint: bytes = b""
    """Identifies near-duplicates; for sets with this optional column."""


@dataclass(frozen=True)
class Unreadable:
    """Replaces an example whose bytes cannot be read, such as a missing file."""

    id: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How a source that is named by a text is read; each kind of source takes some of them."""

    multi_label: bool = False
    """An image may have any number of labels: separated by ; in a CSV, a list in Parquet."""
    root: str = ""
    """Folder where a table's relative paths start; empty: the table's folder."""
    data_dir: str = DEFAULT_DATA_DIR
    """For a set by name: folder that holds its publisher's files, unchanged, as they are or below the set's name."""
    download: bool = False
    """For a set by name: download the files that are missing from the folder, where that needs no account."""
    check_size: bool = True
    """For a set by name: refuse another number of images or classes than the published one."""
    label: str = ""
    """Column of labels of Parquet files with images inside; ending or JSON key of labels of a WebDataset; empty: the
    only one."""


class Source(Protocol):
    """Examples that can be split into parts, each of them readable in another process.

    One whose examples fill optional columns of a shard also has ``optional_columns``, their names as in
    `bit_ray.data.shards.footer.OPTIONAL_COLUMNS`.
    """

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

    def part(self, indices: "npt.NDArray[np.int64]") -> Iterable[Example | Unreadable]:
        """Return the examples at these indices, in this order, as a small object that pickles."""
