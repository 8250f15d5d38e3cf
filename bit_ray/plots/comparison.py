"""Methods compared over the number of examples per class."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from bit_ray.plots.style import GRAY, INK, SERIES, bare, heading, note


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """Accuracies of one method with one number of examples per class."""

    series: str
    """Name of the method, such as ``pre-trained``."""
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
        subtitle: Second line, such as the data sets and the number of repeats.
    """
    assert rows
    series = list(dict.fromkeys(row.series for row in rows))
    assert len(series) <= len(SERIES)
    ks = sorted({row.k for row in rows})
    figure = Figure(figsize=(max(6.4, 2.2 + 1.6 * len(ks)), 4.6), layout="constrained")
    axes = figure.add_subplot()
    medians: dict[tuple[str, int], float] = {}
    spread = 0.07
    for index, name in enumerate(series):
        color = SERIES[index]
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
        for position, name in enumerate(present):
            above = position == 0
            repeats = next(row.values for row in rows if (row.series, row.k) == (name, k))
            edge = max(repeats) if above else min(repeats)
            color = SERIES[series.index(name)]
            note(axes, (at, edge), f"{100 * medians[name, k]:.1f}", color, (0, 13 if above else -13))
        if len(series) == 2 and len(present) == 2:
            first, second = (medians[name, k] for name in series)
            axes.annotate(
                "", (at + 0.21, first), (at + 0.21, second), arrowprops={"arrowstyle": "->", "color": GRAY, "lw": 1}
            )
            axes.text(
                at + 0.25,
                (first + second) / 2,
                f"{100 * (first - second):+.1f}",
                color=GRAY,
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
    axes.set_xlabel("training examples per class", color=INK)
    axes.set_ylabel("top-1 accuracy (%)", color=INK)
    handles = [axes.plot([], [], color=SERIES[i], linewidth=3, label=name)[0] for i, name in enumerate(series)]
    figure.legend(handles=handles, frameon=False, loc="outside lower center", ncols=len(series), labelcolor=INK)
    heading(axes, title, subtitle or "bar: median, dots: every repeat")
    bare(axes)
    return figure


def few_shot_figure(
    panels: Mapping[str, Sequence[ComparisonRow]], title: str = "Few-shot accuracy", subtitle: str = ""
) -> Figure:
    """Draw accuracy against examples per class as the paper's Figure 2: curves of the median, a dot for every repeat.

    Args:
        panels: Heading -> one row per method and k; panels share their axes, and a method has one colour in all of
            them, by order of appearance, at most five.
        title: Heading of the figure.
        subtitle: Second line, such as the data sets and the number of repeats.
    """
    assert panels
    everything = [row for rows in panels.values() for row in rows]
    series = list(dict.fromkeys(row.series for row in everything))
    assert len(series) <= len(SERIES)
    ks = sorted({row.k for row in everything})
    columns = min(len(panels), 2) if len(panels) != 3 else 3
    num_rows = -(-len(panels) // columns)
    figure = Figure(figsize=(max(6.4, 4.6 * columns), 1.0 + 3.8 * num_rows), layout="constrained")
    grid = figure.subplots(num_rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, (panel, rows) in zip(grid.flat, panels.items(), strict=False):
        for row in rows:
            color = SERIES[series.index(row.series)]
            axes.scatter([row.k] * len(row.values), row.values, s=14, color=color, alpha=0.45, linewidths=0, zorder=3)
        for name in dict.fromkeys(row.series for row in rows):
            line = sorted((row.k, float(np.median(row.values))) for row in rows if row.series == name)
            color = SERIES[series.index(name)]
            axes.plot(*zip(*line, strict=True), color=color, linewidth=2, marker="o", markersize=4, zorder=4)
        axes.set_xscale("log")
        axes.set_xticks(ks, [f"{k}" for k in ks])
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g}"))
        if panel:
            axes.set_title(panel, loc="left", color=INK, fontsize=10)
        bare(axes)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    for axes in grid[-1]:
        axes.set_xlabel("training examples per class", color=INK)
    for axes in grid[:, 0]:
        axes.set_ylabel("top-1 accuracy (%)", color=INK)
    handles = [grid[0, 0].plot([], [], color=SERIES[i], linewidth=3, label=name)[0] for i, name in enumerate(series)]
    figure.legend(handles=handles, frameon=False, loc="outside lower center", ncols=len(series), labelcolor=INK)
    text = f"{title}\n{subtitle or 'line: median, dots: every repeat'}"
    figure.suptitle(text, x=0.01, ha="left", color=INK, fontsize=11)
    return figure
