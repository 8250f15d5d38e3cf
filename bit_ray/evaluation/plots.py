"""Pictures of results, as matplotlib figures that touch no global state."""

import io
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from bit_ray.errors import ConfigError
from bit_ray.locks import partial

if TYPE_CHECKING:  # PyTorch comes with it
    from bit_ray.evaluation.metrics import Calibration

_INK, _GRAY, _GRID = "#1f2933", "#7b8794", "#e4e7eb"
_SERIES = ("#0b6e99", "#d9730d", "#6b4fa0", "#2f855a", "#b83280")  # apart in lightness too
_RIGHT, _WRONG = "#2f855a", "#c53030"
_BLUES = LinearSegmentedColormap.from_list("paper_to_blue", ["#ffffff", "#9fd0e3", "#0b6e99", "#06364d"])
_MAX_NUMBERED_CLASSES, _MAX_LABELLED_CLASSES, _MAX_CELLS, _NUM_CONFUSIONS = 15, 30, 150, 12


def confusion_figure(
    confusion: npt.NDArray[np.integer[Any]], class_names: Sequence[str], title: str = "Confusion"
) -> Figure:
    """Draw a confusion table, each row in per cent of its true class.

    Up to 15 classes the cells carry numbers, up to 30 the axes carry names; beyond that the most frequent confusions
    are listed beside the table, and beyond 150 a cell stands for a block of classes.

    Args:
        confusion: ``[C, C]`` counts, rows true and columns predicted.
        class_names: The C names.
        title: Heading.
    """
    confusion = np.asarray(confusion)
    num_classes = len(class_names)
    assert confusion.shape == (num_classes, num_classes)
    totals = confusion.sum(axis=1, keepdims=True)
    share = np.divide(confusion, totals, out=np.zeros(confusion.shape), where=totals > 0)
    few = num_classes <= _MAX_LABELLED_CLASSES
    side = float(np.clip(2.6 + 0.36 * num_classes, 4.5, 9.5)) if few else 6.8
    figure = Figure(figsize=(side + 0.9, side) if few else (side + 4.2, side), layout="constrained")
    axes, *beside = figure.subplots(1, 1 if few else 2, squeeze=False, width_ratios=[1] if few else [7, 3])[0]
    # The largest share stands for a block of classes, as a single cell of hundreds would be too small to be seen.
    block = -(-num_classes // _MAX_CELLS)
    starts = np.arange(0, num_classes, block)
    cells = np.maximum.reduceat(np.maximum.reduceat(share, starts, axis=0), starts, axis=1)
    # The root brings out errors of a few per cent, which a linear scale would leave white.
    end = len(starts) * block - 0.5
    picture = axes.imshow(
        cells, cmap=_BLUES, norm=PowerNorm(0.5, 0, 1), interpolation="nearest", extent=(-0.5, end, end, -0.5)
    )
    bar = figure.colorbar(picture, ax=axes, fraction=0.046, pad=0.02, format=PercentFormatter(1, decimals=0))
    of_block = f", largest of {block} x {block} cells" if block > 1 else ""
    bar.set_label(f"share of the true class{of_block}", color=_INK)
    bar.set_ticks([0, 0.05, 0.25, 0.5, 1])
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, colors=_INK)
    accuracy = np.trace(confusion) / max(confusion.sum(), 1)
    _heading(axes, title, f"{int(confusion.sum()):,} examples, {accuracy:.1%} right")
    axes.set_xlabel("predicted", color=_INK)
    axes.set_ylabel("true", color=_INK)
    axes.tick_params(length=0, colors=_INK)
    for spine in axes.spines.values():
        spine.set_color(_GRID)
    if few:
        names = [_short(name, 18) for name in class_names]
        long = max(len(name) for name in names) > 3
        axes.set_xticks(range(num_classes), names, rotation=90 if long else 0, parse_math=False)
        axes.set_yticks(range(num_classes), names, parse_math=False)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("predicted class number", color=_INK)
        axes.set_ylabel("true class number", color=_INK)
        _list_confusions(beside[0], confusion, class_names)
    if num_classes <= _MAX_NUMBERED_CLASSES:
        for row, column in np.argwhere(confusion > 0):
            color = "white" if share[row, column] > 0.3 else _INK
            axes.text(column, row, f"{confusion[row, column]}", ha="center", va="center", color=color, fontsize=9)
    return figure


