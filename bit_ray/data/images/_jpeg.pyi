import numpy as np
import numpy.typing as npt

def header(data: bytes, /) -> tuple[int, int, bool] | None: ...
def view(
    data: bytes,
    box: tuple[int, int, int, int],
    resized: tuple[int, int],
    window: tuple[int, int],
    flip: bool,
    out: npt.NDArray[np.uint8],
    simd: bool = True,
) -> bool: ...
def make_seekable(data: bytes, /) -> bytes: ...
