"""Lines with bands, or single marks with error bars, against a number; the same numbers as CSV."""

import csv
import io
import re
import textwrap
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from bit_ray.errors import ConfigError, brief
from bit_ray.plots.style import GRAY, GRID, INK, bare, short
from bit_ray.uris import shown

# Okabe and Ito's palette in its order; only yellow, which is hard to see on white, is last.
_COLORS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#F0E442")
# Their numbers have no common divisor, so that a combination repeats only after hundreds of lines.
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("solid", (0, (5, 2)), (0, (1, 1.5)), (0, (7, 2, 1.5, 2)), (0, (3, 1, 1, 1, 1, 1)))
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a plot."""

    label: str
    """What it is, a few words."""
    x: tuple[float, ...]
    """Where; a number that is not finite, or not positive on a logarithmic axis, is a gap."""
    y: tuple[float, ...]
    """Value at each x."""
    low: tuple[float, ...] = ()
    """Lower end of the interval of each y; empty: no intervals."""
    high: tuple[float, ...] = ()
    """Upper end."""
    points: bool = False
    """Single marks with error bars instead of a line with a band."""

    def __post_init__(self) -> None:
        ends = {len(self.low), len(self.high)}
        if len(self.x) != len(self.y) or (ends != {0} and ends != {len(self.x)}):
            given = ", ".join(f"{len(getattr(self, name))} {name}" for name in ("x", "y", "low", "high"))
            raise ConfigError.of("line", f"{brief(self.label)} has {given}", "as many of each, or neither low nor high")


@dataclass(frozen=True, kw_only=True)
class LinePlot:
    """Lines over common axes."""

    name: str
    """File name without suffix: small letters, digits and hyphens."""
    title: str
    """What one sees, a sentence."""
    x_label: str
    """Quantity and unit."""
    y_label: str
    """Quantity and unit."""
    lines: tuple[Line, ...]
    """In the order of their colours and of the legend."""
    log_x: bool = False
    """Whether x is on a logarithmic axis."""
    log_y: bool = False
    """Whether y is on a logarithmic axis."""
    percent_y: bool = False
    """Whether y is a fraction of 1, shown as per cent."""
    caption: str = ""
    """What else a reader must know, written below the plot in a report."""
    verticals: tuple[tuple[float, str], ...] = ()
    """x and label of what happens at one x, such as a drop of the learning rate."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9-]+", self.name):
            raise ConfigError.of("name", brief(self.name), "small letters, digits and hyphens", "rename the plot")


def plain(text: str) -> str:
    """Return a text as figures and reports show it: on one line, without control characters and secrets of URIs."""
    return _CONTROL.sub(" ", shown(text))


