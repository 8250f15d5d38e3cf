"""Scores of trainings that were not run, for tests of what is said of them."""

from bit_ray.config import to_dict
from bit_ray.studies.cells import CellScore, Point
from bit_ray.studies.outcome import CellOutcome, Outcome


def score(final, points=(), **changes):
    """A score, its points as (step, values)."""
    values = {
        "identity": "0" * 64,
        "final": final,
        "points": tuple(Point(step=step, values=values) for step, values in points),
        "losses": (),
        "images": 1000,
        "device_s": 36.0,
        "decay_exposure": 0.0,
        "rate_changed_at": 0,
    }
    return CellScore(**values | changes)


def cell(key, params, score=None):
    return CellOutcome(key=key, params=params, score=score)


def outcome(kind, config, cells, **changes):
    return Outcome(kind=kind, config=to_dict(config), facts={"device": "2 CPU cores"}, cells=tuple(cells), **changes)
