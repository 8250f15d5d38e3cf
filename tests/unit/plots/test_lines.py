import csv
import io
import math

import numpy as np
import pytest

from bit_ray.errors import ConfigError
from bit_ray.plots.lines import Line, LinePlot, line_csv, line_figure, plain

NAN = math.nan


def plot(*lines, **settings):
    given = {"name": "p", "title": "Loss falls", "x_label": "step", "y_label": "loss (nats)"} | settings
    return LinePlot(lines=lines, **given)


def falling(label, end, **settings):
    return Line(label=label, x=(0, 50, 100), y=(1.0, (1 + end) / 2, end), **settings)


def texts(axes):
    return [text.get_text() for text in axes.texts]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def extents(figure):
    """Place of the names in the picture, and that of the axes."""
    figure.draw_without_rendering()
    [axes] = figure.axes
    found = [*axes.texts, *(figure.legends[0].get_texts() if figure.legends else ())]
    return [text.get_window_extent() for text in found], axes.get_window_extent()


def test_lines_have_what_was_given_and_differ_without_colour():
    lines = [falling(f"line {i}", i / 10) for i in range(8)]
    axes = line_figure(plot(*lines)).axes[0]
    assert [drawn.get_ydata().tolist() for drawn in axes.lines] == [list(line.y) for line in lines]
    assert len({drawn.get_color() for drawn in axes.lines}) == 8
    assert len({(drawn.get_marker(), drawn.get_linestyle(), drawn._unscaled_dash_pattern) for drawn in axes.lines}) == 8
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "loss (nats)")


def test_names_stand_at_the_ends_where_these_are_apart():
    figure = line_figure(plot(falling("a", 0.2), falling("b", 0.6)))
    assert texts(figure.axes[0]) == ["a", "b"]
    assert not figure.legends
    names, axes = extents(figure)
    assert all(name.x0 >= axes.x1 for name in names)
    for name, y in zip(names, (0.2, 0.6), strict=True):
        assert (name.y0 + name.y1) / 2 == pytest.approx(figure.axes[0].transData.transform((0, y))[1], abs=5)


@pytest.mark.parametrize(
    "other",
    [
        falling("b", 0.21),
        Line(label="b", x=(0, 50), y=(1.0, 0.6)),
        Line(label="b", x=(0, 100), y=(NAN, NAN)),
        falling("b", 0.6, points=True),
        falling("a long name that takes much of the width", 0.6),
    ],
    ids=["ends are near", "ends before", "has no end", "points", "long"],
)
def test_names_are_in_a_legend_outside_the_axes_otherwise(other):
    figure = line_figure(plot(falling("_a", 0.2), other))
    assert legend(figure) == ["_a", other.label]
    assert texts(figure.axes[0]) == []
    names, axes = extents(figure)
    assert all(name.y1 <= axes.y0 for name in names)


def test_a_band_lies_between_low_and_high():
    axes = line_figure(plot(falling("a", 0.2, low=(0.9, 0.5, 0.1), high=(1.1, 0.7, 0.3)))).axes[0]
    [band] = axes.collections
    corners = {(float(x), float(y)) for x, y in band.get_paths()[0].vertices}
    assert corners == {(0, 0.9), (50, 0.5), (100, 0.1), (0, 1.1), (50, 0.7), (100, 0.3)}
    assert band.get_alpha() == pytest.approx(0.2)


def test_points_have_error_bars_and_stand_side_by_side():
    mark = {"x": (3.0,), "y": (0.5,), "low": (0.4,), "high": (0.7,), "points": True}
    figure = line_figure(plot(Line(label="a", **mark), Line(label="b", **mark)))
    [axes] = figure.axes
    assert [bars.get_segments()[0].tolist() for bars in axes.collections] == [[[3, 0.4], [3, 0.7]]] * 2
    assert [drawn.get_linestyle() for drawn in axes.lines] == ["None", "None"]
    figure.draw_without_rendering()
    centers = [drawn.get_transform().transform((3, 0.5))[0] for drawn in axes.lines]
    assert centers[1] - centers[0] == pytest.approx(5 * figure.dpi / 72)
    assert [bars.get_transform().transform((3, 0.5))[0] for bars in axes.collections] == pytest.approx(centers)
    low, high = axes.get_xlim()
    assert (low, high) == pytest.approx((3, 3), abs=0.5)


def test_numbers_that_are_not_finite_are_gaps():
    line = Line(label="a", x=(0, 1, NAN, 3, 4), y=(1, math.inf, 2, -math.inf, 1e308), low=(NAN,) * 5, high=(2,) * 5)
    axes = line_figure(plot(line)).axes[0]
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [1, NAN, 2, NAN, NAN])
    assert np.isfinite([*axes.get_xlim(), *axes.get_ylim()]).all()
    assert not axes.collections


def test_numbers_that_are_not_positive_are_gaps_on_logarithmic_axes():
    line = Line(label="a", x=(0, 1, 10, 100), y=(1, 0, 3, 4))
    axes = line_figure(plot(line, log_x=True, log_y=True, verticals=((0, "never"), (10, "drop")))).axes[0]
    assert axes.get_xscale() == axes.get_yscale() == "log"
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), [NAN, 1, 10, 100])
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [1, NAN, 3, 4])
    assert texts(axes)[:1] == ["drop"]


@pytest.mark.parametrize("lines", [(), (Line(label="a", x=(), y=()),), (Line(label="a", x=(1.0,), y=(NAN,)),)])
def test_a_plot_without_numbers_says_so(lines):
    figure = line_figure(plot(*lines, log_x=True, log_y=True, verticals=((1.0, "drop"),)))
    assert texts(figure.axes[0]) == ["no data yet"]
    figure.draw_without_rendering()