def line_csv(plot: LinePlot) -> str:
    """Return the numbers of a plot as CSV with the columns label, x, y, low and high; floats keep all their digits."""
    content = io.StringIO()
    writer = csv.writer(content, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerow(("label", "x", "y", "low", "high"))
    for line in plot.lines:
        for i, x in enumerate(line.x):
            ends = (float(line.low[i]), float(line.high[i])) if line.low else ("", "")
            writer.writerow((shown(line.label), float(x), float(line.y[i]), *ends))
    return content.getvalue()


def line_figure(plot: LinePlot) -> Figure:
    """Draw a plot; its lines differ in colour, dashes and marker, and are named at their ends or in a legend below."""
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.add_subplot()
    title = textwrap.fill(short(plain(plot.title), 300), 76)
    figure.suptitle(title, x=0.01, ha="left", color=INK, weight="bold", fontsize=11, parse_math=False)
    if len(plot.lines) > 1 and all(len(line.x) == 1 and not line.points for line in plot.lines):
        _rows_of_marks(figure, axes, plot)
        return figure
    axes.set_xlabel(short(plain(plot.x_label), 90), color=INK, parse_math=False)
    axes.set_ylabel(short(plain(plot.y_label), 50), color=INK, parse_math=False)
    bare(axes)
    data = [
        (_drawn(line.x, plot.log_x), *(_drawn(values, plot.log_y) for values in (line.y, line.low, line.high)))
        for line in plot.lines
    ]
    present = [np.isfinite(x) & np.isfinite(y) for x, y, _, _ in data]
    if not any(there.any() for there in present):
        axes.text(0.5, 0.5, "no data yet", transform=axes.transAxes, ha="center", va="center", color=GRAY, fontsize=14)
        axes.set(xticks=[], yticks=[])
        return figure
    axes.set(xscale="log" if plot.log_x else "linear", yscale="log" if plot.log_y else "linear")
    axes.margins(x=0.03, y=0.07)
    handles = [_draw(axes, line, data[index], index, len(data)) for index, line in enumerate(plot.lines)]
    _mark(axes, [(x, plain(label)) for x, label in plot.verticals if np.isfinite(_drawn((x,), plot.log_x)).all()])
    _ticks(axes.xaxis, plot.log_x, percent=False)
    _ticks(axes.yaxis, plot.log_y, percent=plot.percent_y)
    ends = [(x[there][-1], y[there][-1]) for (x, y, _, _), there in zip(data, present, strict=True) if there.any()]
    at = _in_axes(axes, ends)
    names = [short(plain(line.label), 44) for line in plot.lines]
    # A name next to its line is read faster than a legend, but needs all ends at the right and a text's height apart.
    if (
        len(ends) == len(names)
        and not any(line.points for line in plot.lines)
        and np.ptp(at[:, 0]) < 0.01
        and (np.diff(np.sort(at[:, 1])) > 0.06).all()
        and max(map(len, names)) <= 28
    ):
        for name, (_, y) in zip(names, ends, strict=True):
            style: dict[str, Any] = {"color": INK, "fontsize": 9, "va": "center", "parse_math": False}
            axes.annotate(name, (1, y), (4, 0), ("axes fraction", "data"), "offset points", **style)
        return figure
    columns = 3 if max(map(len, names)) <= 22 else 2
    figure.set_size_inches(7.5, 4.6 + 0.2 * (len(names) // columns))
    options: dict[str, Any] = {"loc": "outside lower center", "ncols": columns, "handlelength": 3.2}
    legend = figure.legend(handles, names, frameon=False, labelcolor=INK, fontsize=9, **options)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _rows_of_marks(figure: Figure, axes: Axes, plot: LinePlot) -> None:
    """Draw what was measured once for each line: a row for each, with its name, its mark and its interval."""
    figure.set_size_inches(7.5, 1.4 + 0.24 * len(plot.lines))
    bare(axes)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    rows = np.arange(len(plot.lines))[::-1]
    values = np.array([_drawn(line.y, plot.log_y)[0] for line in plot.lines])
    ends = [(_drawn(line.low, plot.log_y)[0], _drawn(line.high, plot.log_y)[0]) for line in plot.lines if line.low]
    if len(ends) == len(rows):
        low, high = np.array(ends).T
        axes.hlines(rows, low, high, color=_COLORS[4], linewidth=1.8)
    axes.plot(values, rows, "o", color=_COLORS[4], markersize=6, markeredgecolor="white", markeredgewidth=0.6, zorder=4)
    axes.set(xscale="log" if plot.log_y else "linear", ylim=(-0.7, len(rows) - 0.3))
    axes.set_yticks(rows, [short(plain(line.label), 70) for line in plot.lines], fontsize=9)
    axes.set_xlabel(short(plain(plot.y_label), 90), color=INK, parse_math=False)
    _ticks(axes.xaxis, plot.log_y, percent=plot.percent_y)
    for text in axes.get_yticklabels():
        text.set_parse_math(False)


def _drawn(values: tuple[float, ...], log: bool) -> npt.NDArray[np.float64]:
    """Return the values, NaN for those that the axis cannot show; near the largest float matplotlib overflows."""
    array = np.asarray(values, np.float64)
    return np.where((array > (1e-100 if log else -1e100)) & (array < 1e100), array, np.nan)


def _draw(axes: Axes, line: Line, columns: tuple[npt.NDArray[np.float64], ...], index: int, total: int) -> Line2D:
    """Draw one of all lines, and return what stands for it in a legend."""
    x, y, low, high = columns
    color = _COLORS[index % len(_COLORS)]
    style: dict[str, Any] = {"color": color, "marker": _MARKERS[index % len(_MARKERS)], "markeredgecolor": "white"}
    # About 8 markers on a line of many points, not at the same x as those of the other lines.
    every = max(1, len(x) // 8)
    style |= {"markevery": (index * every // total, every), "linestyle": _DASHES[index % len(_DASHES)]}
    if line.points:
        style |= {"markevery": None, "linestyle": "none"}
    [drawn] = axes.plot(x, y, linewidth=1.8, markersize=6, markeredgewidth=0.6, zorder=4, **style)
    artists: list[Artist] = [drawn]
    if line.low and (np.isfinite(x) & np.isfinite(low) & np.isfinite(high)).any():
        if line.points:
            artists.append(axes.vlines(x, low, high, color=color, linewidth=1.6, zorder=3))
        else:
            # Many bands above each other would hide the lines.
            axes.fill_between(x, low, high, color=color, alpha=min(0.2, 0.6 / total), linewidth=0, zorder=2)
    if line.points:
        # Marks at one x stand side by side, 5 points apart, so that no error bar hides another.
        shift = ScaledTranslation(5 * (index - (total - 1) / 2) / 72, 0, axes.figure.dpi_scale_trans)
        for artist in artists:
            artist.set_transform(axes.transData + shift)
    return drawn


def _mark(axes: Axes, verticals: list[tuple[float, str]]) -> None:
    """Draw dotted lines at some x, each with its label above the axes, in as many rows as keep the labels apart."""
    for x, _ in verticals:
        axes.axvline(x, color=GRAY, linewidth=1, linestyle=":", zorder=1)
    row_ends: list[float] = []
    for x, label in sorted(verticals):
        text = short(label, 30)
        center = _in_axes(axes, [(x, axes.get_ylim()[0])])[0, 0]
        half = 0.0065 * len(text) + 0.005  # of the width of the axes, about
        row = next((i for i, end in enumerate(row_ends) if end < center - half), len(row_ends))
        row_ends[row : row + 1] = [center + half]
        style: dict[str, Any] = {"color": INK, "fontsize": 8, "ha": "center", "parse_math": False}
        axes.annotate(text, (x, 1), (0, 3 + 11 * row), ("data", "axes fraction"), "offset points", **style)


def _in_axes(axes: Axes, points: list[tuple[float, float]]) -> npt.NDArray[np.float64]:
    """Return where points are, in fractions of the axes."""
    axes.get_xlim(), axes.get_ylim()  # sets the limits by the data
    positions: npt.NDArray[np.float64] = (axes.transScale + axes.transLimits).transform(points)
    return positions


def _ticks(axis: Axis, log: bool, percent: bool) -> None:
    """Choose positions and texts of the ticks, without formulas."""
    axis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    if log:
        low, high = axis.get_view_interval()
        axis.set_minor_locator(NullLocator())
        if high > 10 * low:  # within one decade, the positions of a linear axis
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    scale, unit = (100, "%") if percent else (1, "")
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{scale * value:,.10g}{unit}"))