def curve_figure(
    steps: Sequence[int],
    loss: Sequence[float],
    lr: Sequence[float],
    evaluations: Sequence[tuple[int, float]] = (),
    title: str = "Training",
) -> Figure:
    """Draw loss and learning rate, and top-1 where it was evaluated, against the step.

    Args:
        steps: The logged steps, ascending.
        loss: Training loss at these steps, nats per image.
        lr: Learning rate at these steps; 0, as at the first step of a warm-up, has no place on the logarithmic axis.
        evaluations: (step, top-1 as a fraction of 1), ascending.
        title: Heading.
    """
    assert len(steps) == len(loss) == len(lr)
    heights = [3.0, *([2.0] if evaluations else []), 1.4]
    figure = Figure(figsize=(7.5, 1.1 + sum(heights)), layout="constrained")
    panels = list(figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0])
    values = np.asarray(loss, np.float64)
    window = len(values) // 25 | 1
    panels[0].plot(steps, values, color=_SERIES[0], alpha=0.3 if window > 1 else 1.0, linewidth=1)
    if window > 1:
        panels[0].plot(steps, _moving_average(values, window), color=_SERIES[0], linewidth=2)
    _heading(panels[0], title, f"thick line: mean of {window} values" if window > 1 else "")
    panels[0].set_ylabel("training loss (nats)", color=_INK)
    if evaluations:
        at, top_1 = zip(*evaluations, strict=True)
        panels[1].plot(at, top_1, color=_SERIES[1], linewidth=2, marker="o", markersize=4)
        panels[1].yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g}"))
        panels[1].set_ylabel("top-1 (%)", color=_INK)
        _note(panels[1], (at[-1], top_1[-1]), f"{top_1[-1]:.1%}", _SERIES[1], (-24, -14))
    rate = np.asarray(lr, np.float64)
    positive = rate > 0
    panels[-1].plot(np.asarray(steps)[positive], rate[positive], color=_INK, linewidth=1.5)
    if positive.any():
        panels[-1].set_yscale("log")
    panels[-1].set_ylabel("learning rate", color=_INK)
    panels[-1].set_xlabel("optimizer step", color=_INK)
    panels[-1].xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    for panel in panels:
        _bare(panel)
    figure.align_ylabels(panels)
    return figure


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """Accuracies of one method with one number of examples per class."""

    series: str
    """Name of the method, as ``pre-trained``."""
    k: int
    """Examples per class."""
    values: tuple[float, ...]
    """Accuracy of every repeat, fractions of 1."""


