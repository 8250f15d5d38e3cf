"""From the scores of a grid to its report: intervals, differences that may be claimed, crossings, interactions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bit_ray.config import from_dict
from bit_ray.evaluation.statistics import Interval, Spread, difference, holm, p_value, t_interval
from bit_ray.evaluation.trend import trend
from bit_ray.plots.lines import Line, LinePlot
from bit_ray.studies.catalog import GridStudy
from bit_ray.studies.conduct import Outcome
from bit_ray.studies.grid import Grid
from bit_ray.studies.report import Report, Table
from bit_ray.studies.spaces import parse_space
from bit_ray.studies.study_config import GridConfig, command

_ALPHA = 0.05
_LISTED = 10
_PLOTTED = {
    "train/loss": "training loss, nats",
    "val/loss": "validation loss, nats",
    "val/top_1": "validation top-1",
    "probe/top_1": "few-shot top-1 of the features",
    "turn": "turn of the kernels per step, radians",
}


def grid_report(study: GridStudy, outcome: Outcome) -> Report:
    """Return the report of a grid study, of what is finished.

    Args:
        study: Its declaration.
        outcome: What came out.
    """
    config = from_dict(GridConfig, outcome.config)
    axes = list(dict.fromkeys([*study.axes, *(axis.name for axis in parse_space(config.axes, "axes"))]))
    grid = Grid(outcome.cells, axes)
    compared = comparisons(grid, study.measure)
    findings = [one.sentence(study.measure, study.better) for one in compared]
    if grid.points and all(grid.values(point, study.measure) for point in grid.points):
        if len([axis for axis in range(len(axes)) if len(grid.levels(axis)) > 1]) == 2:
            findings.append(interaction(grid, study.measure))
        if study.findings is not None:
            findings += study.findings(grid)
    tables = [_results(grid, study, config.price)]
    if compared:
        tables.append(_differences(compared, study.measure))
    plots = [_plot(grid, measure, label) for measure, label in _PLOTTED.items() if _is_measured(grid, measure)]
    norms = sorted({name for s in grid.scores.values() for one in s for name in one.final if name.startswith("norm/")})
    if norms:
        plots.append(_plot(grid, norms[-1], f"norm of the kernels of {norms[-1].removeprefix('norm/')}"))
    return Report(
        title=study.title,
        command=command("study run", config),
        findings=tuple(findings) or ("Nothing can be said yet.",),
        tables=tuple(tables),
        plots=tuple(plots),
        paper=study.paper,
        missing=missing(outcome),
        settings=settings_of(outcome),
    )


def missing(outcome: Outcome) -> tuple[str, ...]:
    """Return what is left to do, in words."""
    keys = [cell.key for cell in outcome.cells if cell.score is None]
    more = len(keys) - _LISTED
    rest = (f"{more} more of {len(outcome.cells)} trainings: not finished",) if more > 0 else ()
    return (*(f"{key}: not finished" for key in keys[:_LISTED]), *rest, *outcome.missing)


def settings_of(outcome: Outcome) -> dict[str, str]:
    """Return where a study was run, and its settings, as one reads them."""
    given = {name: str(value) for name, value in outcome.config.items() if value not in ("", [], None)}
    return {**outcome.facts, **given}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One setting of an axis against the first, the other axes being equal."""

    axis: str
    value: Any
    base: Any
    given: str
    """The other axes, as one reads them."""
    interval: Interval
    """Of the difference of the means."""
    p: float
    """Adjusted for the number of comparisons (Holm)."""

    def sentence(self, measure: str, better: str) -> str:
        """Return what may be said of it."""
        where = f" at {self.given}" if self.given else ""
        name = self.axis.rpartition(".")[2]
        start = f"{name} {_text(self.value)} against {_text(self.base)}{where}: {measure}"
        if self.p >= _ALPHA:
            most = max(abs(self.interval.low), abs(self.interval.high))
            return f"{start}: no difference seen, less than {_change(most, measure)} (95 % interval)."
        is_better = (self.interval.estimate > 0) == (better == "higher")
        return (
            f"{start} {'better' if is_better else 'worse'} by {_change(abs(self.interval.estimate), measure)} "
            f"(95 % interval {_between(self.interval, measure)}; p {self.p:.2g} after Holm)."
        )


def comparisons(grid: Grid, measure: str) -> list[Comparison]:
    """Compare every value of every axis with the axis's first, the other axes being equal."""
    spread = grid.spread(measure)
    if spread is None:
        return []
    found: list[tuple[int, tuple[Any, ...], tuple[Any, ...]]] = []
    for point in grid.points:
        for axis in range(len(grid.axes)):
            base = (*point[:axis], grid.levels(axis)[0], *point[axis + 1 :])
            if base != point and grid.values(point, measure) and grid.values(base, measure):
                found.append((axis, point, base))
    results = [(difference(grid.values(p, measure), grid.values(b, measure), spread), p, b) for _, p, b in found]
    raw = [p_value(i.estimate, _error(grid, p, b, measure, spread), spread.degrees) for i, p, b in results]
    adjusted = holm(raw)
    return [
        Comparison(
            axis=grid.axes[axis],
            value=point[axis],
            base=base[axis],
            given=_given(grid, point, axis),
            interval=interval,
            p=p,
        )
        for (axis, point, base), (interval, _, _), p in zip(found, results, adjusted, strict=True)
    ]


