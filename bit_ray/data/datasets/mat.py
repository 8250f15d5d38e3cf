"""Variables of a MATLAB file, version 5, with scipy, which scikit-learn brings along."""

import io
from typing import Any

import numpy as np
import numpy.typing as npt

from bit_ray.errors import DataError


def read_mat(data: bytes, place: str, *names: str) -> dict[str, npt.NDArray[Any]]:
    """Read variables, their dimensions of length 1 left out; ``place`` is what messages call the file.

    Raises:
        DataError: not a MATLAB file, damaged, or without one of them.
    """
    from scipy.io import loadmat

    try:
        found = loadmat(io.BytesIO(data), variable_names=names, squeeze_me=True)
    except Exception as error:  # a damaged file may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{place}: not readable as a MATLAB file ({reason}); fetch it again") from None
    for name in names:
        if name not in found:
            raise DataError(f"{place}: has no {name}; accepted: the publisher's file; fetch it again")
    return {name: np.atleast_1d(found[name]) for name in names}
