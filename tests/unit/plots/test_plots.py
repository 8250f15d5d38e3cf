import subprocess
import sys

import numpy as np
import pytest
from matplotlib.image import imread

from bit_ray.errors import ConfigError
from bit_ray.evaluation.metrics import Calibration
from bit_ray.plots.comparison import ComparisonRow, comparison_figure, few_shot_figure
from bit_ray.plots.confusion import confusion_figure
from bit_ray.plots.curves import curve_figure
from bit_ray.plots.predictions import prediction_figure
from bit_ray.plots.reliability import reliability_figure
from bit_ray.plots.style import save_figure


def confusion(num_classes, num_examples=2000):
    generator = np.random.default_rng(0)
    true = generator.integers(0, num_classes, num_examples)
    predicted = np.where(generator.random(num_examples) < 0.8, true, generator.integers(0, num_classes, num_examples))
    table = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(table, (true, predicted), 1)
    return table


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_few_classes_are_named_and_numbered():
    table = confusion(4)
    axes = confusion_figure(table, ("one", "two", "$x$", "four")).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["one", "two", "$x$", "four"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one", "two", "$x$", "four"]
    np.testing.assert_allclose(axes.images[0].get_array(), table / table.sum(axis=1, keepdims=True))
    assert {str(count) for count in table.ravel() if count} <= set(texts(axes))


def test_many_classes_carry_no_names_but_a_list_of_confusions():
    table = confusion(100, 20_000)
    table[17, 42] = 500
    names = [f"name {c}" for c in range(100)]
    figure = confusion_figure(table, names)
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels() + figure.axes[0].get_yticklabels()]
    assert not set(labels) & set(names)
    assert texts(figure.axes[1])[1:3] == ["name 17 → name 42", "500"]


def test_hundreds_of_classes_are_drawn_in_blocks_that_keep_the_worst_confusion():
    table = np.diag(np.full(500, 10))
    table[3, 499] = 10
    cells = confusion_figure(table, [str(c) for c in range(500)]).axes[0].images[0].get_array()
    assert cells.shape == (125, 125)
    assert cells[0, 124] == 0.5
    assert np.count_nonzero(cells) == 126


def test_class_without_examples_is_drawn_empty():
    axes = confusion_figure(np.array([[3, 1], [0, 0]]), ("a", "b")).axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), [[0.75, 0.25], [0, 0]])


def test_curves_show_what_was_logged():
    steps = list(range(0, 100, 2))
    loss = [5 - step / 25 for step in steps]
    lr = [min(1, step / 10) * 0.03 for step in steps]
    panels = curve_figure(steps, loss, lr, evaluations=[(50, 0.4), (98, 0.7)]).axes
    np.testing.assert_allclose(panels[0].lines[0].get_ydata(), loss)
    np.testing.assert_allclose(panels[0].lines[1].get_ydata()[1:-1], loss[1:-1])  # a straight line is its own mean
    np.testing.assert_allclose(panels[1].lines[0].get_ydata(), [0.4, 0.7])
    np.testing.assert_allclose(panels[2].lines[0].get_xdata(), steps[1:])  # no place for rate 0 on a logarithmic axis
    assert [panel.get_ylabel() for panel in panels] == ["training loss (nats)", "top-1 (%)", "learning rate"]


