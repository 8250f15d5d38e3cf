"""Uncertainty of a metric from the choice of the test set: bootstrap intervals from a few counts."""

import numpy as np
import numpy.typing as npt

from bit_ray.errors import DataError
from bit_ray.evaluation.metrics import ClassificationMetrics

Interval = tuple[float, float]

# Counts of a resample that are held at a time, 32 MiB: a thousand resamples of 21,843 classes are half a gigabyte.
_MOST_COUNTS = 2**22
_TAIL = 0.025
_NEAR = 5


def bootstrap_intervals(
    metrics: ClassificationMetrics, *, num_resamples: int = 1000, seed: int = 0
) -> dict[str, Interval]:
    """Return 95 % percentile bootstrap intervals (Efron 1979): the spread of each metric over resampled test sets.

    A resample draws as many examples as there are, with replacement. A metric depends only on the number of examples of
    each kind, so these numbers are drawn, from the multinomial distribution. For top-1, top-5 and the mean per class
    (kinds: true class, and whether right, near or wrong) that is exactly the bootstrap, without keeping the examples in
    memory. A cross-entropy is drawn as the mean of its bin, which is 2 % wide. Where all or none are right, all
    resamples are the same; there the limits are exact (Clopper and Pearson 1934), with the smallest class's size for
    every class.

    Args:
        metrics: The counts over all examples.
        num_resamples: Resampled test sets; with 1,000, another seed moves a limit by about 2 % of the interval's width.
        seed: Seed of the draws.

    Returns:
        Lower and upper limit of ``top_1``, ``top_5``, ``cross_entropy`` and, with one label per image,
        ``mean_per_class``, which is over the classes that a resample has.

    Raises:
        DataError: No example was counted.
    """
    if metrics.num_examples == 0:
        raise DataError("num_examples: 0; accepted: at least 1; the data set or the split is empty")
    rng = np.random.default_rng(seed)
    values = {**_accuracies(metrics, num_resamples, rng), "cross_entropy": _losses(metrics, num_resamples, rng)}
    total = metrics.class_total[metrics.class_total > 0]
    sizes = {"top_1": metrics.num_examples, "mean_per_class": len(total) * total.min(initial=metrics.num_examples)}
    if metrics.num_classes > _NEAR:  # else no top-5 can be wrong
        sizes["top_5"] = metrics.num_examples
    return {name: _limits(drawn, sizes.get(name)) for name, drawn in values.items()}


def _limits(drawn: npt.NDArray[np.float64], num_examples: int | None) -> Interval:
    """Return the limits of what was drawn; of a share of some examples, also where it is always 0 or always 1."""
    low, high = (float(limit) for limit in np.quantile(drawn, (_TAIL, 1 - _TAIL)))
    if num_examples and low == high == 1:
        low = _TAIL ** (1 / num_examples)
    elif num_examples and low == high == 0:
        high = 1 - _TAIL ** (1 / num_examples)
    return low, high


def _accuracies(
    metrics: ClassificationMetrics, num_resamples: int, rng: np.random.Generator
) -> dict[str, npt.NDArray[np.float64]]:
    """Top-1, top-5 and mean per class of each resample, ``[R]`` each."""
    right, near, total = metrics.class_correct, metrics.class_top_5, metrics.class_total
    if metrics.multi_label:
        right, near, total = (np.array([n]) for n in (metrics.num_top_1, metrics.num_top_5, metrics.num_examples))
    cells = np.stack([right, near - right, total - near], axis=1)[total > 0]
    size = max(1, _MOST_COUNTS // cells.size)
    parts = []
    for start in range(0, num_resamples, size):
        count = min(size, num_resamples - start)
        drawn = rng.multinomial(metrics.num_examples, cells.ravel() / metrics.num_examples, count)
        drawn = drawn.reshape(count, *cells.shape)
        totals = drawn.sum(axis=2)
        shares = np.divide(drawn[..., 0], totals, out=np.zeros(totals.shape), where=totals > 0)
        top_1 = drawn[..., 0].sum(axis=1) / metrics.num_examples
        top_5 = drawn[..., :2].sum(axis=(1, 2)) / metrics.num_examples
        parts.append(np.stack([top_1, top_5, shares.sum(axis=1) / (totals > 0).sum(axis=1)]))
    names = ("top_1", "top_5") if metrics.multi_label else ("top_1", "top_5", "mean_per_class")
    return dict(zip(names, np.concatenate(parts, axis=1), strict=False))


def _losses(metrics: ClassificationMetrics, num_resamples: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Cross-entropy of each resample, ``[R]``."""
    used = metrics.loss_total > 0
    drawn = rng.multinomial(metrics.num_examples, metrics.loss_total[used] / metrics.num_examples, num_resamples)
    cross_entropies: npt.NDArray[np.float64] = drawn @ (metrics.loss_sum[used] / metrics.loss_total[used])
    return cross_entropies / metrics.num_examples