def comparison_figure(rows: Sequence[ComparisonRow], title: str = "Few-shot accuracy", subtitle: str = "") -> Figure:
    """Draw the accuracy of each method for each number of examples per class: medians, and a dot for every repeat.

    Args:
        rows: One per method and k; methods are coloured in order of appearance, at most five. With two methods, the
            first's lead in points is written between the medians.
        title: Heading.
        subtitle: Second line, as the data sets and the number of repeats.
    """
    assert rows
    series = list(dict.fromkeys(row.series for row in rows))
    assert len(series) <= len(_SERIES)
    ks = sorted({row.k for row in rows})
    figure = Figure(figsize=(max(6.4, 2.2 + 1.6 * len(ks)), 4.6), layout="constrained")
    axes = figure.add_subplot()
    medians: dict[tuple[str, int], float] = {}
    spread = 0.07
    for index, name in enumerate(series):
        color = _SERIES[index]
        mine = {row.k: row.values for row in rows if row.series == name}
        for k, values in mine.items():
            center = ks.index(k)
            medians[name, k] = float(np.median(values))
            # Repeats side by side in their order, so that equal ones do not hide each other.
            offsets = np.linspace(-spread, spread, len(values)) if len(values) > 1 else [0.0]
            axes.scatter(
                center + np.asarray(offsets), values, s=26, color=color, edgecolors="white", linewidths=0.7, zorder=5
            )
            axes.hlines(medians[name, k], center - 0.13, center + 0.13, color=color, linewidth=3, alpha=0.8, zorder=4)
        line = [(ks.index(k), medians[name, k]) for k in sorted(mine)]
        axes.plot(*zip(*line, strict=True), color=color, linewidth=1.4, alpha=0.6, zorder=2)
    for at, k in enumerate(ks):
        present = sorted((name for name in series if (name, k) in medians), key=lambda name: -medians[name, k])
        for place, name in enumerate(present):
            above = place == 0
            repeats = next(row.values for row in rows if (row.series, row.k) == (name, k))
            edge = max(repeats) if above else min(repeats)
            color = _SERIES[series.index(name)]
            _note(axes, (at, edge), f"{100 * medians[name, k]:.1f}", color, (0, 13 if above else -13))
        if len(series) == 2 and len(present) == 2:
            first, second = (medians[name, k] for name in series)
            axes.annotate(
                "", (at + 0.21, first), (at + 0.21, second), arrowprops={"arrowstyle": "->", "color": _GRAY, "lw": 1}
            )
            axes.text(
                at + 0.25,
                (first + second) / 2,
                f"{100 * (first - second):+.1f}",
                color=_GRAY,
                va="center",
                fontsize=9,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            )
    everything = [value for row in rows for value in row.values]
    low, high = min(everything), max(everything)
    margin = max(0.15 * (high - low), 0.02)
    axes.set_ylim(max(0.0, low - margin), min(1.04, high + margin))
    axes.set_xlim(-0.45, len(ks) - 1 + 0.55)
    axes.set_xticks(range(len(ks)), [f"{k}" for k in ks])
    axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g}"))
    axes.set_xlabel("training examples per class", color=_INK)
    axes.set_ylabel("top-1 accuracy (%)", color=_INK)
    handles = [axes.plot([], [], color=_SERIES[i], linewidth=3, label=name)[0] for i, name in enumerate(series)]
    figure.legend(handles=handles, frameon=False, loc="outside lower center", ncols=len(series), labelcolor=_INK)
    _heading(axes, title, subtitle or "bar: median, dots: every repeat")
    _bare(axes)
    return figure


