"""What one sees of a study while it runs: on a terminal a table that stays up to date, elsewhere lines."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from rich.live import Live
from rich.table import Table
from rich.text import Text

from bit_ray.progress import console
from bit_ray.studies.cells import CellScore
from bit_ray.studies.engine import Bar, Study
from bit_ray.studies.spaces import short, shown
from bit_ray.studies.tuner import Trial
from bit_ray.training.goodput import as_duration

_RECENT = 8


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What the trainings of a study are compared by."""

    measures: tuple[str, ...]
    """Names of values at the end; their mean counts."""
    better: Literal["higher", "lower"] = "higher"
    """Which values are better."""

    def value(self, score: CellScore) -> float | None:
        """Return the value of a training; None if it was not measured, or did not run to its end."""
        values = [score.final[name] for name in self.measures if name in score.final]
        return None if score.stopped_at or len(values) < len(self.measures) else sum(values) / len(values)


class Display(Bar):
    """State of the trainings, the best so far, and what is left to do and to pay.

    Args:
        title: What is running.
        goal: What they are compared by.
        price: Of an hour of a device; 0: money is not shown.
        study: Its trials and scores; trials may join.
    """

    def __init__(self, title: str, goal: Goal, price: float, study: Study[CellScore]) -> None:
        super().__init__(title, "trainings")
        self._goal, self._price, self._study = goal, price, study
        self._total = 0
        self._running: dict[str, float] = {}
        self._recent: list[str] = []
        self._at_a_time = 1
        self._is_table = sys.stdout.isatty()

    @contextmanager
    def open(self, total: int) -> Iterator[None]:
        """Show them: on a terminal the table, elsewhere lines with a count."""
        self._total = len(self._study.scores) + total
        if self._is_table:
            # Warnings stand above the table, but not those that go into a file.
            above = sys.stderr.isatty()
            with Live(get_renderable=self.table, console=console, refresh_per_second=1, redirect_stderr=above):
                yield
        else:
            with super().open(total):
                yield

    def started(self, trial: Trial) -> None:
        """Note a training that begins."""
        self._running[trial.key] = time.monotonic()
        self._at_a_time = max(self._at_a_time, len(self._running))

    def finished(self, trial: Trial) -> None:
        """Note a training that has a score, or failed."""
        self._running.pop(trial.key, None)
        score = self._study.scores.get(trial.key)
        if score is None:
            return
        self._recent = [*self._recent[-_RECENT + 1 :], trial.key]
        if not self._is_table:
            values = ", ".join(f"{name} {value:.4g}" for name, value in score.final.items() if "/" in name)
            console.print(f"{shown(trial.params)}: {values}{_end(score)}; {self.left()}")
            super().finished(trial)

    def left(self) -> str:
        """Return what is left to do, in time and money."""
        trials, scores = self._study.trials, self._study.scores
        number = self._total - len(scores)
        per_image = sum(s.device_s for s in scores.values()) / max(1, sum(s.images for s in scores.values()))
        waiting = [trial.size for key, trial in trials.items() if key not in scores]
        # Those that are not proposed yet are taken to be as large as the others.
        size = sum(waiting) + (number - len(waiting)) * sum(t.size for t in trials.values()) / len(trials)
        device_s = per_image * size
        text = f"{number} left, {as_duration(device_s / max(1, min(self._at_a_time, number)))}"
        return text + (f", {device_s / 3600 * self._price:.2f} to pay" if self._price else "")

    def table(self) -> Table:
        """Return the table as of now, what matters most at its top: a small terminal shows no more."""
        title = Text("\n".join(filter(None, (self._headline(), self._best()))), no_wrap=False, overflow="fold")
        table = Table(title=title, title_justify="left", title_style="bold")
        for name in ("training", "state", " and ".join(self._goal.measures)):
            table.add_column(name, overflow="fold")
        for key, since in self._running.items():
            table.add_row(self._name(key), f"running, {as_duration(time.monotonic() - since)}", "")
        for key in reversed(self._recent):
            score = self._study.scores[key]
            value = self._goal.value(score)
            state = f"done in {as_duration(score.device_s)}{_end(score)}"
            table.add_row(self._name(key), state, "" if value is None else short(value))
        return table

    def _name(self, key: str) -> str:
        """What distinguishes a training, by the last parts of the names where these differ."""
        params = self._study.trials[key].params
        last = {name.rpartition(".")[2]: value for name, value in params.items()}
        return shown(last if len(last) == len(params) else params)

    def _headline(self) -> str:
        done = f"{self._title}: {len(self._study.scores)} of {self._total} done"
        return f"{done}, {self.left()}" if self._study.scores else done

    def _best(self) -> str:
        values = {key: value for key, s in self._study.scores.items() if (value := self._goal.value(s)) is not None}
        if not values:
            return ""
        key = (max if self._goal.better == "higher" else min)(values, key=lambda key: values[key])
        return f"best so far: {self._name(key)}: {short(values[key])}"


def _end(score: CellScore) -> str:
    return " (diverged)" if score.diverged else f" (stopped at step {score.stopped_at:,})" if score.stopped_at else ""
