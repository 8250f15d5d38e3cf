"""What the trials of a sweep say: which is best, what fewer would reach, what early stopping would save."""

from collections.abc import Sequence
from typing import Any

from bit_ray.evaluation.statistics import expected_best_band, expected_choice
from bit_ray.plots.lines import Line, LinePlot
from bit_ray.studies.cells import CellScore
from bit_ray.studies.halving import RUNGS, num_kept
from bit_ray.studies.outcome import CellOutcome
from bit_ray.studies.report import Table
from bit_ray.studies.spaces import Axis, short

# A validation part in two halves: trials are ranked by both together; what a choice is worth is read on one of them
# after ranking by the other.
HALVES = ("val-a", "val-b")
SELECTED_BY = tuple(f"{name}/top_1" for name in HALVES)
"""Values whose mean a trial in memory is selected by."""
NUMBERS_OF_TRIALS = (1, 2, 5, 10, 20, 40)
_SHOWN = 10


def selected_by(score: CellScore) -> float:
    """Return the top-1 on the whole validation part, which a trial is selected by."""
    names = ("val/top_1",) if "val/top_1" in score.final else SELECTED_BY
    return sum(score.final[name] for name in names) / len(names)


def best_trial(cells: Sequence[CellOutcome]) -> CellOutcome | None:
    """Return the trial that ran to its end with the highest top-1 on the validation part; of equals, the cheapest."""
    done = [cell for cell in cells if cell.score is not None and not cell.score.stopped_at]
    return min(done, key=_rank) if done else None


def _rank(cell: CellOutcome) -> tuple[bool, float, int]:
    score = score_of(cell)
    return score.stopped_at > 0, -selected_by(score), score.images


def trials_table(done: Sequence[CellOutcome], axes: Sequence[Axis], price: float) -> Table:
    """Return the best trials."""
    rows = []
    for cell in sorted(done, key=_rank)[:_SHOWN]:
        score = score_of(cell)
        row = [cell.key, *(short(cell.params[axis.name]) for axis in axes)]
        mark = " (diverged)" if score.diverged else f" (stopped at {score.stopped_at:,})" if score.stopped_at else ""
        row += [f"{100 * selected_by(score):.1f} %{mark}"]
        row += [f"{score.images:,}", f"{score.device_s:,.1f}"]
        row += [f"{score.device_s / 3600 * price:.3g}"] if price else []
        rows.append(tuple(row))
    names = [axis.name.rpartition(".")[2] for axis in axes]
    header = ("trial", *names, "validation top-1", "images", "device s", *(("price",) if price else ()))
    return Table(title=f"The best {len(rows)} of {len(done)} trials", header=header, rows=tuple(rows))


def fewer_trials(done: Sequence[CellOutcome], name: str) -> tuple[Table, LinePlot]:
    """Return what n random trials are expected to reach, as a table and as a figure."""
    scores = [selected_by(score_of(cell)) for cell in done]
    first, second = ([score_of(cell).final[f"{half}/top_1"] for cell in done] for half in HALVES)
    images = sum(score_of(cell).images for cell in done) / len(done)
    rows, curve = [], []
    for n in [n for n in NUMBERS_OF_TRIALS if n <= len(done)]:
        band = expected_best_band(scores, n)
        read = (expected_choice(first, second, n) + expected_choice(second, first, n)) / 2
        curve.append((n, band.estimate, band.low, band.high, read))
        mark = "" if n <= len(done) / 2 else " (as measured: no more than this sample)"
        rows.append(
            (
                f"{n}{mark}",
                f"{100 * band.estimate:.1f} %",
                f"{100 * band.low:.1f} to {100 * band.high:.1f} %",
                f"{100 * read:.1f} %",
                f"{n * images:,.0f}",
            )
        )
    table = Table(
        title="What fewer trials would have reached",
        header=("trials", "expected best", "95 % band", "read on the other half", "images"),
        rows=tuple(rows),
        note="The band is exact for independent trials and holds for all numbers at once. The best of a sweep is "
        "optimistic on what it was selected by: ranked on one half of the validation part and read on the other, it is "
        "not.",
    )
    x = tuple(float(n) for n, *_ in curve)
    best = Line(
        label="selected and read on the same images",
        x=x,
        y=tuple(c[1] for c in curve),
        low=tuple(c[2] for c in curve),
        high=tuple(c[3] for c in curve),
    )
    honest = Line(label="read on the other half", x=x, y=tuple(c[4] for c in curve))
    plot = LinePlot(
        name=name,
        title="Expected best of n random trials",
        x_label="trials",
        y_label="validation top-1",
        lines=(best, honest),
        log_x=True,
        percent_y=True,
        caption="With the exact 95 % band for all numbers of trials at once.",
    )
    return table, plot


def progress_plot(done: Sequence[CellOutcome], name: str) -> LinePlot:
    """Return the best so far against the images trained on, in the order of the trials."""
    images, best, x, y = 0, 0.0, [], []
    for cell in done:
        images += score_of(cell).images
        best = max(best, selected_by(score_of(cell)) if not score_of(cell).stopped_at else 0.0)
        x.append(float(images))
        y.append(best)
    return LinePlot(
        name=name,
        title="Best trial so far",
        x_label="training images of all trials",
        y_label="validation top-1",
        lines=(Line(label="best so far", x=tuple(x), y=tuple(y)),) if x else (),
        percent_y=True,
    )


def borders(axes: Sequence[Axis], values: dict[str, Any]) -> list[str]:
    """Say which settings of the best trial are at the border of the space."""
    near = [(axis.name, end) for axis in axes if (end := axis.is_near_border(values[axis.name]))]
    return [f"The best is at the {end} border of {name}: a wider space may have a better one." for name, end in near]


def early_stopping(done: Sequence[CellOutcome]) -> str:
    """Say what successive halving at a quarter and half of each trial would have saved and thrown away."""
    alive = list(done)
    saved = 0.0
    for rung, share in enumerate(RUNGS):
        at = [(cell, score_of(cell).points[rung]) for cell in alive if len(score_of(cell).points) > rung + 1]
        if len(at) < len(alive):
            return "What early stopping would have saved cannot be said: some trials diverged or are too short."
        ranked = sorted(at, key=lambda one: -sum(one[1].values[f"{half}/top_1"] for half in HALVES))
        kept = [cell for cell, _ in ranked[: num_kept(len(ranked))]]
        saved += sum(score_of(cell).images * (1 - share) for cell in alive if cell not in kept)
        alive = kept
    best, left = best_trial(done), best_trial(alive)
    assert best is not None
    assert left is not None
    total = sum(score_of(cell).images for cell in done)
    loss = selected_by(score_of(best)) - selected_by(score_of(left))
    kept_best = (
        "would have kept the best trial"
        if left.key == best.key
        else f"would have thrown away the best trial, and its own best is {100 * loss:.1f} points below"
    )
    return (
        f"Early stopping that keeps a third at 25 % and at 50 % of each trial's steps would have saved "
        f"{100 * saved / total:.0f} % of the images and {kept_best}."
    )


def stopped_early(done: Sequence[CellOutcome]) -> str:
    """Say what early stopping has ended."""
    stopped = [score for cell in done if (score := score_of(cell)).stopped_at]
    return (
        f"Early stopping ended {len(stopped)} of {len(done)} trials at 25 % or 50 % of their steps. What they would "
        "have reached is not known; run the sweep without it, under another name, to see."
    )


def score_of(cell: CellOutcome) -> CellScore:
    """Return the score of a finished trial."""
    assert cell.score is not None
    return cell.score
