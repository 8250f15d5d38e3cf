"""What a stream tells of each example besides its pixels: what an objective makes its targets of."""

from collections.abc import Sequence
from typing import NamedTuple

from bit_ray.data.images.views import Placement


class Row(NamedTuple):
    """One slot of a batch."""

    labels: Sequence[int]
    """Class indices; empty in a hole."""
    annotation: bytes
    """As the set has it; empty in a hole, and where the set has no annotations."""
    placement: Placement | None
    """Where in the image the view lies, which what the annotation says of positions must follow; None: a hole, an
    example that could not be used."""


HOLE = Row((), b"", None)