@pytest.mark.parametrize(
    ("log", "values", "expected"),
    [
        (False, (0, 0.5), ["0", "0.1", "0.2", "0.3", "0.4", "0.5"]),
        (False, (0, 200_000), ["0", "50,000", "100,000", "150,000", "200,000"]),
        (True, (1, 1e6), ["1", "10", "100", "1,000", "10,000", "100,000", "1,000,000"]),
        (True, (1, 100), ["1", "2", "5", "10", "20", "50", "100"]),
        (True, (2000, 9000), ["2,000", "4,000", "6,000", "8,000"]),
    ],
)
def test_ticks_are_plain_numbers(log, values, expected):
    figure = line_figure(plot(Line(label="a", x=values, y=(1, 2)), log_x=log))
    figure.draw_without_rendering()
    [axes] = figure.axes
    low, high = axes.get_xlim()
    labels = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
    assert [label.get_text() for at, label in labels if low <= at <= high] == expected


def test_fractions_are_shown_as_per_cent():
    figure = line_figure(plot(Line(label="a", x=(0, 1), y=(0.5, 0.7)), percent_y=True))
    figure.draw_without_rendering()
    assert {"50%", "55%", "70%"} <= {label.get_text() for label in figure.axes[0].get_yticklabels()}


def test_labels_of_verticals_are_above_the_axes_and_apart():
    verticals = tuple((float(step), f"rate × 0.1 at {step}") for step in (300, 600, 900, 950))
    line = Line(label="a", x=(10.0, 100.0, 1000.0), y=(3.0, 2.0, 1.0))
    figure = line_figure(plot(line, log_x=True, verticals=verticals))
    assert texts(figure.axes[0])[:4] == [label for _, label in verticals]
    names, axes = extents(figure)
    labels = names[:4]
    assert all(label.y0 >= axes.y1 for label in labels)
    assert not any(one.overlaps(other) for i, one in enumerate(labels) for other in labels[:i])


@pytest.mark.parametrize("named", [texts, lambda axes: legend(axes.figure)], ids=["at the end", "in a legend"])
def test_texts_that_look_like_formulas_or_have_no_place_in_a_line_are_drawn(named):
    strange = "$\\bad{$\n\x00\ud800 http://me:secret@h"
    points = named is not texts
    figure = line_figure(
        plot(
            falling(strange, 0.2, points=points),
            title=strange,
            x_label=strange,
            y_label=strange,
            verticals=((1.0, strange),),
        )
    )
    figure.draw_without_rendering()
    assert plain(strange) == "$\\bad{$    http://***@h"
    [axes] = figure.axes
    assert [figure.get_suptitle(), axes.get_xlabel(), axes.get_ylabel(), *texts(axes)[:1]] == [plain(strange)] * 4
    assert named(axes)[-1] == plain(strange)


def test_csv_returns_the_numbers_unchanged():
    lines = (
        Line(label='a "b",\r\nc', x=(0.1, 1 / 3), y=(1e-300, math.pi), low=(NAN, -1.0), high=(math.inf, 4.0)),
        Line(label="", x=(1,), y=(2,)),
    )
    rows = list(csv.reader(io.StringIO(line_csv(plot(*lines)), newline=""), quoting=csv.QUOTE_NONNUMERIC))
    assert rows[0] == ["label", "x", "y", "low", "high"]
    assert repr(rows[1:]) == repr(
        [
            ['a "b",\r\nc', 0.1, 1e-300, NAN, math.inf],
            ['a "b",\r\nc', 1 / 3, math.pi, -1.0, 4.0],
            ["", 1.0, 2.0, "", ""],
        ]
    )


@pytest.mark.parametrize("sizes", [(2, 1, 0, 0), (1, 2, 0, 0), (2, 2, 1, 2), (2, 2, 2, 0), (2, 2, 0, 2), (0, 0, 1, 1)])
def test_columns_of_other_lengths_are_refused(sizes):
    x, y, low, high = ((0.0,) * size for size in sizes)
    with pytest.raises(ConfigError, match=rf"^line: 'a' has {sizes[0]} x, {sizes[1]} y, .*; accepted: as many of each"):
        Line(label="a", x=x, y=y, low=low, high=high)


@pytest.mark.parametrize("name", ["", "A", "a b", "a/b", "../a", "a\n", "ä", "a_b"])
def test_names_that_are_no_file_names_are_refused(name):
    with pytest.raises(ConfigError, match="^name: .*small letters, digits and hyphens; rename"):
        plot(name=name)


def test_what_was_measured_once_is_a_row_for_each_with_its_whole_name():
    lines = tuple(
        Line(label=f"mixup_alpha 0.1, dropout 0.5, weight_decay 0.001, shots {i} $x$", x=(100.0,), y=(i / 20,),
             low=(i / 20 - 0.02,), high=(i / 20 + 0.02,))
        for i in range(16)
    )  # fmt: skip
    plot = LinePlot(name="p", title="Accuracy", x_label="step", y_label="top-1", lines=lines, percent_y=True)
    figure = line_figure(plot)
    [axes] = figure.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == [line.label for line in lines]
    [marks] = axes.lines
    assert [float(x) for x in marks.get_xdata()] == [line.y[0] for line in lines]
    assert axes.get_xlabel() == "top-1"
    assert not figure.legends
    figure.savefig(io.BytesIO())
