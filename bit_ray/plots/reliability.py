"""Accuracy against confidence."""

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from bit_ray.plots.style import GRAY, INK, SERIES, WRONG, bare, heading

if TYPE_CHECKING:  # PyTorch comes with it
    from bit_ray.evaluation.metrics import Calibration


def reliability_figure(calibration: "Calibration", title: str = "Reliability") -> Figure:
    """Draw accuracy against confidence, the gap between the two, and how many predictions each bin has.

    Args:
        calibration: As `ClassificationMetrics.calibration` returns it.
        title: Heading.
    """
    figure = Figure(figsize=(5.6, 6.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    left, width = calibration.edges[:-1], np.diff(calibration.edges)
    used = calibration.counts > 0
    accuracy, confidence = calibration.accuracy[used], calibration.confidence[used]
    style: dict[str, Any] = {"width": 0.94 * width[used], "align": "center"}
    centers = (left + width / 2)[used]
    above.plot([0, 1], [0, 1], color=GRAY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    above.bar(centers, accuracy, color=SERIES[0], label="accuracy", zorder=2, **style)
    above.bar(
        centers,
        confidence - accuracy,
        bottom=accuracy,
        color=WRONG,
        alpha=0.25,
        edgecolor=WRONG,
        label="gap to the mean confidence",
        zorder=3,
        **style,
    )
    above.set_xlim(0, 1)
    above.set_ylim(0, 1)
    above.set_ylabel("accuracy", color=INK)
    above.legend(frameon=False, loc="upper left", labelcolor=INK)
    total = calibration.counts.sum()
    share = calibration.counts[used] / total
    below.bar(centers, share, color=GRAY, **style)
    below.set_ylabel("predictions", color=INK)
    below.set_xlabel("confidence: probability of the predicted class", color=INK)
    for axes in (above, below):
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        bare(axes)
    below.yaxis.set_major_locator(MaxNLocator(3))
    below.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    mean_accuracy, mean_confidence = (float(values @ share) for values in (accuracy, confidence))
    subtitle = (
        f"ECE {calibration.error:.1%} in {len(width)} bins · accuracy {mean_accuracy:.1%}, confidence "
        f"{mean_confidence:.1%} · {total:,} predictions"
    )
    heading(above, title, subtitle)
    figure.align_ylabels([above, below])
    return figure
