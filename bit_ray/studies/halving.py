"""Early stopping by successive halving (ASHA, Li et al., arXiv 1810.05934) in which every trial ends itself.

At each rung, a share of its own steps, a trial writes its score into the study's folder and reads those of the others.
The files are all the state: a study that is started again finds the rungs as they were, and nobody stops a trial from
outside, which would leave its resources occupied.
"""

import math
from dataclasses import asdict, dataclass

from bit_ray import store

RUNGS = (0.25, 0.5)
"""Shares of a trial's steps at which it is compared."""
KEPT = 1 / 3
"""Share of the trials that goes on at each rung."""


@dataclass(frozen=True, kw_only=True)
class _Reached:
    """The content of a trial's file at a rung."""

    score: float


def rung_steps(num_steps: int) -> tuple[int, ...]:
    """Return the numbers of steps after which a trial of this length is compared; a very short one has fewer."""
    return tuple(sorted({max(1, round(share * num_steps)) for share in RUNGS} - {num_steps}))


def num_kept(number: int) -> int:
    """Return how many of so many trials go on."""
    return max(1, math.ceil(number * KEPT))


def goes_on(folder: str, rung: int, key: str, score: float) -> bool:
    """Record a trial at a rung, and return whether it is among the best of those that have reached it so far.

    Args:
        folder: URI of the study's rungs.
        rung: Number of the rung, from 0.
        key: The trial.
        score: What it has reached; higher is better, and equal scores go on together.

    Raises:
        DataError: the file of a trial is damaged.
    """
    place = store.join(folder, str(rung))
    store.write_json(store.join(place, f"{key}.json"), asdict(_Reached(score=score)))
    scores = [
        store.read_record(_Reached, store.join(place, name), "delete it").score
        for name in store.list_files(place)
        if name.endswith(".json")
    ]
    return sum(other > score for other in scores) < num_kept(len(scores))
