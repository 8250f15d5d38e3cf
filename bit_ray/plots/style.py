"""Shared by all figures: colours, headings, and writing to a file. No global state of matplotlib is changed."""

import io
import warnings
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from bit_ray.errors import ConfigError
from bit_ray.locks import whole

INK, GRAY, GRID = "#1f2933", "#7b8794", "#e4e7eb"
SERIES = ("#0b6e99", "#d9730d", "#6b4fa0", "#2f855a", "#b83280")  # they also differ in lightness
RIGHT, WRONG = "#2f855a", "#c53030"
BLUES = LinearSegmentedColormap.from_list("paper_to_blue", ["#ffffff", "#9fd0e3", "#0b6e99", "#06364d"])


def save_figure(figure: Figure, path: str | Path, dpi: int | Literal["figure"] = 150) -> None:
    """Write a figure in the format of the path's suffix (png, svg, pdf), completely or not at all.

    Raises:
        ConfigError: An unknown suffix, or a folder that cannot be written.
    """
    path = Path(path)
    canvas = FigureCanvasAgg(figure)
    kinds = sorted(canvas.get_supported_filetypes())
    if path.suffix[1:] not in kinds:
        raise ConfigError(f"{path}: unknown kind of picture; accepted: {', '.join(kinds)}; rename it to end in .png")
    content = io.BytesIO()
    with warnings.catch_warnings():
        # A class name in a script without a font is drawn as a box; the log need not say so.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(content, format=path.suffix[1:], dpi=dpi, facecolor="white")
    try:
        with whole(path) as unfinished:
            unfinished.write_bytes(content.getvalue())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); choose a writable folder") from None


def heading(axes: Axes, title: str, subtitle: str) -> None:
    """Write a title and a smaller second line above the axes."""
    axes.set_title(title, loc="left", color=INK, weight="bold", fontsize=12, pad=20 if subtitle else 8)
    if subtitle:
        axes.annotate(
            subtitle,
            (0, 1),
            xytext=(0, 6),
            xycoords="axes fraction",
            textcoords="offset points",
            color=GRAY,
            fontsize=9,
        )


def note(axes: Axes, point: tuple[float, float], text: str, color: str, offset: tuple[float, float]) -> None:
    """Write a number next to a point; the offset is in typographic points."""
    style: dict[str, Any] = {"color": color, "weight": "bold", "ha": "center", "va": "center"}
    axes.annotate(text, point, xytext=offset, textcoords="offset points", fontsize=10, **style)


def bare(axes: Axes) -> None:
    """Light horizontal grid, no frame."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRAY)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=INK, length=0)


def short(name: str, length: int) -> str:
    """Return the name, without its middle if it is long: the ends distinguish class names."""
    if len(name) <= length:
        return name
    head = length // 2
    return f"{name[:head]}…{name[head + 1 - length :]}"
