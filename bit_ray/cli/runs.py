"""``bit-ray runs diagnose``: what the records of a run say."""

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
    header = ("curve", "answer", "per doubling", "90 % interval", "since step", "more steps")
    print_table(f"{config.run}: step {found.step:,} of {found.num_steps:,}", [_row(c) for c in found.curves], header)
    console.print(
        f"Per doubling of the steps; flat: within {LOSS_MARGIN:.0%} of the loss, {100 * ACCURACY_MARGIN:g} points of "
        f"accuracy, {NORM_MARGIN:.0%} of the norm. More steps: about how many would tell."
    )
    for note in found.notes:
        console.print(note)


def _row(curve: "Curve") -> tuple[str, ...]:
    from bit_ray.studies.diagnose import round_number

    found = curve.trend
    change = interval = ""
    if found.slope is not None:
        digits, unit = (2, "points") if curve.kind == "accuracy" else (1, "%")
        change = f"{100 * found.slope.estimate:+.{digits}f} {unit}"
        interval = f"{100 * found.slope.low:+.{digits}f} to {100 * found.slope.high:+.{digits}f}"
    more = round_number(found.more_steps) if found.more_steps else ""
    return curve.name, curve.answer, change, interval, f"{found.first_step:,}", more
