"""Is it still learning? The trend of a curve in its last doubling of steps; the answer may be "cannot tell yet".

Tests of a trend on the single points of a loss curve call a flat curve falling in up to 35 % of the cases, because
neighbouring points are correlated. Means over blocks of equal width in log(step) are nearly independent and keep the
level. Pure functions of numbers; no Ray, no MLflow, no PyTorch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from bit_ray.errors import ConfigError
from bit_ray.evaluation.statistics import Interval, t_interval
from bit_ray.recipes.schedules import Schedule

Answer = Literal["still learning", "flat", "getting worse", "cannot tell yet"]

LOSS_MARGIN = 0.01
"""Change of a loss per doubling of the steps that does not matter, as a share of the loss."""

_NUM_BLOCKS, _NUM_WIDE_BLOCKS = 8, 5
# Correlation of neighbouring residuals above which blocks must be wider to be independent.
_CORRELATED = 0.7
_MOST_TIMES_LONGER = 100


@dataclass(frozen=True, kw_only=True)
class Trend:
    """What a curve did in its last doubling of steps, or since the learning rate last changed."""

    answer: Answer
    """``flat`` only where the whole interval lies within the margin."""
    slope: Interval | None
    """Change of the value per doubling of the steps, with its 90 % interval; None where there are too few points."""
    first_step: int
    """First step that was looked at."""
    more_steps: int | None
    """With ``cannot tell yet``: about how many further steps would tell, or give enough points; None if that is not
    known, or far too many."""


def trend(
    steps: Sequence[int],
    values: Sequence[float],
    *,
    margin: float,
    since: int = 0,
    better: Literal["lower", "higher"] = "lower",
) -> Trend:
    """Say whether a curve still improves.

    The first answer has an error rate of 5 %: that share of flat curves is called ``still learning``. It is larger
    where neighbouring values are strongly correlated: at 0.9 it is 9 % of 100 values, and 21 % of 25
    (``benchmarks/trend_error_rates.py``).

    Args:
        steps: Ascending, from 1.
        values: Loss, accuracy or norm at these steps.
        margin: A change per doubling that does not matter, in the unit of the values: 1 % of the loss, or 0.2 points.
        since: Last step at which the learning rate changed: a drop of the rate is a trend of its own.
        better: Which direction is an improvement.

    Raises:
        ConfigError: The steps do not ascend, the lengths differ, a value is not finite, or the margin is not positive.
    """
    x, y = np.asarray(steps, np.float64), np.asarray(values, np.float64)
    _check(x, y, margin)
    last = float(x[-1]) if len(x) else 0.0
    first = max(float(since), last / 2)
    chosen = x > first
    x, y = np.log2(x[chosen]), y[chosen]
    fitted = _fit(x, y, _NUM_BLOCKS)
    if fitted is not None and _is_correlated(x, y, fitted[0]):
        fitted = _fit(x, y, _NUM_WIDE_BLOCKS)
    if fitted is None:
        more = _until_enough(steps, since)
        return Trend(answer="cannot tell yet", slope=None, first_step=math.ceil(first), more_steps=more)
    slope = t_interval(*fitted, level=0.9)
    sign = 1 if better == "lower" else -1
    answer: Answer = "cannot tell yet"
    if -margin < slope.low and slope.high < margin:
        answer = "flat"
    elif slope.excludes_zero:
        answer = "still learning" if sign * slope.estimate < 0 else "getting worse"
    more = _more_steps(slope, margin, last - first) if answer == "cannot tell yet" else None
    return Trend(answer=answer, slope=slope, first_step=math.ceil(first), more_steps=more)


def relative_trend(
    steps: Sequence[int], values: Sequence[float], *, margin: float = LOSS_MARGIN, since: int = 0
) -> Trend:
    """Say whether a curve of positive values still falls; as `trend`, with slope and margin as shares of the value.

    Raises:
        ConfigError: As `trend`.
    """
    first = max(since, steps[-1] / 2) if len(steps) else 0
    looked_at = [value for step, value in zip(steps, values, strict=False) if step > first]
    level = float(np.mean(looked_at or [1.0])) or 1.0  # a loss of 0 alone is flat
    return trend(steps, [value / level for value in values], margin=margin, since=since)


def loss_trend(steps: Sequence[int], losses: Sequence[float], schedule: Schedule) -> Trend:
    """Say whether a training loss still falls since the learning rate last changed; the slope is a share of the loss.

    Args:
        steps: Numbers of steps done, ascending.
        losses: Mean loss of the steps since the value before.
        schedule: Learning rate of the run.

    Raises:
        ConfigError: As `trend`.
    """
    since = schedule.last_change(steps[-1]) if len(steps) else 0
    # The first mean after the change may still have steps before it.
    return relative_trend(steps, losses, since=since and next(step for step in steps if step >= since))


def loss_line(steps: Sequence[int], losses: Sequence[float], schedule: Schedule) -> str:
    """Return `loss_trend` in words; empty while there are too few values.

    Such as ``loss 1.234, still learning (-3.1 % per doubling, 90 % interval -4.0 to -2.2)``.
    """
    found = loss_trend(steps, losses, schedule)
    if found.slope is None:
        return ""
    change, low, high = (f"{100 * x:+.1f}" for x in (found.slope.estimate, found.slope.low, found.slope.high))
    return f"loss {losses[-1]:.4g}, {found.answer} ({change} % per doubling, 90 % interval {low} to {high})"


def _fit(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], num_blocks: int) -> tuple[float, float, int] | None:
    """Return slope, standard error and degrees of freedom, by least squares on block means; None: too few points."""
    if len(x) < 2 * num_blocks or x[-1] == x[0]:
        return None
    block = np.minimum(((x - x[0]) / (x[-1] - x[0]) * num_blocks).astype(int), num_blocks - 1)
    counts = np.bincount(block, minlength=num_blocks)
    full = counts > 0
    if full.sum() < 3:
        return None
    weights = counts[full].astype(np.float64)
    centres = np.bincount(block, x, num_blocks)[full] / weights
    means = np.bincount(block, y, num_blocks)[full] / weights
    dx = centres - np.average(centres, weights=weights)
    dy = means - np.average(means, weights=weights)
    spread = float(weights @ dx**2)
    slope = float(weights @ (dx * dy)) / spread
    degrees = len(weights) - 2
    variance = float(weights @ (dy - slope * dx) ** 2) / degrees
    return slope, math.sqrt(variance / spread), degrees


def _is_correlated(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], slope: float) -> bool:
    residuals = y - slope * x
    residuals = residuals - residuals.mean()
    total = float(residuals @ residuals)
    return total > 0 and float(residuals[1:] @ residuals[:-1]) / total > _CORRELATED


def _more_steps(slope: Interval, margin: float, length: float) -> int | None:
    """Return how many more steps would tell, if the interval narrows with the root of the number of points."""
    half = slope.high - slope.estimate
    enough = max(abs(slope.estimate), margin - abs(slope.estimate))
    times = (half / enough) ** 2
    return math.ceil(length * (times - 1)) if 1 < times <= _MOST_TIMES_LONGER else None


def _until_enough(steps: Sequence[int], since: int) -> int | None:
    """Return how many more steps give enough points, if points keep coming as they came."""
    if len(steps) < 2:
        return None
    needed = 2 * _NUM_BLOCKS * float(np.median(np.diff(steps)))
    more = math.ceil(max(since + needed, 2 * needed) - steps[-1])
    return more if more > 0 else None


def _check(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], margin: float) -> None:
    if len(x) != len(y):
        raise ConfigError.of("values", len(y), f"{len(x)}, one for each step", "correct them")
    if len(x) and (x[0] < 1 or (np.diff(x) <= 0).any()):
        raise ConfigError.of("steps", "not ascending from 1", "ascending steps", "sort them")
    if not np.isfinite(y).all():
        raise ConfigError.of("values", "not all finite", "finite numbers", "leave out what diverged")
    if not margin > 0:
        raise ConfigError.of("margin", margin, "above 0: a change per doubling that does not matter")
