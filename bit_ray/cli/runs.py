"""``bit-ray runs ...``: what the records of runs say."""

from typing import TYPE_CHECKING

from bit_ray.progress import console, print_table
from bit_ray.studies.config import DiagnoseConfig

if TYPE_CHECKING:
    from bit_ray.studies.diagnose import Curve


def diagnose(config: DiagnoseConfig) -> None:
    """Print the trend of each curve, and what they mean together."""
    from bit_ray.evaluation.trend import LOSS_MARGIN
    from bit_ray.studies.diagnose import ACCURACY_MARGIN, NORM_MARGIN, diagnose

    found = diagnose(config)
    header = ("curve", "answer", "per doubling", "since", "more")
    print_table(f"{config.run}: step {found.step:,} of {found.num_steps:,}", [_row(c) for c in found.curves], header)
    console.print(
        "per doubling of the steps, with its 90 % interval; since: the first step looked at; more: about how many "
        f"steps would tell\nflat: within {100 * LOSS_MARGIN:g} % of the loss, {100 * ACCURACY_MARGIN:g} points of "
        f"accuracy, {100 * NORM_MARGIN:g} % of the norm"
    )
    for note in found.notes:
        console.print(note)


def _row(curve: "Curve") -> tuple[str, ...]:
    from bit_ray.studies.diagnose import round_number

    found = curve.trend
    change = ""
    if found.slope is not None:
        digits, unit = (2, "points") if curve.kind == "accuracy" else (1, "%")
        estimate, low, high = (
            f"{100 * x:+.{digits}f}" for x in (found.slope.estimate, found.slope.low, found.slope.high)
        )
        change = f"{estimate} {unit} ({low} to {high})"
    more = round_number(found.more_steps) if found.more_steps else ""
    # The room of its name left out, which a terminal of 80 columns has no space for.
    return curve.name.partition("/")[2], curve.answer, change, f"{found.first_step:,}", more
