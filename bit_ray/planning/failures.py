"""What failing nodes and checkpoints cost a training in which all workers wait for each other."""

import math


def best_interval(save_s: float, mtbf_s: float) -> float:
    """Return the seconds of training between two checkpoints that cost least together with what failures repeat.

    Young's square root with Daly's next terms (Future Generation Computer Systems 22, 2006, equation 37).

    Args:
        save_s: Seconds for which training waits for a checkpoint.
        mtbf_s: Mean seconds between two failures of the whole cluster.
    """
    if save_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = math.sqrt(save_s / (2 * mtbf_s))
    return math.sqrt(2 * save_s * mtbf_s) * (1 + ratio / 3 + ratio**2 / 9) - save_s


def slowdown(
    *, interval_s: float, save_s: float, failures_per_s: float, restart_s: float, preemptions_per_s: float = 0.0
) -> float:
    """Return how many times as long a training takes with failures; infinite if it loses more than it gains.

    Each failure costs half an interval, which is trained again, and a restart. A node that is taken away with notice
    costs a restart alone, because workers save at the next step. Nodes are replaced at once.

    Args:
        interval_s: Seconds of training between two checkpoints.
        save_s: Seconds for which training waits for one.
        failures_per_s: Of the whole cluster.
        restart_s: Seconds from a failure to the next step.
        preemptions_per_s: Of the whole cluster.
    """
    lost = failures_per_s * (interval_s / 2 + restart_s) + preemptions_per_s * restart_s
    return (1 + save_s / interval_s) / (1 - lost) if lost < 1 else math.inf