def interaction(grid: Grid, measure: str) -> str:
    """Say whether the effect of one axis depends on the other: the difference of differences of the outer points."""
    first, second = [axis for axis in range(len(grid.axes)) if len(grid.levels(axis)) > 1]
    spread = grid.spread(measure)

    def at(a: Any, b: Any) -> list[float]:
        point = list(grid.points[0])
        point[first], point[second] = a, b
        return grid.values(tuple(point), measure)

    low_a, high_a = grid.levels(first)[0], grid.levels(first)[-1]
    low_b, high_b = grid.levels(second)[0], grid.levels(second)[-1]
    corners = [at(high_a, high_b), at(high_a, low_b), at(low_a, high_b), at(low_a, low_b)]
    names = [grid.axes[axis].rpartition(".")[2] for axis in (first, second)]
    if spread is None or not all(corners):
        return f"Whether {names[0]} and {names[1]} work together cannot be said: the corners of the grid are not done."
    means = [sum(c) / len(c) for c in corners]
    error = spread.sd * math.sqrt(sum(1 / len(c) for c in corners))
    found = t_interval(means[0] - means[1] - means[2] + means[3], error, spread.degrees)
    effect = _change(abs(found.estimate), measure)
    if not found.excludes_zero:
        most = _change(max(abs(found.low), abs(found.high)), measure)
        return f"No interaction of {names[0]} and {names[1]} seen in {measure}, less than {most} (95 % interval)."
    more = "more" if found.estimate > 0 else "less"
    return (
        f"{names[0]} {_text(high_a)} instead of {_text(low_a)} adds {effect} {more} to {measure} at {names[1]} "
        f"{_text(high_b)} than at {_text(low_b)} (95 % interval of the difference {_between(found, measure)})."
    )


def crossing(grid: Grid, first: tuple[Any, ...], second: tuple[Any, ...], measure: str) -> str:
    """Say whether one setting looks better early and is worse at the end; lower values are better.

    Claimed only if both intervals exclude 0, at some measured step of the first half and at the end; equal settings
    are then called crossing in less than 0.2 % of the cases.

    Args:
        grid: The grid.
        first: A point, such as that of the small decay.
        second: Another.
        measure: A loss.
    """
    steps = grid.steps(first)
    names = f"{grid.label(first)} and {grid.label(second)}"
    end = _gap(grid, first, second, measure, 0)
    if not steps or steps != grid.steps(second) or end is None:
        return f"Whether {names} cross cannot be said: they are not measured at the same steps, with two seeds each."
    early = [(s, _gap(grid, first, second, measure, s)) for s in steps if s <= steps[-1] / 2]
    clear = [(s, gap) for s, gap in early if gap is not None and gap.excludes_zero]
    opposite = [(s, gap) for s, gap in clear if (gap.estimate > 0) != (end.estimate > 0)]
    if end.excludes_zero and opposite:
        last = max(s for s, _ in opposite)
        after = min((s for s in steps if s > last), default=steps[-1])
        early_best, late_best = (first, second) if opposite[0][1].estimate < 0 else (second, first)
        return (
            f"{grid.label(early_best)} looks better in {measure} early, and {grid.label(late_best)} ends better by "
            f"{_change(abs(end.estimate), measure)} (95 % interval {_between(end, measure)}): the curves cross between "
            f"steps {last:,} and {after:,}. Whoever stops earlier chooses wrongly."
        )
    if clear:
        step, widest = max(clear, key=lambda one: abs(one[1].estimate))
        leader = first if widest.estimate < 0 else second
        rest = (
            f"{_change(abs(end.estimate), measure)} of it are left at the end"
            if end.excludes_zero and (end.estimate < 0) == (widest.estimate < 0)
            else f"no difference is seen at the end, less than {_change(max(abs(end.low), abs(end.high)), measure)}"
        )
        return (
            f"{grid.label(leader)} leads in {measure} by {_change(abs(widest.estimate), measure)} at step {step:,} "
            f"(95 % interval {_between(widest, measure)}); {rest}. No crossing is shown."
        )
    return f"No crossing of {names} in {measure} is shown, nor an early lead of either."


def _gap(grid: Grid, first: tuple[Any, ...], second: tuple[Any, ...], measure: str, step: int) -> Interval | None:
    a, b, spread = grid.values(first, measure, step), grid.values(second, measure, step), grid.spread(measure, step)
    return difference(a, b, spread) if a and b and spread is not None else None


def _error(grid: Grid, point: tuple[Any, ...], base: tuple[Any, ...], measure: str, spread: Spread) -> float:
    return spread.sd * math.sqrt(1 / len(grid.values(point, measure)) + 1 / len(grid.values(base, measure)))


