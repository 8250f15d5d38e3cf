"""A contact sheet of images with what was predicted for them."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bit_ray.plots.style import INK, RIGHT, WRONG, short


def prediction_figure(
    images: Sequence[npt.NDArray[np.uint8]],
    true_names: Sequence[str],
    predictions: Sequence[tuple[str, float]],
    title: str = "Predictions",
    columns: int = 6,
    tally: bool = True,
) -> Figure:
    """Draw a contact sheet of images with what was predicted, green where right and red where wrong.

    Args:
        images: N images, ``[H, W, 3] uint8`` of any size.
        true_names: N true class names.
        predictions: N pairs of predicted class name and probability.
        title: Heading.
        columns: Images per row.
        tally: Whether the heading also says how many are right.
    """
    assert images
    assert len(images) == len(true_names) == len(predictions)
    columns = min(columns, len(images))
    num_rows = -(-len(images) // columns)
    figure = Figure(figsize=(max(1.45 * columns, 3.2), 1.95 * num_rows + 0.5), layout="constrained")
    right = sum(true == predicted for true, (predicted, _) in zip(true_names, predictions, strict=True))
    figure.suptitle(
        f"{title}: {right} of {len(images)} right" if tally else title,
        x=0.01,
        ha="left",
        color=INK,
        weight="bold",
        fontsize=12,
    )
    grid: Iterator[Axes] = iter(figure.subplots(num_rows, columns, squeeze=False).flat)
    for image, true, (predicted, probability) in zip(images, true_names, predictions, strict=True):
        axes = next(grid)
        correct = true == predicted
        # Small images show their pixels; only large ones are smoothed.
        axes.imshow(image, interpolation="nearest" if max(image.shape[:2]) < 96 else "auto")
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set(color=RIGHT if correct else WRONG, linewidth=3)
        # The mark shows right or wrong without the colour.
        axes.set_title(
            f"{'✓' if correct else '✗'} {short(predicted, 14)}  {probability:.0%}",
            color=RIGHT if correct else WRONG,
            fontsize=9,
            parse_math=False,
        )
        if not correct:
            axes.set_xlabel(f"is {short(true, 16)}", color=INK, fontsize=9, parse_math=False)
    for axes in grid:
        axes.set_axis_off()
    return figure