def test_single_point_is_a_curve_too(tmp_path):
    save_figure(curve_figure([0], [4.0], [0.0]), tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 0


ROWS = [
    ComparisonRow(series="pre-trained", k=5, values=(0.87, 0.88, 0.90)),
    ComparisonRow(series="from scratch", k=5, values=(0.75, 0.78, 0.80)),
    ComparisonRow(series="pre-trained", k=10, values=(0.91, 0.92, 0.93)),
    ComparisonRow(series="from scratch", k=10, values=(0.84, 0.85, 0.86)),
]


def test_comparison_shows_medians_gains_and_every_repeat():
    axes = comparison_figure(ROWS).axes[0]
    assert {"88.0", "78.0", "92.0", "85.0", "+10.0", "+7.0"} <= set(texts(axes))
    dots = sorted(y for collection in axes.collections[::2] for _, y in collection.get_offsets())
    assert dots == pytest.approx(sorted(value for row in ROWS for value in row.values))
    assert [label.get_text() for label in axes.get_xticklabels()] == ["5", "10"]
    assert "%" in axes.get_ylabel()


def test_comparison_of_one_method_with_one_value(tmp_path):
    figure = comparison_figure([ComparisonRow(series="only", k=1, values=(0.5,))])
    assert "50.0" in texts(figure.axes[0])
    save_figure(figure, tmp_path / "one.png")


def test_contact_sheet_marks_right_and_wrong():
    images = [np.full((8, 8, 3), 40 * i, np.uint8) for i in range(5)]
    figure = prediction_figure(images, list("01234"), [("0", 0.9), ("1", 0.8), ("7", 0.6), ("3", 1.0), ("4", 0.5)])
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["✓ 0  90%", "✓ 1  80%", "✗ 7  60%", "✓ 3  100%", "✓ 4  50%"]
    assert figure.axes[2].get_xlabel() == "is 2"
    colors = [axes.spines["top"].get_edgecolor() for axes in figure.axes]
    assert colors[2] != colors[0] == colors[1] == colors[3] == colors[4]
    assert "4 of 5 right" in figure.get_suptitle()


def test_reliability_shows_accuracy_gap_and_counts_of_the_bins_that_are_used():
    calibration = Calibration(
        edges=np.linspace(0, 1, 5),
        counts=np.array([0, 10, 0, 30]),
        confidence=np.array([0, 0.4, 0, 0.9]),
        accuracy=np.array([0, 0.5, 0, 0.7]),
    )
    assert calibration.error == pytest.approx(0.25 * 0.1 + 0.75 * 0.2)
    above, below = reliability_figure(calibration, "Digits").axes
    bars, gaps = above.containers
    assert [bar.get_x() + bar.get_width() / 2 for bar in bars] == pytest.approx([0.375, 0.875])
    assert [bar.get_height() for bar in bars] == pytest.approx([0.5, 0.7])
    assert [bar.get_height() for bar in gaps] == pytest.approx([-0.1, 0.2])
    assert [bar.get_height() for bar in below.containers[0]] == pytest.approx([0.25, 0.75])
    assert texts(above)[-1] == "ECE 17.5% in 4 bins · accuracy 65.0%, confidence 77.5% · 40 predictions"


def test_contact_sheet_without_a_tally_has_its_own_heading():
    image = np.zeros((8, 8, 3), np.uint8)
    figure = prediction_figure([image], ["a"], [("b", 0.9)], title="The 1 most confident errors", tally=False)
    assert figure.get_suptitle() == "The 1 most confident errors"


def test_names_that_look_like_formulas_or_have_no_font_are_drawn(tmp_path, recwarn):
    names = ["$", "$\\bad{", "\U00012000", "a very long name of a class indeed"]
    save_figure(confusion_figure(confusion(4), names), tmp_path / "a.png")
    image = np.zeros((8, 8, 3), np.uint8)
    save_figure(prediction_figure([image] * 4, names, [(name, 0.5) for name in names[::-1]]), tmp_path / "b.png")
    assert not recwarn.list


def test_saved_picture_has_the_size_and_nothing_else_is_left(tmp_path):
    save_figure(comparison_figure(ROWS), tmp_path / "comparison.png", dpi=100)
    assert imread(tmp_path / "comparison.png").shape[:2] == (460, 640)
    save_figure(comparison_figure(ROWS), tmp_path / "comparison.svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["comparison.png", "comparison.svg"]


def test_bad_paths_are_refused_in_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown kind of picture; accepted: .*png.*rename"):
        save_figure(comparison_figure(ROWS), tmp_path / "comparison.docx")
    with pytest.raises(ConfigError, match="cannot be written"):
        save_figure(comparison_figure(ROWS), tmp_path / "missing" / "comparison.png")
    assert not list(tmp_path.iterdir())


def test_no_global_state_is_loaded():
    code = "import bit_ray.plots.confusion, sys; print('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_few_shot_curves_go_through_the_medians_over_a_logarithmic_axis():
    upper = [
        ComparisonRow(series="pre-trained", k=k, values=values)
        for k, values in ((1, (0.2, 0.5, 0.3)), (10, (0.6, 0.9, 0.7)), (100, (0.8, 0.9)))
    ]
    lower = [ComparisonRow(series="from scratch", k=1, values=(0.1, 0.2)), *upper[:1]]
    figure = few_shot_figure({"small": upper, "wide": lower}, "Title", "digits")
    first, second = figure.axes
    assert first.get_xscale() == "log"
    assert [label.get_text() for label in first.get_xticklabels()] == ["1", "10", "100"]
    [curve] = [line for line in first.get_lines() if len(line.get_xdata()) > 1]
    np.testing.assert_allclose(curve.get_xydata(), [[1, 0.3], [10, 0.7], [100, 0.85]])
    dots = np.concatenate([scatter.get_offsets() for scatter in first.collections])
    assert sorted(map(tuple, dots)) == sorted((row.k, value) for row in upper for value in row.values)
    # A method has one colour in all panels.
    colors = {scatter.get_facecolor()[0].tolist()[0] for scatter in first.collections}
    assert {s.get_facecolor()[0].tolist()[0] for s in second.collections} - colors
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["pre-trained", "from scratch"]