def _given(grid: Grid, point: tuple[Any, ...], axis: int) -> str:
    others = [i for i in range(len(grid.axes)) if i != axis and len(grid.levels(i)) > 1]
    return ", ".join(f"{grid.axes[i].rpartition('.')[2]} {_text(point[i])}" for i in others)


def _results(grid: Grid, study: GridStudy, price: float) -> Table:
    measures = [m for m in ("train/loss", "val/loss", "val/top_1", "probe/top_1") if _is_measured(grid, m)]
    has_decay = any(score.decay_exposure for scores in grid.scores.values() for score in scores)
    header = [name.rpartition(".")[2] for name in grid.axes]
    header += ["seeds", *measures]
    header += ["rate x decay x steps"] if has_decay else []
    header += ["at the end", "images each", "device s each"] + (["price each"] if price else [])
    rows = []
    for point in grid.points:
        scores = grid.scores[point]
        row = [_text(value) for value in point] + [str(len(scores))]
        row += [_mean(grid, point, measure) for measure in measures]
        if has_decay:
            row.append(f"{scores[0].decay_exposure:.2g}" if scores else "")
        seconds = sum(score.device_s for score in scores) / max(1, len(scores))
        row += [_trend(grid, point), f"{scores[0].images:,}" if scores else "", f"{seconds:,.0f}"]
        row += [f"{seconds / 3600 * price:.3g}"] if price else []
        if any(score.diverged for score in scores):
            row[len(grid.axes)] += f", {sum(score.diverged for score in scores)} diverged"
        rows.append(tuple(row))
    note = "Means over seeds; ± is half of the 95 % t interval, with the spread that all points have in common."
    return Table(title="Results", header=tuple(header), rows=tuple(rows), note=note)


def _trend(grid: Grid, point: tuple[Any, ...]) -> str:
    """Say whether the mean training loss of a point still falls at its end."""
    curves = [dict(score.losses) for score in grid.scores[point] if not score.diverged]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    if len(steps) < 2:
        return ""
    losses = [sum(curve[step] for curve in curves) / len(curves) for step in steps]
    since = max(score.rate_changed_at for score in grid.scores[point])
    return trend(steps, losses, margin=max(1e-12, 0.01 * abs(losses[-1])), since=since).answer


def _differences(compared: Sequence[Comparison], measure: str) -> Table:
    rows = tuple(
        (
            f"{one.axis.rpartition('.')[2]} {_text(one.value)} against {_text(one.base)}",
            one.given,
            _change(one.interval.estimate, measure, sign="+"),
            _between(one.interval, measure),
            f"{one.p:.2g}",
        )
        for one in compared
    )
    return Table(
        title=f"Differences in {measure}",
        header=("compared", "at", "difference", "95 % interval", "p after Holm"),
        rows=rows,
        note="A difference is claimed where p is below 0.05; one false claim in all has a probability of at most 5 %.",
    )


def _plot(grid: Grid, measure: str, label: str) -> LinePlot:
    lines = []
    for point in grid.points:
        steps = [step for step in grid.steps(point) if grid.values(point, measure, step)]
        means, lows, highs = [], [], []
        for step in steps:
            values, spread = grid.values(point, measure, step), grid.spread(measure, step)
            mean = sum(values) / len(values)
            half = 0.0
            if spread is not None:
                interval = t_interval(mean, spread.sd / math.sqrt(len(values)), spread.degrees)
                half = interval.high - mean
            means.append(mean)
            lows.append(mean - half)
            highs.append(mean + half)
        lines.append(
            Line(
                label=grid.label(point), x=tuple(map(float, steps)), y=tuple(means), low=tuple(lows), high=tuple(highs)
            )
        )
    return LinePlot(
        name=measure.replace("/", "-").replace("_", "-"),
        title=f"{label[0].upper()}{label[1:]}"
        + (" along the training" if any(len(line.x) > 1 for line in lines) else ""),
        x_label="step",
        y_label=label,
        lines=tuple(lines),
        log_x=True,
        percent_y=measure.endswith("top_1"),
        caption="Means over seeds with their 95 % t interval.",
    )


def _is_measured(grid: Grid, measure: str) -> bool:
    return any(grid.values(point, measure) for point in grid.points)


def _mean(grid: Grid, point: tuple[Any, ...], measure: str) -> str:
    values, spread = grid.values(point, measure), grid.spread(measure)
    if not values:
        return ""
    mean = sum(values) / len(values)
    if spread is None:
        return _amount(mean, measure)
    half = t_interval(mean, spread.sd / math.sqrt(len(values)), spread.degrees).high - mean
    return f"{_amount(mean, measure)} ± {_amount(half, measure)}"


def _amount(value: float, measure: str) -> str:
    return f"{100 * value:.1f} %" if measure.endswith("top_1") else f"{value:.3g}"


def _change(value: float, measure: str, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f} points" if measure.endswith("top_1") else f"{value:{sign}.3g}"


def _between(interval: Interval, measure: str) -> str:
    return f"{_change(interval.low, measure).removesuffix(' points')} to {_change(interval.high, measure)}"


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
