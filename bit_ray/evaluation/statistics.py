"""Statistics of a few runs per setting: intervals, comparisons, and the expected best of n random trials.

With 3 to 5 seeds only Student's t keeps its level: a percentile bootstrap over 3 seeds claims a difference between
equal settings in 20 % of the cases. Pure functions of numbers; no Ray, no MLflow, no PyTorch.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import betainc, betaincinv, stdtr, stdtrit

from bit_ray.errors import ConfigError

_CALIBRATION_DRAWS = 20_000
_LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate with its confidence interval."""

    estimate: float
    """The most likely value."""
    low: float
    """Lower end."""
    high: float
    """Upper end."""

    @property
    def excludes_zero(self) -> bool:
        """Whether the sign of the value is certain at the level of the interval."""
        return self.low > 0 or self.high < 0


def t_interval(estimate: float, error: float, degrees: int, level: float = _LEVEL) -> Interval:
    """Return Student's t interval of an estimate.

    Args:
        estimate: The estimate.
        error: Its standard error.
        degrees: Degrees of freedom of the standard error.
        level: Share of such intervals that contain the true value.

    Raises:
        ConfigError: The level is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise ConfigError.of("level", level, "between 0 and 1, such as 0.95")
    half = float(stdtrit(degrees, (1 + level) / 2)) * error
    return Interval(estimate=estimate, low=estimate - half, high=estimate + half)


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the mean of independent values with Student's t interval.

    Args:
        values: One per seed, or one per task.

    Raises:
        ConfigError: There are fewer than two values.
    """
    _check_count("values", values, 2)
    sd = float(np.std(values, ddof=1))
    return t_interval(float(np.mean(values)), sd / math.sqrt(len(values)), len(values) - 1)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A standard deviation with the degrees of freedom it was estimated with."""

    sd: float
    """Standard deviation of one run."""
    degrees: int
    """Degrees of freedom."""


def pooled_spread(cells: Sequence[Sequence[float]]) -> Spread:
    """Return the spread over seeds that several settings have in common; more certain than each setting's own.

    Args:
        cells: The values of each setting, one per seed. A cell of one value adds nothing.

    Raises:
        ConfigError: No setting has two values.
    """
    degrees = sum(len(cell) - 1 for cell in cells if len(cell))
    if degrees < 1:
        raise ConfigError.of("cells", "one value each", "at least one setting with two seeds", "run more seeds")
    squares = sum(float(np.sum((np.asarray(cell) - np.mean(cell)) ** 2)) for cell in cells if len(cell))
    return Spread(sd=math.sqrt(squares / degrees), degrees=degrees)


def difference(first: Sequence[float], second: Sequence[float], spread: Spread) -> Interval:
    """Return mean(first) - mean(second) of independent runs, with the t interval of a common spread.

    Args:
        first: Values of one setting, one per seed.
        second: Of the other.
        spread: From `pooled_spread` over all settings of the study, or over these two.

    Raises:
        ConfigError: One of them is empty.
    """
    _check_count("first", first, 1)
    _check_count("second", second, 1)
    error = spread.sd * math.sqrt(1 / len(first) + 1 / len(second))
    return t_interval(float(np.mean(first) - np.mean(second)), error, spread.degrees)


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Return the mean of first - second with its t interval, for runs that share seeds, draws or tasks in pairs.

    Raises:
        ConfigError: The lengths differ, or there are fewer than two pairs.
    """
    if len(first) != len(second):
        raise ConfigError.of("second", f"{len(second)} values", f"{len(first)}, one for each of the first", "pair them")
    return mean_interval([a - b for a, b in zip(first, second, strict=True)])


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Return p-values adjusted for their number (Holm 1979): below alpha, one false claim in all has probability alpha.

    Raises:
        ConfigError: A value is no probability.
    """
    for p in p_values:
        if not 0 <= p <= 1:
            raise ConfigError.of("p_values", p, "0 to 1")
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return tuple(adjusted)


def p_value(estimate: float, error: float, degrees: int) -> float:
    """Return the two-sided p-value of a t statistic.

    Args:
        estimate: The difference.
        error: Its standard error.
        degrees: Degrees of freedom.
    """
    if error == 0:
        return 1.0 if estimate == 0 else 0.0
    return float(2 * stdtr(degrees, -abs(estimate / error)))


def expected_best(scores: Sequence[float], n: int) -> float:
    """Return the expected best score of n random trials, without bias (Tang et al., ACL 2020).

    At n = N it is the maximum of the sample, with no information beyond it: show it up to n = N / 2.

    Args:
        scores: Of N independent random trials. Trials of TPE, of a Sobol sequence or of early stopping are not.
        n: Number of trials, 1 to N.

    Raises:
        ConfigError: N is out of range.
    """
    ordered = np.sort(np.asarray(scores, np.float64))
    return float(_weights_of_best(len(ordered), n) @ ordered)


def expected_choice(ranked: Sequence[float], read: Sequence[float], n: int) -> float:
    """Return the expected second score of the trial whose first score is the best of n random trials.

    Chosen by one half of a validation set and read on the other, the score of a choice is not optimistic.

    Args:
        ranked: Scores to choose by, of N independent random trials.
        read: Scores to report of the same trials.
        n: As `expected_best`.

    Raises:
        ConfigError: N is out of range, or the lengths differ.
    """
    if len(ranked) != len(read):
        raise ConfigError.of("read", f"{len(read)} scores", f"{len(ranked)}, one for each that is ranked", "pair them")
    first, second = np.asarray(ranked, np.float64), np.asarray(read, np.float64)
    # Trials of equal rank are chosen with equal probability.
    _, inverse = np.unique(first, return_inverse=True)
    means = np.bincount(inverse, second) / np.bincount(inverse)
    return float(_weights_of_best(len(first), n) @ means[np.sort(inverse)])


def _weights_of_best(total: int, n: int) -> npt.NDArray[np.float64]:
    """Return the probability that each of the ordered scores, lowest first, is the best of n drawn from them."""
    _check_n(n, total)
    # C(i - 1, n - 1) / C(N, n) for i = n .. N, each from the one after it: the binomials themselves overflow.
    weights = np.zeros(total)
    weights[-1] = n / total
    for i in range(total - 2, n - 2, -1):
        weights[i] = weights[i + 1] * (i + 2 - n) / (i + 1)
    return weights


def expected_best_band(scores: Sequence[float], n: int) -> Interval:
    """Return `expected_best` with an exact band, valid for all n at once whatever the distribution of the scores.

    The band of the distribution function is that of the order statistics, F(x_(i)) ~ Beta(i, N + 1 - i), with equal
    tails (Lourie, Cho and He 2023, arXiv 2311.09480). A bootstrap band fails: 51 % cover at n = N = 40.

    Args:
        scores: As `expected_best`, in [0, 1].
        n: As `expected_best`.

    Raises:
        ConfigError: N or a score is out of range.
    """
    ordered = np.sort(np.asarray(scores, np.float64))
    total = len(ordered)
    estimate = expected_best(scores, n)
    if ordered[0] < 0 or ordered[-1] > 1:
        raise ConfigError.of("scores", f"{ordered[0]:g} to {ordered[-1]:g}", "0 to 1", "divide percentages by 100")
    low_cdf, high_cdf = _cdf_band(total)
    widths = np.diff(np.concatenate([[0.0], ordered, [1.0]]))
    # E[max of n] = 1 - integral of F(x)^n over [0, 1].
    return Interval(estimate=estimate, low=float(1 - widths @ high_cdf**n), high=float(1 - widths @ low_cdf**n))


@functools.lru_cache(maxsize=64)
def _cdf_band(total: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the bounds of the distribution function between neighbouring order statistics, both ``[N + 1]``.

    Their tails are such that all N order statistics are within their bounds with probability 0.95.
    """
    uniform = np.sort(np.random.default_rng(0).random((_CALIBRATION_DRAWS, total)), axis=1)
    ranks = np.arange(1, total + 1)
    below = betainc(ranks, total + 1 - ranks, uniform)
    tail = np.quantile(np.minimum(below, 1 - below).min(axis=1), 1 - _LEVEL)
    low = betaincinv(ranks, total + 1 - ranks, tail)
    high = betaincinv(ranks, total + 1 - ranks, 1 - tail)
    return np.concatenate([[0.0], low]), np.concatenate([high, [1.0]])


def _check_count(name: str, values: Sequence[float], least: int) -> None:
    if len(values) < least:
        raise ConfigError.of(name, f"{len(values)} values", f"at least {least}", "run more seeds")


def _check_n(n: int, total: int) -> None:
    if not 1 <= n <= total:
        raise ConfigError.of("n", n, f"1 to {total}, the number of trials", "lower it, or run more")
