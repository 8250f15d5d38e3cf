"""Is a run still learning? The trends of its recorded curves, and what they say together."""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from bit_ray import store
from bit_ray.errors import ModelError
from bit_ray.evaluation.trend import Trend, loss_trend, relative_trend, trend
from bit_ray.recipes.schedules import Schedule
from bit_ray.run_folder import RunFolder
from bit_ray.studies.config import DiagnoseConfig

Kind = Literal["loss", "accuracy", "norm"]
History = Mapping[str, Sequence[tuple[int, float]]]

LOSS, NORM = "train/loss", "train/weight_norm"
ACCURACY_MARGIN = 0.002
"""Change of an accuracy per doubling of the steps that does not matter, as a fraction of 1."""
NORM_MARGIN = 0.01
"""Change of the norm per doubling of the steps that does not matter, as a share of the norm."""

_PROBE = re.compile(r"(probe/[a-z]+)_(\d+)_shot")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A recorded curve and its trend."""

    name: str
    """Name of the metric."""
    kind: Kind
    """What it measures."""
    trend: Trend
    """Its slope is a share of the value, for an accuracy a difference of fractions of 1."""

    @property
    def answer(self) -> str:
        """The answer of the trend; a norm is neither better nor worse, it is ``shrinking`` or ``growing``."""
        other = {"still learning": "shrinking", "getting worse": "growing"} if self.kind == "norm" else {}
        return other.get(self.trend.answer, self.trend.answer)


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What the curves of a run say."""

    step: int
    """Last step whose loss is recorded; steps are counted from 1."""
    num_steps: int
    """Steps of the whole run."""
    curves: tuple[Curve, ...]
    """The loss, the probes, and the norm of the weights if it is recorded."""
    notes: tuple[str, ...]
    """Sentences on what they mean together."""


def diagnose(config: DiagnoseConfig) -> Diagnosis:
    """Read a run's plan and its recorded curves, and judge them.

    Raises:
        ModelError: There is no such run, or no loss of it is recorded yet.
        TrackingError: The server does not answer, or has no such run.
    """
    folder = RunFolder.of(config.storage, config.run)
    if not store.exists(folder.plan):
        raise _unknown(config)
    # Judging needs neither, and a wrong name is said at once.
    from bit_ray.tracking.recorded import recorded_metrics
    from bit_ray.training.run import recorded_plan

    plan, _ = recorded_plan(folder.uri)
    history = recorded_metrics(
        config.tracking, config.storage, config.run, plan.kind, f"{LOSS}|{NORM}|{_PROBE.pattern}"
    )
    if LOSS not in history:
        raise ModelError.of(
            "run", config.run, "a run with a recorded loss", "try again after its first runtime.log_every_steps steps"
        )
    return judge(history, plan.schedule)


def judge(history: History, schedule: Schedule) -> Diagnosis:
    """Judge the curves of one run.

    Args:
        history: (steps done, value) by the name of the metric, ascending; ``train/loss`` is one of them. Values that
            are not finite are left out.
        schedule: Learning rate of the run.
    """
    curves = []
    for name in sorted(history, key=_order):
        points = {step: value for step, value in history[name] if math.isfinite(value)}
        steps, values = list(points), list(points.values())
        since = schedule.last_change(steps[-1]) if steps else 0
        if name == LOSS:
            curves.append(Curve(name=name, kind="loss", trend=loss_trend(steps, values, schedule)))
        elif name == NORM:
            found = relative_trend(steps, values, margin=NORM_MARGIN, since=since)
            curves.append(Curve(name=name, kind="norm", trend=found))
        elif _PROBE.fullmatch(name):
            found = trend(steps, values, margin=ACCURACY_MARGIN, since=since, better="higher")
            curves.append(Curve(name=name, kind="accuracy", trend=found))
    step = max(step for step, _ in history[LOSS])
    return Diagnosis(
        step=step, num_steps=schedule.num_steps, curves=tuple(curves), notes=_notes(curves, step, schedule)
    )


def _order(name: str) -> tuple[int, str, int]:
    """Sort the loss first, the norm last, and the probes by their number of shots."""
    if probe := _PROBE.fullmatch(name):
        return 1, probe[1], int(probe[2])
    return (0 if name == LOSS else 2), name, 0


def _notes(curves: Sequence[Curve], step: int, schedule: Schedule) -> tuple[str, ...]:
    if step <= schedule.warmup_steps:
        return (f"The learning rate still rises, until step {schedule.warmup_steps:,}: judge the run after it.",)
    answers = {curve.kind: curve for curve in curves if curve.kind != "accuracy"}
    loss, norm = answers["loss"].trend, answers["norm"].answer if "norm" in answers else "cannot tell yet"
    drops = [at for at, _ in schedule.table() if at >= step] if schedule.kind == "staircase" else []
    if step >= schedule.num_steps:
        drop = "the run has ended"
    elif schedule.kind == "cosine":
        drop = "the rate falls at every step, which lowers a loss by itself"
    else:
        drop = f"the next drop of the rate is after step {drops[0]:,}" if drops else "no drop of the rate is left"
    if loss.answer == "flat" and norm == "flat":
        return (f"Neither the loss nor the norm of the weights moves: at this rate little is left to learn; {drop}.",)
    if loss.answer == "flat":
        moves = "cannot be judged yet" if norm == "cannot tell yet" else f"is still {norm}"
        return (
            f"The loss is flat, but the norm of the weights {moves}: a flat stretch alone is no sign of convergence. "
            "BiT's progress looked flat after 8 GPU-weeks and was clear after 8 GPU-months (paper §4.2, Figure 7).",
            f"{drop[0].upper()}{drop[1:]}.",
        )
    if loss.answer == "still learning":
        if drops:
            drop += "; a drop that comes too early costs accuracy in the end (paper §4.2, Figure 7)"
        return (f"The loss still falls; {drop}.",)
    if loss.answer == "getting worse":
        usual = drops and schedule.last_change(step) <= schedule.warmup_steps
        return (f"The loss rises{', as is usual at a high rate before its drop' if usual else ''}; {drop}.",)
    left = f"the run has {schedule.num_steps - step:,} left" if step < schedule.num_steps else "the run has ended"
    more = f"about {round_number(loss.more_steps)} more steps would tell" if loss.more_steps else "more steps may tell"
    return (f"The loss cannot be judged yet: {more}, and {left}.",)


def round_number(number: int) -> str:
    """Return a number with two significant digits, such as ``1,200``."""
    return f"{float(f'{number:.2g}'):,.0f}"


def _unknown(config: DiagnoseConfig) -> ModelError:
    """Return the error for a name that no run has, with the names near it."""
    names = difflib.get_close_matches(config.run, store.list_tree(config.storage, recursive=False)[1])
    near = [name for name in names if store.exists(RunFolder.of(config.storage, name).plan)]
    return ModelError.of(
        "run",
        config.run,
        f"the name of a run in {config.storage}" + (f", such as {' or '.join(near)}" if near else ""),
        "correct it, or give the folder of the runs by --storage",
    )
