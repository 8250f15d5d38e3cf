"""``bit-ray runs ...``: what the records of runs say."""

from typing import TYPE_CHECKING

from bit_ray.progress import console, print_table
from bit_ray.studies.config import DiagnoseConfig
from bit_ray.training.config import StatusConfig

if TYPE_CHECKING:
    from bit_ray.run_folder import Attempt
    from bit_ray.studies.diagnose import Curve


def status(config: StatusConfig) -> None:
    """Print where all runs stand, or where one does and what its attempts cost."""
    from bit_ray.errors import BitRayError
    from bit_ray.training.goodput import goodput
    from bit_ray.training.status import run_status, run_statuses

    if config.run:
        try:
            found = run_status(config.storage, config.run)
        except BitRayError as error:
            raise error.about("run") from None
        console.print(
            f"{found.name}: {found.state}, {found.kind} of {found.model}, saved after step {found.saved_step:,} of "
            f"{found.num_steps:,}" + (f", by {found.holder}" if found.holder else "")
        )
        if found.attempts:
            header = ("attempt", "workers", "steps", "lost", "starting s", "all s", "ended", "why it began")
            print_table("Attempts", [_attempt(attempt) for attempt in found.attempts], header)
            console.print(str(goodput(found.attempts)))
        if found.left_out:
            batches = [(f"{batch.step:,}", f"{len(batch.images):,}", batch.why) for batch in found.left_out]
            print_table("Left out", batches, ("step", "images", "why"))
        return
    all_runs, damaged = run_statuses(config.storage)
    rows: list[tuple[str, ...]] = [
        (
            run.name,
            run.state,
            run.kind,
            run.model,
            f"{run.saved_step:,}/{run.num_steps:,}",
            str(len(run.attempts)) if run.attempts else "",
            f"{run.goodput:.0%}" if run.attempts else "",
        )
        for run in all_runs
    ]
    if rows:
        columns = ("run", "state", "kind", "model", "saved step", "attempts", "goodput")
        print_table(f"Runs in {config.storage}", rows, columns)
    else:
        console.print(f"{config.storage}: no runs")
    for line in damaged:
        console.print(f"warning: {line}")


def _attempt(attempt: "Attempt") -> tuple[str, ...]:
    return (
        str(attempt.number),
        str(attempt.num_workers),
        f"{attempt.first_step:,} to {attempt.last_step:,}",
        f"{attempt.steps_lost:,}",
        f"{attempt.starting_s:,.0f}",
        f"{attempt.wall_s:,.0f}",
        attempt.ended,
        attempt.why,
    )


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