def few_shot_figure(
    panels: Mapping[str, Sequence[ComparisonRow]], title: str = "Few-shot accuracy", subtitle: str = ""
) -> Figure:
    """Draw accuracy against examples per class as the paper's Figure 2: curves of the median, a dot for every repeat.

    Args:
        panels: Heading -> one row per method and k; panels share their axes, and a method has one colour in all of
            them, by order of appearance, at most five.
        title: Heading of the whole.
        subtitle: Second line, as the data sets and the number of repeats.
    """
    assert panels
    everything = [row for rows in panels.values() for row in rows]
    series = list(dict.fromkeys(row.series for row in everything))
    assert len(series) <= len(_SERIES)
    ks = sorted({row.k for row in everything})
    columns = min(len(panels), 2) if len(panels) != 3 else 3
    num_rows = -(-len(panels) // columns)
    figure = Figure(figsize=(max(6.4, 4.6 * columns), 1.0 + 3.8 * num_rows), layout="constrained")
    grid = figure.subplots(num_rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, (heading, rows) in zip(grid.flat, panels.items(), strict=False):
        for row in rows:
            color = _SERIES[series.index(row.series)]
            axes.scatter([row.k] * len(row.values), row.values, s=14, color=color, alpha=0.45, linewidths=0, zorder=3)
        for name in dict.fromkeys(row.series for row in rows):
            line = sorted((row.k, float(np.median(row.values))) for row in rows if row.series == name)
            color = _SERIES[series.index(name)]
            axes.plot(*zip(*line, strict=True), color=color, linewidth=2, marker="o", markersize=4, zorder=4)
        axes.set_xscale("log")
        axes.set_xticks(ks, [f"{k}" for k in ks])
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g}"))
        if heading:
            axes.set_title(heading, loc="left", color=_INK, fontsize=10)
        _bare(axes)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    for axes in grid[-1]:
        axes.set_xlabel("training examples per class", color=_INK)
    for axes in grid[:, 0]:
        axes.set_ylabel("top-1 accuracy (%)", color=_INK)
    handles = [grid[0, 0].plot([], [], color=_SERIES[i], linewidth=3, label=name)[0] for i, name in enumerate(series)]
    figure.legend(handles=handles, frameon=False, loc="outside lower center", ncols=len(series), labelcolor=_INK)
    text = f"{title}\n{subtitle or 'line: median, dots: every repeat'}"
    figure.suptitle(text, x=0.01, ha="left", color=_INK, fontsize=11)
    return figure


def reliability_figure(calibration: "Calibration", title: str = "Reliability") -> Figure:
    """Draw accuracy against confidence, the gap between the two, and how many predictions each bin has.

    Args:
        calibration: As `ClassificationMetrics.calibration` returns it.
        title: Heading.
    """
    figure = Figure(figsize=(5.6, 6.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    left, width = calibration.edges[:-1], np.diff(calibration.edges)
    used = calibration.counts > 0
    accuracy, confidence = calibration.accuracy[used], calibration.confidence[used]
    style: dict[str, Any] = {"width": 0.94 * width[used], "align": "center"}
    centers = (left + width / 2)[used]
    above.plot([0, 1], [0, 1], color=_GRAY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    above.bar(centers, accuracy, color=_SERIES[0], label="accuracy", zorder=2, **style)
    above.bar(
        centers,
        confidence - accuracy,
        bottom=accuracy,
        color=_WRONG,
        alpha=0.25,
        edgecolor=_WRONG,
        label="gap to the mean confidence",
        zorder=3,
        **style,
    )
    above.set_xlim(0, 1)
    above.set_ylim(0, 1)
    above.set_ylabel("accuracy", color=_INK)
    above.legend(frameon=False, loc="upper left", labelcolor=_INK)
    total = calibration.counts.sum()
    share = calibration.counts[used] / total
    below.bar(centers, share, color=_GRAY, **style)
    below.set_ylabel("predictions", color=_INK)
    below.set_xlabel("confidence: probability of the predicted class", color=_INK)
    for axes in (above, below):
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        _bare(axes)
    below.yaxis.set_major_locator(MaxNLocator(3))
    below.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    mean_accuracy, mean_confidence = (float(values @ share) for values in (accuracy, confidence))
    subtitle = (
        f"ECE {calibration.error:.1%} in {len(width)} bins · accuracy {mean_accuracy:.1%}, confidence "
        f"{mean_confidence:.1%} · {total:,} predictions"
    )
    _heading(above, title, subtitle)
    figure.align_ylabels([above, below])
    return figure


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
        tally: Whether the heading goes on with how many are right.
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
        color=_INK,
        weight="bold",
        fontsize=12,
    )
    grid: Iterator[Axes] = iter(figure.subplots(num_rows, columns, squeeze=False).flat)
    for image, true, (predicted, probability) in zip(images, true_names, predictions, strict=True):
        axes = next(grid)
        correct = true == predicted
        # Small images keep their pixels; only large ones are smoothed.
        axes.imshow(image, interpolation="nearest" if max(image.shape[:2]) < 96 else "auto")
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set(color=_RIGHT if correct else _WRONG, linewidth=3)
        # The mark tells right from wrong without the colour.
        axes.set_title(
            f"{'✓' if correct else '✗'} {_short(predicted, 14)}  {probability:.0%}",
            color=_RIGHT if correct else _WRONG,
            fontsize=9,
            parse_math=False,
        )
        if not correct:
            axes.set_xlabel(f"is {_short(true, 16)}", color=_INK, fontsize=9, parse_math=False)
    for axes in grid:
        axes.set_axis_off()
    return figure


def save_figure(figure: Figure, path: str | Path, dpi: int = 150) -> None:
    """Write a figure in the format of the path's suffix (png, svg, pdf), whole or not at all.

    Raises:
        ConfigError: an unknown suffix, or a folder that cannot be written.
    """
    path = Path(path)
    canvas = FigureCanvasAgg(figure)
    kinds = sorted(canvas.get_supported_filetypes())
    if path.suffix[1:] not in kinds:
        raise ConfigError(f"{path}: unknown kind of picture; one of {', '.join(kinds)}; rename it to end in .png")
    content = io.BytesIO()
    with warnings.catch_warnings():
        # A class name in a script without a font is drawn as a box; that is no news for whoever reads the log.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(content, format=path.suffix[1:], dpi=dpi, facecolor="white")
    try:
        with partial(path) as unfinished:
            unfinished.write_bytes(content.getvalue())
            os.replace(unfinished, path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); choose a writable folder") from None


def _list_confusions(axes: Axes, confusion: npt.NDArray[Any], class_names: Sequence[str]) -> None:
    """Write the most frequent confusions beside a table of many classes."""
    axes.set_axis_off()
    errors = confusion.copy()
    np.fill_diagonal(errors, 0)
    order = np.argsort(-errors, axis=None, kind="stable")[:_NUM_CONFUSIONS]
    pairs = [divmod(int(cell), len(class_names)) for cell in order if errors.flat[cell] > 0]
    axes.text(0, 0.97, "Most frequent confusions", weight="bold", color=_INK, transform=axes.transAxes, va="top")
    for line, (true, predicted) in enumerate(pairs):
        height = 0.91 - 0.07 * line
        text = f"{_short(class_names[true], 20)} → {_short(class_names[predicted], 20)}"
        axes.text(0.09, height, text, fontsize=9, color=_INK, transform=axes.transAxes, va="top", parse_math=False)
        axes.text(
            0.06,
            height,
            f"{errors[true, predicted]}",
            fontsize=9,
            color=_GRAY,
            transform=axes.transAxes,
            va="top",
            ha="right",
        )
    if not pairs:
        axes.text(0, 0.91, "none", fontsize=9, color=_GRAY, transform=axes.transAxes, va="top")


def _moving_average(values: npt.NDArray[np.float64], window: int) -> npt.NDArray[np.float64]:
    """Mean of the ``window`` values around each, of fewer at the ends."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    at = np.arange(len(values))
    starts, ends = np.maximum(0, at - window // 2), np.minimum(len(values), at + window // 2 + 1)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _heading(axes: Axes, title: str, subtitle: str) -> None:
    axes.set_title(title, loc="left", color=_INK, weight="bold", fontsize=12, pad=20 if subtitle else 8)
    if subtitle:
        axes.annotate(
            subtitle,
            (0, 1),
            xytext=(0, 6),
            xycoords="axes fraction",
            textcoords="offset points",
            color=_GRAY,
            fontsize=9,
        )


def _note(axes: Axes, point: tuple[float, float], text: str, color: str, offset: tuple[float, float]) -> None:
    style: dict[str, Any] = {"color": color, "weight": "bold", "ha": "center", "va": "center"}
    axes.annotate(text, point, xytext=offset, textcoords="offset points", fontsize=10, **style)


def _bare(axes: Axes) -> None:
    """Light horizontal grid, no frame."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRAY)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=_INK, length=0)


def _short(name: str, length: int) -> str:
    """The name, its middle left out where it is long: the ends are what tells class names apart."""
    if len(name) <= length:
        return name
    head = length // 2
    return f"{name[:head]}…{name[head + 1 - length :]}"
