"""The data of each example in a stream besides its pixels, from which an objective makes its targets."""

from collections.abc import Sequence
from typing import NamedTuple

from bit_ray.data.images.views import Placement


class Row(NamedTuple):
    """One slot of a batch."""

    labels: Sequence[int]
    """Class indices; empty in a hole."""
    annotation: bytes
    """As in the set; empty in a hole, and if the set has no annotations."""
    placement: Placement | None
    """Where in the image the view is; positions in the annotation must be transformed by it. None: a hole, an example
    that could not be used."""


HOLE = Row((), b"", None)
