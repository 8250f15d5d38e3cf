"""The report of a study as a value, and as pages: HTML in one file, Markdown with files of pictures and numbers."""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from bit_ray.errors import ConfigError, brief
from bit_ray.plots.lines import LinePlot, line_csv, line_figure, plain
from bit_ray.plots.page import render_page, steady_style, svg

_NUMBER = re.compile(r"[-+−±<>≤≥≈\[( ]*\.?\d")
_MARKDOWN = re.compile(r"[\\`*_\[\]<>&|~$#]")


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of texts."""

    title: str
    """What it lists."""
    header: tuple[str, ...]
    """Name of each column, with its unit."""
    rows: tuple[tuple[str, ...], ...]
    """One text per column; columns of numbers are aligned to the right."""
    note: str = ""
    """What else a reader must know, written below."""

    def __post_init__(self) -> None:
        wrong = [row for row in self.rows if len(row) != len(self.header)]
        if wrong or not self.header:
            given = f"{len(self.header)} columns" + (f", and a row of {len(wrong[0])}" if wrong else "")
            raise ConfigError.of(f"table {brief(self.title)}", given, "one or more columns, and rows of as many texts")

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Of each column, whether it has numbers, and besides only numbers and blanks."""
        columns = [[row[i].strip() for row in self.rows] for i in range(len(self.header))]
        return tuple(
            any(map(_NUMBER.match, cells)) and all(_NUMBER.match(cell) or cell in ("", "-", "–", "—") for cell in cells)
            for cells in columns
        )


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a study has found so far."""

    title: str
    """Name of the study."""
    command: str
    """How to run it again; may have several lines."""
    findings: tuple[str, ...]
    """Sentences: what was found, each with its interval."""
    tables: tuple[Table, ...] = ()
    """The numbers."""
    plots: tuple[LinePlot, ...] = ()
    """The figures; each name once."""
    paper: tuple[str, ...] = ()
    """Sentences: the paper's figures for comparison, and what differs."""
    missing: tuple[str, ...] = ()
    """Cells that are not done."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Value of each setting, by name."""

    def __post_init__(self) -> None:
        names = [plot.name for plot in self.plots]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError.of("plots", f"{', '.join(twice)} twice", "a name for each plot", "rename one")


def render(report: Report) -> dict[str, bytes]:
    """Return the files of a report, content by name; the same report gives the same bytes.

    They are ``report.html``, which needs no other file, and ``report.md`` with ``plots/NAME.png`` and
    ``plots/NAME.csv``. matplotlib's global settings are changed meanwhile, so this is not for several threads at once.
    """
    pictures: dict[str, bytes] = {}
    drawings: list[tuple[LinePlot, Markup]] = []
    for plot in report.plots:
        drawing, pictures[f"plots/{plot.name}.png"] = _draw(plot)
        drawings.append((plot, drawing))
        pictures[f"plots/{plot.name}.csv"] = line_csv(plot).encode("utf-8", "backslashreplace")
    page = render_page("studies/report.html.jinja", report=report, drawings=drawings)
    return {"report.html": page.encode(), "report.md": _markdown(report).encode(), **pictures}


def _draw(plot: LinePlot) -> tuple[Markup, bytes]:
    """A plot as SVG for a page of several, and as PNG."""
    png = io.BytesIO()
    with steady_style(plot.name):
        figure = line_figure(plot)
        figure.savefig(png, format="png", dpi=150, metadata={"Software": None})
        return svg(figure, plot.name, plot.title), png.getvalue()


def _markdown(report: Report) -> str:
    """The report for programs that show Markdown, its pictures by relative links."""
    blocks = [f"# {_escaped(report.title)}"]
    blocks += _items("Not finished", report.missing)
    blocks += _items("Findings", report.findings or ("Nothing is finished yet.",))
    for plot in report.plots:
        blocks += [f"## {_escaped(plot.title)}", f"![{_escaped(plot.title)}](plots/{plot.name}.png)"]
        blocks += [f"{_escaped(plot.caption)} [The numbers](plots/{plot.name}.csv)".strip()]
    for table in report.tables:
        blocks += [f"## {_escaped(table.title)}", _rows(table)]
        blocks += [_escaped(table.note)] if table.note else []
    blocks += _items("Beside the paper", report.paper)
    blocks += ["## Run it again", "\n".join(f"    {plain(line)}" for line in report.command.splitlines())]
    if report.settings:
        settings = Table(title="Settings", header=("setting", "value"), rows=tuple(report.settings.items()))
        blocks += ["<details><summary>Settings</summary>", _rows(settings), "</details>"]
    return "\n\n".join(blocks) + "\n"


def _items(heading: str, sentences: Sequence[str]) -> list[str]:
    """A list below a heading; nothing without sentences."""
    return [f"## {heading}", "\n".join(f"- {_escaped(sentence)}" for sentence in sentences)] if sentences else []


def _rows(table: Table) -> str:
    """A table in Markdown."""
    rule = ["---:" if numeric else "---" for numeric in table.numeric]
    lines: list[Iterable[str]] = [map(_escaped, table.header), rule, *(map(_escaped, row) for row in table.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(text: str) -> str:
    """A text on one line that Markdown shows as it is."""
    return _MARKDOWN.sub(r"\\\g<0>", plain(text).strip())
