"""Which classes are confused with which."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from bit_ray.plots.style import BLUES, GRAY, GRID, INK, heading, short

_MAX_NUMBERED_CLASSES, _MAX_LABELLED_CLASSES, _MAX_CELLS, _NUM_CONFUSIONS = 15, 30, 150, 12


def confusion_figure(confusion: npt.NDArray[np.integer[Any]], class_names: Sequence[str]) -> Figure:
    """Draw a confusion table, each row in per cent of its true class.

    Up to 15 classes the cells have numbers, up to 30 the axes have names. Above that the most frequent confusions are
    listed next to the table, and above 150 a cell is a block of classes.

    Args:
        confusion: ``[C, C]`` counts, rows true and columns predicted.
        class_names: The C names.
    """
    confusion = np.asarray(confusion)
    num_classes = len(class_names)
    assert confusion.shape == (num_classes, num_classes)
    totals = confusion.sum(axis=1, keepdims=True)
    share = np.divide(confusion, totals, out=np.zeros(confusion.shape), where=totals > 0)
    few = num_classes <= _MAX_LABELLED_CLASSES
    side = float(np.clip(2.6 + 0.36 * num_classes, 4.5, 9.5)) if few else 6.8
    figure = Figure(figsize=(side + 0.9, side) if few else (side + 4.2, side), layout="constrained")
    axes, *right = figure.subplots(1, 1 if few else 2, squeeze=False, width_ratios=[1] if few else [7, 3])[0]
    # A block of classes shows its largest share, as a single cell of hundreds would be too small to see.
    block = -(-num_classes // _MAX_CELLS)
    starts = np.arange(0, num_classes, block)
    cells = np.maximum.reduceat(np.maximum.reduceat(share, starts, axis=0), starts, axis=1)
    # The square root makes errors of a few per cent visible; on a linear scale they would be white.
    end = len(starts) * block - 0.5
    picture = axes.imshow(
        cells, cmap=BLUES, norm=PowerNorm(0.5, 0, 1), interpolation="nearest", extent=(-0.5, end, end, -0.5)
    )
    bar = figure.colorbar(picture, ax=axes, fraction=0.046, pad=0.02, format=PercentFormatter(1, decimals=0))
    of_block = f", largest of {block} x {block} cells" if block > 1 else ""
    bar.set_label(f"share of the true class{of_block}", color=INK)
    bar.set_ticks([0, 0.05, 0.25, 0.5, 1])
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, colors=INK)
    accuracy = np.trace(confusion) / max(confusion.sum(), 1)
    heading(axes, "Confusion", f"{int(confusion.sum()):,} examples, {accuracy:.1%} right")
    axes.set_xlabel("predicted", color=INK)
    axes.set_ylabel("true", color=INK)
    axes.tick_params(length=0, colors=INK)
    for spine in axes.spines.values():
        spine.set_color(GRID)
    if few:
        names = [short(name, 18) for name in class_names]
        long = max(len(name) for name in names) > 3
        axes.set_xticks(range(num_classes), names, rotation=90 if long else 0, parse_math=False)
        axes.set_yticks(range(num_classes), names, parse_math=False)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("predicted class number", color=INK)
        axes.set_ylabel("true class number", color=INK)
        _list_confusions(right[0], confusion, class_names)
    if num_classes <= _MAX_NUMBERED_CLASSES:
        for row, column in np.argwhere(confusion > 0):
            color = "white" if share[row, column] > 0.3 else INK
            axes.text(column, row, f"{confusion[row, column]}", ha="center", va="center", color=color, fontsize=9)
    return figure


def _list_confusions(axes: Axes, confusion: npt.NDArray[Any], class_names: Sequence[str]) -> None:
    """Write the most frequent confusions next to a table of many classes."""
    axes.set_axis_off()
    errors = confusion.copy()
    np.fill_diagonal(errors, 0)
    order = np.argsort(-errors, axis=None, kind="stable")[:_NUM_CONFUSIONS]
    pairs = [divmod(int(cell), len(class_names)) for cell in order if errors.flat[cell] > 0]
    axes.text(0, 0.97, "Most frequent confusions", weight="bold", color=INK, transform=axes.transAxes, va="top")
    for line, (true, predicted) in enumerate(pairs):
        height = 0.91 - 0.07 * line
        text = f"{short(class_names[true], 20)} → {short(class_names[predicted], 20)}"
        axes.text(0.09, height, text, fontsize=9, color=INK, transform=axes.transAxes, va="top", parse_math=False)
        axes.text(
            0.06,
            height,
            f"{errors[true, predicted]}",
            fontsize=9,
            color=GRAY,
            transform=axes.transAxes,
            va="top",
            ha="right",
        )
    if not pairs:
        axes.text(0, 0.91, "none", fontsize=9, color=GRAY, transform=axes.transAxes, va="top")
