"""What came out of a study: all that its report is made from."""

from dataclasses import dataclass
from typing import Any, Literal

from bit_ray.studies.cells import CellScore

Kind = Literal["grid", "sweep", "compare"]
_LISTED = 10


@dataclass(frozen=True, kw_only=True)
class CellOutcome:
    """One training of a study."""

    key: str
    """Name of its score and of its MLflow run."""
    params: dict[str, Any]
    """What distinguishes it from the others."""
    score: CellScore | None
    """None if it is not finished."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """All that the report of a study is made from, as MLflow has it."""

    format: Literal[1] = 1
    kind: Kind
    """What makes its report."""
    config: dict[str, Any]
    """The user's settings."""
    facts: dict[str, str]
    """Where and with what it was run."""
    cells: tuple[CellOutcome, ...]
    """Its trainings, in order."""
    missing: tuple[str, ...] = ()
    """What is left to do beyond the cells, in words."""


def missing(outcome: Outcome) -> tuple[str, ...]:
    """Return what is left to do, in words."""
    keys = [cell.key for cell in outcome.cells if cell.score is None]
    more = len(keys) - _LISTED
    rest = (f"{more} more of {len(outcome.cells)} trainings: not finished",) if more > 0 else ()
    return (*(f"{key}: not finished" for key in keys[:_LISTED]), *rest, *outcome.missing)


def settings_of(outcome: Outcome) -> dict[str, str]:
    """Return where a study was run, and its settings, as text."""
    given = {name: str(value) for name, value in outcome.config.items() if value not in ("", [], None)}
    return {**outcome.facts, **given}
