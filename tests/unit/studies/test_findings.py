"""What is said of a grid of trainings: which differences are claimed, and how often wrongly."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats
from unit.studies.study_scores import cell, outcome, score

from bit_ray.studies.catalog import STUDIES, GridStudy
from bit_ray.studies.findings import comparisons, crossing, interaction
from bit_ray.studies.grid import Grid
from bit_ray.studies.grid_report import grid_report
from bit_ray.studies.report import render
from bit_ray.studies.study_config import GridConfig
from bit_ray.training.config import PretrainConfig

REPEATS = 400
LOSS, TOP_1 = "val/loss", "val/top_1"


def near(share, expected, repeats=REPEATS):
    """Whether a share of random repeats is within four standard errors of what it should be."""
    return abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / repeats)


def cells_of(axes, values, measure=LOSS):
    """Trainings of a grid from the final value of each seed, by point; None is not finished."""
    return [
        cell(
            f"{point}-{seed}",
            {**dict(zip(axes, point, strict=True)), "seed": seed},
            None if value is None else score({measure: value}),
        )
        for point, finals in values.items()
        for seed, value in enumerate(finals)
    ]


def grid_of(axes, values, measure=LOSS):
    return Grid(cells_of(axes, values, measure), axes)


def study(axes, **changes):
    settings = {"title": "Does it matter?", "axes": axes, "val": "none", "measure": LOSS, "better": "lower"}
    return GridStudy(base=PretrainConfig(name="cell", shards="none"), **settings | changes)


def report(declared, cells, **changes):
    return grid_report(declared, outcome("grid", GridConfig(study="weight-decay", **changes), cells))


FIRST, SECOND, THIRD = [2.0, 2.2, 2.1], [1.5, 1.6, 1.4, 1.7], [2.05, 2.2, 2.3]


def test_two_settings_are_compared_as_by_the_pooled_t_test():
    [one] = comparisons(grid_of(["a"], {(0,): FIRST, (1,): SECOND}), LOSS)
    reference = stats.ttest_ind(SECOND, FIRST)
    ends = reference.confidence_interval(0.95)
    assert (one.interval.low, one.interval.high) == pytest.approx((ends.low, ends.high))
    assert one.interval.estimate == pytest.approx(np.mean(SECOND) - np.mean(FIRST))
    assert one.p == pytest.approx(reference.pvalue)
    assert (one.axis, one.value, one.base, one.given) == ("a", 1, 0, "")


def test_the_spread_of_all_settings_is_pooled_and_p_values_are_adjusted_for_their_number():
    found = comparisons(grid_of(["a"], {(0,): FIRST, (1,): SECOND, (2,): THIRD}), LOSS)
    squares = sum(np.var(v) * len(v) for v in (FIRST, SECOND, THIRD))
    sd, degrees = math.sqrt(squares / 7), 7
    raw = []
    for one, values in zip(found, (SECOND, THIRD), strict=True):
        error = sd * math.sqrt(1 / len(values) + 1 / 3)
        gap = np.mean(values) - np.mean(FIRST)
        half = stats.t.ppf(0.975, degrees) * error
        assert (one.interval.low, one.interval.high) == pytest.approx((gap - half, gap + half))
        raw.append(2 * stats.t.sf(abs(gap) / error, degrees))
    assert raw[0] < raw[1]
    assert [one.p for one in found] == pytest.approx([2 * raw[0], raw[1]])


def test_each_value_of_an_axis_is_compared_with_its_first_the_others_being_equal():
    axes = ["rule.a", "b", "c"]
    values = {point: [1.0, 2.0] for point in itertools.product((0, 1), "xyz", (5,))}
    found = comparisons(grid_of(axes, values), LOSS)
    assert [(one.axis, one.value, one.base, one.given) for one in found] == [
        ("b", "y", "x", "a 0"),
        ("b", "z", "x", "a 0"),
        ("rule.a", 1, 0, "b x"),
        ("rule.a", 1, 0, "b y"),
        ("b", "y", "x", "a 1"),
        ("rule.a", 1, 0, "b z"),
        ("b", "z", "x", "a 1"),
    ]


def test_equal_settings_are_claimed_to_differ_in_at_most_one_study_in_twenty():
    rng, axes = np.random.default_rng(1), ["a", "b"]
    points = list(itertools.product((0, 1, 2), (0, 1)))
    claims = 0
    for _ in range(REPEATS):
        grid = grid_of(axes, {point: rng.normal(2, 0.1, 3).tolist() for point in points})
        said = [one.sentence(LOSS, "lower") for one in comparisons(grid, LOSS)]
        assert len(said) == 7
        claims += any("no difference seen" not in sentence for sentence in said)
    assert claims / REPEATS <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / REPEATS)
    assert claims > 0  # the level is used


def test_a_difference_is_said_with_its_direction_and_interval_and_points_of_accuracy():
    grid = grid_of(["recipe.lr"], {(0.1,): [0.80, 0.81, 0.82], (0.5,): [0.90, 0.91, 0.92]}, TOP_1)
    [one] = comparisons(grid, TOP_1)
    half = stats.t.ppf(0.975, 4) * 0.01 * math.sqrt(2 / 3)
    p = 2 * stats.t.sf(0.1 / (0.01 * math.sqrt(2 / 3)), 4)
    assert one.sentence(TOP_1, "higher") == (
        f"lr 0.5 against 0.1: val/top_1 better by 10.0 points (95 % interval {10 - 100 * half:.1f} to "
        f"{10 + 100 * half:.1f} points; p {p:.2g} after Holm)."
    )
    assert "val/top_1 worse by 10.0 points" in one.sentence(TOP_1, "lower")
    [equal] = comparisons(grid_of(["lr"], {(0.1,): [2.0, 2.4, 2.2], (0.5,): [2.1, 2.3, 2.5]}), LOSS)
    half = stats.t.ppf(0.975, 4) * 0.2 * math.sqrt(2 / 3)
    assert equal.sentence(LOSS, "lower") == (
        f"lr 0.5 against 0.1: val/loss: no difference seen, less than {0.1 + half:.3g} (95 % interval)."
    )


def test_the_interaction_is_the_difference_of_differences():
    values = {(1, 5): [1.0, 1.2], (1, 7): [1.5, 1.7], (2, 5): [2.0, 2.2], (2, 7): [4.5, 4.7]}
    said = interaction(grid_of(["s.data", "m.size"], values), LOSS)
    # (4.6 - 1.6) - (2.1 - 1.1) = 2.0, with 4 degrees of freedom and a standard error of 0.1414 * sqrt(4 / 2) = 0.2.
    half = stats.t.ppf(0.975, 4) * 0.2
    assert said == (
        "data 2 instead of 1 adds 2 more to val/loss at size 7 than at 5 "
        f"(95 % interval of the difference {2 - half:.3g} to {2 + half:.3g})."
    )
    mirrored = {(a, 12 - b): v for (a, b), v in values.items()}
    assert interaction(grid_of(["data", "size"], dict(sorted(mirrored.items()))), LOSS).startswith(
        "data 2 instead of 1 adds 2 less to val/loss at size 7 than at 5 "
    )


def test_an_interaction_that_is_not_there_is_claimed_in_one_of_twenty_studies():
    rng = np.random.default_rng(2)
    claims = 0
    for _ in range(REPEATS):
        values = {(a, b): rng.normal(a + 3 * b, 0.3, 3).tolist() for a in (0, 1) for b in (0, 1)}
        claims += not interaction(grid_of(["a", "b"], values), LOSS).startswith("No interaction of a and b seen in")
    assert near(claims / REPEATS, 0.05)


def curves_of(curves, steps):
    """A grid from the losses of each seed along the way, by point."""
    cells = []
    for point, seeds in curves.items():
        for seed, losses in enumerate(seeds):
            points = [(step, {LOSS: float(loss)}) for step, loss in zip(steps, losses, strict=True)]
            cells.append(cell(f"{point}-{seed}", {"a": point[0], "seed": seed}, score(points[-1][1], points)))
    return Grid(cells, ["a"])


STEPS = [5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100]


def noise(rng, seeds):
    """Curves of standard deviation 1 whose neighbouring points have a correlation of about 0.5."""
    common, own = rng.normal(size=(seeds, 1)), rng.normal(size=(seeds, len(STEPS)))
    return math.sqrt(0.5) * (common + own)


@pytest.mark.parametrize("independent", [True, False])
def test_equal_curves_are_said_to_cross_in_less_than_one_of_a_hundred_studies(independent):
    rng = np.random.default_rng(3)
    draw = (lambda: rng.normal(size=(3, len(STEPS)))) if independent else (lambda: noise(rng, 3))
    claims = 0
    for _ in range(REPEATS):
        said = crossing(curves_of({(0,): draw(), (1,): draw()}, STEPS), (0,), (1,), LOSS)
        claims += "curves cross" in said
    assert claims / REPEATS <= 0.01


def test_a_crossing_of_four_standard_deviations_is_found():
    rng = np.random.default_rng(4)
    gap = np.where(np.array(STEPS) <= 50, -4.0, 4.0)
    found = []
    for _ in range(100):
        said = crossing(curves_of({(0,): noise(rng, 5) + gap, (1,): noise(rng, 5)}, STEPS), (0,), (1,), LOSS)
        found.append(said)
    assert np.mean(["curves cross between steps 50 and 60" in said for said in found]) > 0.8
    claimed = [said for said in found if "curves cross" in said]
    assert all(said.startswith("a 0 looks better in val/loss early, and a 1 ends better by ") for said in claimed)


SPREAD = np.array([[-0.1], [0.0], [0.1]])


def crossing_of(early, late):
    """What is said of two settings whose second is lower by ``early`` up to step 50 and by ``late`` after it."""
    gap = np.where(np.array(STEPS) <= 50, early, late)
    return crossing(curves_of({(0,): 5 + SPREAD + 0 * gap, (1,): 5 + SPREAD - gap}, STEPS), (0,), (1,), LOSS)


def test_what_is_said_of_two_curves_by_hand():
    # A standard deviation of 0.1 at each step, 3 seeds each, 4 degrees of freedom.
    half = stats.t.ppf(0.975, 4) * 0.1 * math.sqrt(2 / 3)
    assert crossing_of(1.0, -2.0) == (
        f"a 1 looks better in val/loss early, and a 0 ends better by 2 (95 % interval {-2 - half:.3g} to "
        f"{-2 + half:.3g}): the curves cross between steps 50 and 60. Whoever stops earlier chooses wrongly."
    )
    assert crossing_of(1.0, 0.5) == (
        f"a 1 leads in val/loss by 1 at step 5 (95 % interval {1 - half:.3g} to {1 + half:.3g}); 0.5 of it are left at "
        "the end. No crossing is shown."
    )
    assert crossing_of(-1.0, 0.0) == (
        f"a 0 leads in val/loss by 1 at step 5 (95 % interval {-1 - half:.3g} to {-1 + half:.3g}); no difference is "
        f"seen at the end, less than {half:.3g}. No crossing is shown."
    )
    assert crossing_of(0.0, 1.0) == "No crossing of a 0 and a 1 in val/loss is shown, nor an early lead of either."


def test_curves_of_other_steps_or_of_one_seed_are_not_compared():
    said = "Whether a 0 and a 1 cross cannot be said"
    one = curves_of({(0,): [[1.0] * 11], (1,): [[1.0] * 11]}, STEPS)
    assert crossing(one, (0,), (1,), LOSS).startswith(said)
    some = [
        cell(f"{a}-{seed}", {"a": a}, score({LOSS: 1.0}, [(10 + a, {LOSS: 1.0})])) for a in (0, 1) for seed in (0, 1)
    ]
    assert crossing(Grid(some, ["a"]), (0,), (1,), LOSS).startswith(said)


TWO_AXES = {"recipe.a": (0, 1), "b": ("x", "y")}
VALUES = {(0, "x"): FIRST, (0, "y"): [1.1, 1.2, 1.0], (1, "x"): SECOND[:3], (1, "y"): [1.05, 1.1, 1.2]}


def text_of(made):
    return render(made)["report.md"].decode()


def test_the_report_of_a_finished_grid_has_each_comparison_the_interaction_and_what_the_study_adds():
    declared = study(TWO_AXES, findings=lambda grid: (f"{len(grid.points)} points.",), paper=("The paper: yes.",))
    made = report(declared, cells_of(list(TWO_AXES), VALUES), price=2.0, seeds=3)
    assert len(made.findings) == 4 + 1 + 1
    assert made.findings[-1] == "4 points."
    assert "than at x" in made.findings[4] or made.findings[4].startswith("No interaction of a and b")
    assert made.missing == ()
    assert made.paper == ("The paper: yes.",)
    assert made.command == "bit-ray study run weight-decay --price 2.0 --seeds 3"
    results, differences = made.tables
    sd = math.sqrt(sum(np.var(v, ddof=1) for v in VALUES.values()) / 4)
    half = stats.t.ppf(0.975, 8) * sd / math.sqrt(3)
    assert results.header == ("a", "b", "seeds", LOSS, "at the end", "images each", "device s each", "price each")
    assert results.rows[0] == ("0", "x", "3", f"2.1 ± {half:.3g}", "", "1,000", "36", "0.02")
    assert [row[:2] for row in differences.rows] == [
        ("b y against x", "a 0"),
        ("a 1 against 0", "b x"),
        ("a 1 against 0", "b y"),
        ("b y against x", "a 1"),
    ]
    assert differences.rows[0][2] == "-1"
    assert made.settings["seeds"] == "3"
    assert made.settings["device"] == "2 CPU cores"
    assert "# Does it matter?" in text_of(made)


def test_a_grid_in_part_says_what_it_can_and_lists_what_is_left():
    values = {**VALUES, (1, "y"): [1.05, None, None], (1, "x"): [None, None, None]}
    declared = study(TWO_AXES, findings=lambda grid: ("Never.",))
    made = report(declared, cells_of(list(TWO_AXES), values))
    assert made.missing == tuple(f"{point}-{seed}: not finished" for point, seed in
        [((1, "x"), 0), ((1, "x"), 1), ((1, "x"), 2), ((1, "y"), 1), ((1, "y"), 2)])  # fmt: skip
    assert [line.partition(":")[0] for line in made.findings] == ["b y against x at a 0", "a 1 against 0 at b y"]
    assert [row[2:4] for row in made.tables[0].rows][2] == ("0", "")
    assert "Not finished" in text_of(made)


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_of_which_nothing_is_finished_has_a_report(name):
    for cells in ([], [cell("first", dict.fromkeys(STUDIES[name].axes, 1) | {"seed": 0})]):
        made = grid_report(STUDIES[name], outcome("grid", GridConfig(study=name), cells, missing=("The rest.",)))
        assert made.findings == ("Nothing can be said yet.",)
        assert made.missing == (*(f"{c.key}: not finished" for c in cells), "The rest.")
        assert "Nothing can be said yet." in text_of(made)


def diverged(changes=()):
    return score({TOP_1: 0.0}, diverged=True, losses=((1, 9.0),), **dict(changes))


def test_a_training_that_diverged_has_no_loss_and_does_not_break_the_report():
    cells = cells_of(["a"], {(0,): FIRST, (1,): SECOND[:3]})
    cells[4] = cell("bad", {"a": 1, "seed": 1}, diverged())
    made = report(study({"a": (0, 1)}), cells)
    [line] = made.findings
    reference = stats.ttest_ind([1.5, 1.4], FIRST).confidence_interval(0.95)
    assert f"better by {2.1 - 1.45:.3g} (95 % interval {reference.low:.3g} to {reference.high:.3g}; p " in line
    assert [row[1] for row in made.tables[0].rows] == ["3", "3, 1 diverged"]
    assert "1 diverged" in text_of(made)
    for index in (3, 5):
        cells[index] = cell(f"bad {index}", {"a": 1, "seed": index - 3}, diverged())
    made = report(study({"a": (0, 1)}, findings=lambda grid: ("Never.",)), cells)
    assert made.findings == ("Nothing can be said yet.",)
    assert made.missing == ()
    assert [row[:3] for row in made.tables[0].rows] == [
        ("0", "3", made.tables[0].rows[0][2]),
        ("1", "3, 3 diverged", ""),
    ]


def decay_cells(early, late):
    """Trainings of the weight decay study whose largest decay is higher by ``early`` and lower by ``late``."""
    cells = []
    for decay, rate, seed in itertools.product((0.0, 1e-4, 2e-3, 1e-2), (0.16, 0.04), range(3)):
        points = []
        for step in (100, 1000, 1875):
            gap = decay / 1e-2 * (early if step < 1000 else -late)
            loss = 2 - step / 2000 + 0.01 * seed + gap
            values = {"train/loss": loss, "val/loss": loss + 0.1, TOP_1: 0.5 - gap / 10, "probe/top_1": 0.6}
            points.append((step, values | {"norm/stage1": 10.0, "norm/stage2": 20.0, "turn": 0.01}))
        losses = tuple((step, 3 - math.log(step) / 4 + 0.001 * (step % 7)) for step in range(10, 1876, 10))
        made = score(points[-1][1], points, losses=losses, decay_exposure=10 * decay)
        cells.append(cell(f"{decay}-{rate}-{seed}", {"recipe.weight_decay": decay,
            "recipe.base_lr_per_256": rate, "seed": seed}, made))  # fmt: skip
    return cells


def test_the_study_of_weight_decay_finds_the_crossing_at_each_rate():
    made = grid_report(
        STUDIES["weight-decay"], outcome("grid", GridConfig(study="weight-decay"), decay_cells(0.5, 0.5))
    )
    crossings = [line for line in made.findings if "curves cross between steps 100 and 1,000" in line]
    assert [line.partition(" looks")[0] for line in crossings] == [
        "weight_decay 0, base_lr_per_256 0.16",
        "weight_decay 0, base_lr_per_256 0.04",
    ]
    assert made.findings[-1].startswith("The largest sum of learning rate x weight decay / (1 - momentum) over the")
    assert " is 0.1 here; " in made.findings[-1]
    assert [plot.name for plot in made.plots] == [
        "train-loss", "val-loss", "val-top-1", "probe-top-1", "turn", "norm-stage2"
    ]  # fmt: skip
    assert {line.label for line in made.plots[0].lines} == {
        f"weight_decay {decay}, base_lr_per_256 {rate}" for decay in ("0", "0.0001", "0.002", "0.01")
        for rate in (0.16, 0.04)
    }  # fmt: skip
    assert {row[-3] for row in made.tables[0].rows} == {"still learning"}


def test_one_decay_alone_is_not_compared_with_itself():
    cells = [c for c in decay_cells(0.5, 0.5) if c.params["recipe.weight_decay"] == 1e-2]
    config = GridConfig(study="weight-decay", axes=("recipe.weight-decay=1e-2",))
    made = grid_report(STUDIES["weight-decay"], outcome("grid", config, cells))
    assert [line for line in made.findings if "cross" in line] == []
    assert made.command == "bit-ray study run weight-decay --axes recipe.weight-decay=1e-2"


def test_a_third_axis_is_compared_at_each_point_of_the_others():
    cells = [cell(f"{c.key}-{size}", {**c.params, "recipe.crop_size": size}, c.score)
             for size in (32, 64) for c in decay_cells(0.5, 0.5)]  # fmt: skip
    config = GridConfig(study="weight-decay", axes=("recipe.crop-size=32,64",))
    made = grid_report(STUDIES["weight-decay"], outcome("grid", config, cells))
    assert len([line for line in made.findings if "curves cross" in line]) == 4
    assert made.tables[0].header[:4] == ("weight_decay", "base_lr_per_256", "crop_size", "seeds")
