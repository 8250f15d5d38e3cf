"""From the scores of a grid to its report: sentences, tables and figures."""

import math
from collections.abc import Sequence
from typing import Any

from bit_ray.config import from_dict
from bit_ray.evaluation.statistics import t_interval
from bit_ray.evaluation.trend import trend
from bit_ray.plots.lines import Line, LinePlot
from bit_ray.studies.catalog import GridStudy
from bit_ray.studies.findings import Comparison, amount, between, change, comparisons, interaction, text
from bit_ray.studies.grid import Grid
from bit_ray.studies.outcome import Outcome, missing, settings_of
from bit_ray.studies.report import Report, Table
from bit_ray.studies.spaces import parse_space
from bit_ray.studies.study_config import GridConfig, command

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
        row = [text(value) for value in point] + [str(len(scores))]
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
            f"{one.axis.rpartition('.')[2]} {text(one.value)} against {text(one.base)}",
            one.given,
            change(one.interval.estimate, measure, sign="+"),
            between(one.interval, measure),
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
        return amount(mean, measure)
    half = t_interval(mean, spread.sd / math.sqrt(len(values)), spread.degrees).high - mean
    return f"{amount(mean, measure)} ± {amount(half, measure)}"
