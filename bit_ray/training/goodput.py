"""Where the time of a run goes: to steps that nobody had taken before, or to faults and starts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from bit_ray.run_records import Attempt, PlannedTime

# A plan is made from the first steps: after this share of them or so many seconds, whatever comes first.
_PLAN_SHARE, _PLAN_SECONDS = 0.05, 60.0


class StepTime(NamedTuple):
    """How long the steps of one report took."""

    step: int
    """Steps taken by the run so far."""
    num_steps: int
    """Of these, those since the last report."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """The seconds of a run over all its attempts."""

    productive_s: float
    replayed_s: float
    waited_s: float
    wall_s: float
    num_attempts: int
    steps_lost: int
    sure: bool
    """Whether no more were lost: the steps since the last record of workers or a program that died are not known."""

    @property
    def share(self) -> float:
        """Productive seconds of all seconds; 0 for a run without any."""
        return self.productive_s / self.wall_s if self.wall_s else 0.0

    @property
    def other_s(self) -> float:
        """Seconds of starts, of checkpoints that training waited for, and of steps that were never reported."""
        return max(0.0, self.wall_s - self.productive_s - self.replayed_s - self.waited_s)

    def metrics(self) -> dict[str, float]:
        """Return them for MLflow."""
        return {
            "run/goodput": self.share,
            "run/wall_s": self.wall_s,
            "run/productive_s": self.productive_s,
            "run/replayed_s": self.replayed_s,
            "run/waited_s": self.waited_s,
            "run/other_s": self.other_s,
            "run/attempts": float(self.num_attempts),
            "run/steps_lost": float(self.steps_lost),
        }

    def __str__(self) -> str:
        """Return one line for people."""
        attempts = "1 attempt" if self.num_attempts == 1 else f"{self.num_attempts} attempts"
        lost = f"{'' if self.sure else 'at least '}{self.steps_lost:,} steps lost"
        return (
            f"goodput {self.share:.0%}: {self.productive_s:,.0f} s of new steps in {self.wall_s:,.0f} s; {attempts}, "
            f"{lost} ({self.replayed_s:,.0f} s again), {self.waited_s:,.0f} s without room, "
            f"{self.other_s:,.0f} s of starts and checkpoints"
        )


def goodput(attempts: Sequence[Attempt]) -> Goodput:
    """Add up the attempts of a run."""
    return Goodput(
        productive_s=sum(a.productive_s for a in attempts),
        replayed_s=sum(a.replayed_s for a in attempts),
        waited_s=sum(a.waited_s for a in attempts),
        wall_s=sum(a.wall_s for a in attempts),
        num_attempts=len(attempts),
        steps_lost=sum(a.steps_lost for a in attempts),
        sure=all(map(was_recorded, attempts[:-1])),
    )


def furthest_and_last(attempts: Sequence[Attempt], tracked: int) -> tuple[int, int]:
    """Return how far any attempt of a run has come, and how far the last one has, as far as is known.

    Args:
        attempts: What the run's folder has of them.
        tracked: Steps that the tracker knows of: it hears of each only once, but of the last attempt's before the
            folder has them.
    """
    recorded = max((attempt.last_step for attempt in attempts), default=0)
    return (tracked, tracked) if tracked > recorded or not attempts else (recorded, attempts[-1].last_step)


def was_recorded(attempt: Attempt) -> bool:
    """Whether it is known how far an attempt that is over came: neither its workers nor its program died."""
    return attempt.ended in ("left", "finished")


def lost_steps(steps: int, before: Attempt | None) -> str:
    """Say how many steps an attempt takes again, after the one before it."""
    sure = before is None or was_recorded(before)
    if not steps:
        return "no step lost" if sure else "no recorded step lost"
    return f"{'' if sure else 'at least '}{steps:,} step{'s' if steps > 1 else ''} lost"


def with_report(attempt: Attempt, furthest: int, step: int, num_steps: int, seconds: float) -> Attempt:
    """Return the attempt after a report of its workers.

    Args:
        attempt: As it was.
        furthest: Steps that any attempt had taken before.
        step: Steps taken now.
        num_steps: Of these, those since the last report.
        seconds: They took.
    """
    new = min(num_steps, max(0, step - furthest)) / num_steps if num_steps else 0.0
    return replace(
        attempt,
        last_step=max(attempt.last_step, step),
        productive_s=attempt.productive_s + seconds * new,
        replayed_s=attempt.replayed_s + seconds * (1 - new),
    )


def planned_time(times: Sequence[StepTime], num_steps: int, elapsed_s: float) -> PlannedTime | None:
    """Return how long a run will take, from its first reports; None while they are too few.

    The first report is left out: its steps wait for the first data.

    Args:
        times: The reports so far of its first attempt.
        num_steps: Of the whole run.
        elapsed_s: Seconds that it has taken so far, those of its start too.
    """
    later = [time for time in times[1:] if time.num_steps]
    steps, seconds = sum(time.num_steps for time in later), sum(time.seconds for time in later)
    if seconds <= 0 or (steps < _PLAN_SHARE * num_steps and seconds < _PLAN_SECONDS):
        return None
    left = num_steps - later[-1].step
    each = [time.seconds / time.num_steps for time in later]
    likely, low, high = (elapsed_s + left * per_step for per_step in (seconds / steps, min(each), max(each)))
    return PlannedTime(seconds=likely, low=low, high=high, source=f"its first {later[-1].step:,} steps")


def pays(num_workers: int, more: int, steps_left: int, seconds_per_step: float, seconds_of_a_start: float) -> bool:
    """Whether more workers save at least twice what their start costs.

    Args:
        num_workers: Now.
        more: Workers that could join.
        steps_left: To the end of the run.
        seconds_per_step: With the workers of now; a step is taken to be as much faster as there are more workers.
        seconds_of_a_start: From leaving to the first step of the next attempt.
    """
    saved = steps_left * seconds_per_step * more / (num_workers + more)
    return saved >= 2 * seconds_of_a_start


def as_duration(seconds: float) -> str:
    """Return seconds in the units a person would use, such as ``3 h 12 min``."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours / 24:.1f} days"


def compared(planned: PlannedTime, taken_s: float) -> str:
    """Return one line on how long a run was expected to take and took."""
    error = taken_s / planned.seconds - 1
    # Minutes would hide the error of a run of few.
    likely, low, high, taken = (
        f"{seconds:.0f} s" if taken_s < 600 else as_duration(seconds)
        for seconds in (planned.seconds, planned.low, planned.high, taken_s)
    )
    return f"planned {likely} ({low} to {high}; from {planned.source}), took {taken} ({error:+.0%})"
