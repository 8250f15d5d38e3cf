"""What may be said of the scores of a grid: differences, crossings, interactions, each with its interval."""

import math
from dataclasses import dataclass
from typing import Any

from bit_ray.evaluation.statistics import Interval, Spread, difference, holm, p_value, t_interval
from bit_ray.studies.grid import Grid

_ALPHA = 0.05


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
        start = f"{name} {text(self.value)} against {text(self.base)}{where}: {measure}"
        if self.p >= _ALPHA:
            most = max(abs(self.interval.low), abs(self.interval.high))
            return f"{start}: no difference seen, less than {change(most, measure)} (95 % interval)."
        is_better = (self.interval.estimate > 0) == (better == "higher")
        return (
            f"{start} {'better' if is_better else 'worse'} by {change(abs(self.interval.estimate), measure)} "
            f"(95 % interval {between(self.interval, measure)}; p {self.p:.2g} after Holm)."
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
    effect = change(abs(found.estimate), measure)
    if not found.excludes_zero:
        most = change(max(abs(found.low), abs(found.high)), measure)
        return f"No interaction of {names[0]} and {names[1]} seen in {measure}, less than {most} (95 % interval)."
    more = "more" if found.estimate > 0 else "less"
    return (
        f"{names[0]} {text(high_a)} instead of {text(low_a)} adds {effect} {more} to {measure} at {names[1]} "
        f"{text(high_b)} than at {text(low_b)} (95 % interval of the difference {between(found, measure)})."
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
            f"{change(abs(end.estimate), measure)} (95 % interval {between(end, measure)}): the curves cross between "
            f"steps {last:,} and {after:,}. Whoever stops earlier chooses wrongly."
        )
    if clear:
        step, widest = max(clear, key=lambda one: abs(one[1].estimate))
        leader = first if widest.estimate < 0 else second
        rest = (
            f"{change(abs(end.estimate), measure)} of it are left at the end"
            if end.excludes_zero and (end.estimate < 0) == (widest.estimate < 0)
            else f"no difference is seen at the end, less than {change(max(abs(end.low), abs(end.high)), measure)}"
        )
        return (
            f"{grid.label(leader)} leads in {measure} by {change(abs(widest.estimate), measure)} at step {step:,} "
            f"(95 % interval {between(widest, measure)}); {rest}. No crossing is shown."
        )
    return f"No crossing of {names} in {measure} is shown, nor an early lead of either."


def _gap(grid: Grid, first: tuple[Any, ...], second: tuple[Any, ...], measure: str, step: int) -> Interval | None:
    a, b, spread = grid.values(first, measure, step), grid.values(second, measure, step), grid.spread(measure, step)
    return difference(a, b, spread) if a and b and spread is not None else None


def _error(grid: Grid, point: tuple[Any, ...], base: tuple[Any, ...], measure: str, spread: Spread) -> float:
    return spread.sd * math.sqrt(1 / len(grid.values(point, measure)) + 1 / len(grid.values(base, measure)))


def _given(grid: Grid, point: tuple[Any, ...], axis: int) -> str:
    others = [i for i in range(len(grid.axes)) if i != axis and len(grid.levels(i)) > 1]
    return ", ".join(f"{grid.axes[i].rpartition('.')[2]} {text(point[i])}" for i in others)


def amount(value: float, measure: str) -> str:
    """Return a value of a measure as text."""
    return f"{100 * value:.1f} %" if measure.endswith("top_1") else f"{value:.3g}"


def change(value: float, measure: str, sign: str = "") -> str:
    """Return a difference of a measure as text."""
    return f"{100 * value:{sign}.1f} points" if measure.endswith("top_1") else f"{value:{sign}.3g}"


def between(interval: Interval, measure: str) -> str:
    """Return the ends of an interval as text."""
    return f"{change(interval.low, measure).removesuffix(' points')} to {change(interval.high, measure)}"


def text(value: Any) -> str:
    """Return a value of an axis as text."""
    return f"{value:g}" if isinstance(value, float) else str(value)
