"""How often the answers of `bit-ray runs diagnose` are wrong: error rates of `trend` on curves whose truth is known.

python benchmarks/trend_error_rates.py

A curve has the value 1 at its last step, changes by 0, -1, -2 or -5 % per doubling of the steps, and has noise of 2 %,
each value correlated with the one before by 0, 0.5 or 0.9. Its values are equally far apart, as those of a training; so
many of them lie in the last doubling of steps. The margin is 1 % per doubling, so -1 % is its edge. Prints the share of
each answer as a Markdown table. *test on the points* is the share in which a plain test of a falling trend on the
single values, at the same level of 5 %, claims one.
"""

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import tyro
from scipy import signal, stats

from bit_ray.evaluation.trend import Trend, trend

ANSWERS = ("still learning", "flat", "getting worse", "cannot tell yet")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure error rates."""

    num_curves: int = 4000
    """Curves of each row."""
    points: tuple[int, ...] = (25, 100, 400)
    """Values in the last doubling."""
    changes: tuple[float, ...] = (0.0, -0.01, -0.02, -0.05)
    """Changes per doubling of the steps."""
    correlations: tuple[float, ...] = (0.0, 0.5, 0.9)
    """Correlations of neighbouring values."""
    noise: float = 0.02
    """Standard deviation of a value."""
    margin: float = 0.01
    """Change per doubling that does not matter."""
    seed: int = 0
    """Seed of the noise."""


def noise(rng: np.random.Generator, size: int, correlation: float) -> npt.NDArray[np.float64]:
    """Stationary noise of standard deviation 1."""
    white = rng.normal(size=size) * math.sqrt(1 - correlation**2)
    white[0] /= math.sqrt(1 - correlation**2)
    return np.asarray(signal.lfilter([1], [1, -correlation], white))


def falls_on_points(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> bool:
    return bool(stats.linregress(x, y, alternative="less").pvalue < 0.05)


def measure(config: Config, change: float, correlation: float, points: int) -> str:
    """One row of the table."""
    rng = np.random.default_rng([config.seed, points, round(1000 * abs(change)), round(10 * correlation)])
    steps = np.arange(1, 2 * points + 1)
    last = slice(points, None)
    x = np.log2(steps / steps[-1])
    answers: Counter[str] = Counter()
    naive = 0
    for _ in range(config.num_curves):
        values = 1 + change * x + config.noise * noise(rng, len(steps), correlation)
        found: Trend = trend(steps, values, margin=config.margin)
        answers[found.answer] += 1
        naive += falls_on_points(x[last], values[last])
    shares = " | ".join(f"{answers[answer] / config.num_curves:.1%}" for answer in ANSWERS)
    return f"| {change:.0%} | {correlation:g} | {points} | {shares} | {naive / config.num_curves:.1%} |"


def main(config: Config) -> None:
    print(f"| change | correlation | values | {' | '.join(ANSWERS)} | test on the points |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for change in config.changes:
        for correlation in config.correlations:
            for points in config.points:
                print(measure(config, change, correlation, points), flush=True)
    error = math.sqrt(0.05 * 0.95 / config.num_curves)
    print(f"\n{config.num_curves:,} curves a row: the standard error of a share of 5 % is {error:.2%}.")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
