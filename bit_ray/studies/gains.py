"""What a sweep gains over the rule, on the test set and as expected of n trials, and what it costs."""

import math
from collections.abc import Sequence

import numpy as np

from bit_ray.evaluation.statistics import Interval, expected_choice, mean_interval, paired_difference, t_interval
from bit_ray.plots.lines import Line, LinePlot
from bit_ray.studies.cells import CellScore
from bit_ray.studies.outcome import CellOutcome
from bit_ray.studies.report import Table
from bit_ray.studies.trials import HALVES, NUMBERS_OF_TRIALS, selected_by


def scores_by_seed(cells: Sequence[CellOutcome], what: str) -> dict[int, CellScore]:
    """Return the scores by seed."""
    found = {cell.params["seed"]: cell.score for cell in cells if cell.params["what"] == what}
    return {seed: score for seed, score in sorted(found.items()) if score is not None}


def verdict(
    name: str, trials: Sequence[CellOutcome], rule: dict[int, CellScore], best: dict[int, CellScore], price: float
) -> tuple[list[str], tuple[str, ...], float | None]:
    """Return sentences, a row of the table, and the regret of the rule on the test set."""
    rule_top_1, best_top_1 = ([score.final["test/top_1"] for score in scores.values()] for scores in (rule, best))
    images = sum(cell.score.images for cell in trials if cell.score is not None)
    seconds = sum(cell.score.device_s for cell in trials if cell.score is not None)
    said, regret, text = [], None, ""
    if len(rule) >= 2 and rule.keys() == best.keys():
        found = paired_difference(best_top_1, rule_top_1)
        regret, text = found.estimate, f"{points(found.estimate)} ({points(found.low)} to {points(found.high)})"
        cost = f"{images:,} images, {seconds / 3600:.2f} device-hours{_money(seconds, price)}"
        if found.excludes_zero:
            better = "better" if found.estimate > 0 else "worse"
            said.append(
                f"{name}: a sweep of {len(trials)} trials costs {cost} and is {points(abs(found.estimate))} {better} "
                f"than the rule on the test set (95 % interval of the difference {points(found.low)} to "
                f"{points(found.high)})."
            )
        else:
            most = max(abs(found.low), abs(found.high))
            said.append(
                f"{name}: a sweep of {len(trials)} trials costs {cost}; on the test set no difference from the rule is "
                f"seen, less than {points(most)} (95 % interval)."
            )
    row = (
        name,
        _mean(rule_top_1),
        _mean(best_top_1),
        text,
        f"{max(score.images for score in rule.values()):,}" if rule else "",
        f"{images:,}",
        f"{sum(score.device_s for score in rule.values()) / len(rule):,.1f}" if rule else "",
        f"{seconds:,.0f}",
    )
    return said, row, regret


def gains(
    name: str, number: int, trials: Sequence[CellOutcome], rule: list[CellScore], price: float
) -> tuple[Table, list[str], LinePlot]:
    """Return what a sweep of n trials is expected to gain over the rule on the validation part, and what it costs."""
    scores = [cell.score for cell in trials if cell.score is not None]
    by_rule = [selected_by(score) for score in rule]
    images = sum(score.images for score in scores) / len(scores)
    seconds = sum(score.device_s for score in scores) / len(scores)
    rows, sentences, curve = [], [], []
    numbers = [n for n in NUMBERS_OF_TRIALS if n <= len(scores) / 2]
    for n in numbers:
        gain = _expected_gain(scores, n, by_rule)
        curve.append((float(n), gain))
        cost = f"{n * images:,.0f} images, {n * seconds / 3600:.3f} device-hours{_money(n * seconds, price)}"
        rows.append((str(n), points(gain.estimate), f"{points(gain.low)} to {points(gain.high)}", cost))
        if n in (5, 20) or n == numbers[-1]:
            half = (gain.high - gain.low) / 2
            sentences.append(
                f"{name}: a sweep of {n} trials costs {cost} and is expected to gain {points(gain.estimate)} ± "
                f"{points(half)} over the rule on the validation part."
            )
    table = Table(
        title=f"{name}: expected gain of a sweep over the rule, on the validation part",
        header=("trials", "expected gain", "95 % interval", "cost"),
        rows=tuple(rows),
        note="Trials are ranked on one half of the validation part and read on the other. Interval: jackknife over "
        "trials and t over the seeds of the rule. Shown up to half of the trials, beyond which it is only this sample.",
    )
    line = Line(
        label="expected gain",
        x=tuple(n for n, _ in curve),
        y=tuple(100 * gain.estimate for _, gain in curve),
        low=tuple(100 * gain.low for _, gain in curve),
        high=tuple(100 * gain.high for _, gain in curve),
    )
    plot = LinePlot(
        name=f"gain-{number}",
        title=f"{name}: expected gain of n trials over the rule",
        x_label="trials",
        y_label="validation top-1 above the rule, points",
        lines=(line,),
        log_x=True,
    )
    return table, sentences, plot


def _expected_gain(scores: list[CellScore], n: int, by_rule: list[float]) -> Interval:
    """Expected top-1 of the best of n trials, selected on one half and read on the other, above the rule's mean."""
    first, second = ([score.final[f"{half}/top_1"] for score in scores] for half in HALVES)

    def read(a: Sequence[float], b: Sequence[float]) -> float:
        return (expected_choice(a, b, n) + expected_choice(b, a, n)) / 2

    without = [read([*first[:i], *first[i + 1 :]], [*second[:i], *second[i + 1 :]]) for i in range(len(first))]
    total = len(without)
    variance = (total - 1) / total * float(np.sum((np.asarray(without) - np.mean(without)) ** 2))
    error = math.sqrt(variance + float(np.var(by_rule, ddof=1)) / len(by_rule))
    return t_interval(read(first, second) - float(np.mean(by_rule)), error, len(by_rule) - 1)


def _mean(values: list[float]) -> str:
    if len(values) < 2:
        return f"{100 * values[0]:.1f} %" if values else ""
    found = mean_interval(values)
    return f"{100 * found.estimate:.1f} ± {100 * (found.high - found.estimate):.1f} %"


def points(value: float) -> str:
    """Return a share in percentage points."""
    return f"{100 * value:.1f} points"


def _money(seconds: float, price: float) -> str:
    return f", {seconds / 3600 * price:.2f} to pay" if price else ""
