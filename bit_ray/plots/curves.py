"""Loss, learning rate and accuracy of a training against its steps."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from bit_ray.plots.style import INK, SERIES, bare, heading, note


def curve_figure(
    steps: Sequence[int],
    loss: Sequence[float],
    lr: Sequence[float],
    evaluations: Sequence[tuple[int, float]] = (),
    title: str = "Training",
) -> Figure:
    """Draw loss and learning rate, and top-1 where it was evaluated, against the step.

    Args:
        steps: The logged steps, ascending.
        loss: Training loss at these steps, nats per image.
        lr: Learning rate at these steps; 0, as at the first step of a warm-up, is not on the logarithmic axis.
        evaluations: (step, top-1 as a fraction of 1), ascending.
        title: Heading.
    """
    assert len(steps) == len(loss) == len(lr)
    heights = [3.0, *([2.0] if evaluations else []), 1.4]
    figure = Figure(figsize=(7.5, 1.1 + sum(heights)), layout="constrained")
    panels = list(figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0])
    values = np.asarray(loss, np.float64)
    window = len(values) // 25 | 1
    panels[0].plot(steps, values, color=SERIES[0], alpha=0.3 if window > 1 else 1.0, linewidth=1)
    if window > 1:
        panels[0].plot(steps, _moving_average(values, window), color=SERIES[0], linewidth=2)
    heading(panels[0], title, f"thick line: mean of {window} values" if window > 1 else "")
    panels[0].set_ylabel("training loss (nats)", color=INK)
    if evaluations:
        at, top_1 = zip(*evaluations, strict=True)
        panels[1].plot(at, top_1, color=SERIES[1], linewidth=2, marker="o", markersize=4)
        panels[1].yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g}"))
        panels[1].set_ylabel("top-1 (%)", color=INK)
        note(panels[1], (at[-1], top_1[-1]), f"{top_1[-1]:.1%}", SERIES[1], (-24, -14))
    rate = np.asarray(lr, np.float64)
    positive = rate > 0
    panels[-1].plot(np.asarray(steps)[positive], rate[positive], color=INK, linewidth=1.5)
    if positive.any():
        panels[-1].set_yscale("log")
    panels[-1].set_ylabel("learning rate", color=INK)
    panels[-1].set_xlabel("optimizer step", color=INK)
    panels[-1].xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    for panel in panels:
        bare(panel)
    figure.align_ylabels(panels)
    return figure


def _moving_average(values: npt.NDArray[np.float64], window: int) -> npt.NDArray[np.float64]:
    """Mean of the ``window`` values around each value, of fewer at the ends."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    at = np.arange(len(values))
    starts, ends = np.maximum(0, at - window // 2), np.minimum(len(values), at + window // 2 + 1)
    return (sums[ends] - sums[starts]) / (ends - starts)
