"""Sends a worker's metrics to the driver, which shows them and passes them to MLflow."""

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from bit_ray import log_lines
from bit_ray.data.stream.requests import BadExample
from bit_ray.evaluation.trend import loss_line
from bit_ray.progress import TrainingProgress, console
from bit_ray.recipes.schedules import Schedule
from bit_ray.run_records import LeftOut
from bit_ray.training.checkpoint.state import Report
from bit_ray.training.goodput import StepTime
from bit_ray.training.messages import Messages

if TYPE_CHECKING:
    from bit_ray.tracking.runs import TrackedRun

_SECONDS_BETWEEN_LOOKS = 0.25


class Listener(threading.Thread):
    """Feeds the progress display and the MLflow run from the workers' reports."""

    def __init__(
        self,
        messages: Messages,
        run: "TrackedRun",
        progress: TrainingProgress,
        schedule: Schedule,
        on_checkpoint: Callable[[int], None],
        on_left_out: Callable[[LeftOut], None],
    ):
        """``on_checkpoint`` gets the step of each complete checkpoint, once; ``on_left_out`` what is not trained on."""
        super().__init__(name="reports", daemon=True)
        self.messages, self.tracked, self.progress, self.on_checkpoint = messages, run, progress, on_checkpoint
        self.on_left_out, self.schedule = on_left_out, schedule
        self.history: list[dict[str, Any]] = []
        self.last: dict[str, Any] = {}
        """The newest report, also of steps that are taken again."""
        self.bad_images: list[BadExample] = []
        self.go_back: LeftOut | None = None
        """The batch to go back behind, which the workers have left for."""
        self._times: dict[int, list[StepTime]] = {}
        self._last_checkpoint = -1
        self._rounds = threading.Condition()
        self._num_rounds = 0
        self._finished = threading.Event()

    def run(self) -> None:
        """Handle reports until `finish`."""
        while True:
            finished = self._finished.is_set()
            for report in self.messages.take():
                self._handle(report)
            with self._rounds:
                self._num_rounds += 1
                self._rounds.notify_all()
            if finished:
                return
            self._finished.wait(_SECONDS_BETWEEN_LOOKS)

    def times_of(self, attempt: int) -> list["StepTime"]:
        """Return how long the reported steps of an attempt took."""
        return list(self._times.get(attempt, ()))

    def settle(self) -> None:
        """Wait until all reports that were sent before this call are handled."""
        with self._rounds:
            before = self._num_rounds  # the round under way may have looked already
            while self.is_alive() and self._num_rounds < before + 2:
                self._rounds.wait(1.0)

    def _handle(self, report: dict[str, Any]) -> None:
        if "checkpoint" in report:
            if report["checkpoint"] > self._last_checkpoint:  # it was told already before workers were started again
                self._last_checkpoint = report["checkpoint"]
                self._show_trend(report["checkpoint"])
                self.on_checkpoint(report["checkpoint"])
            return
        if "left_out" in report:
            entry: LeftOut = report["left_out"]
            if entry.went_back:
                self.go_back = entry
            else:
                self.on_left_out(entry)
            return
        self.bad_images += report.pop("bad_images")
        log_lines.about(attempt=report["attempt"], step=report["step"])
        self._times.setdefault(report.pop("attempt"), []).append(
            StepTime(report["step"], report.pop("num_new_steps"), report.pop("seconds"))
        )
        self.progress.update(report)
        self.last = report
        self._record(report)

    def recover(self, reports: Sequence[Report]) -> None:
        """Record what a checkpoint says was reported, if no driver has recorded it; workers must not run meanwhile."""
        for report in reports:
            self._record({"step": report.step, **report.metrics})

    def _record(self, report: dict[str, Any]) -> None:
        if self.history and report["step"] <= self.history[-1]["step"]:
            return  # reported already, before workers were started again
        self.history.append(report)
        numbers = {name: value for name, value in report.items() if "/" in name}
        self.tracked.log_metrics(numbers, step=report["step"])

    def _show_trend(self, step: int) -> None:
        """Print whether the loss still falls, once there are enough values."""
        told = [m for m in self.history if m["step"] <= step]
        if line := loss_line([m["step"] for m in told], [m["train/loss"] for m in told], self.schedule):
            console.print(f"{self.progress.title}: step {step}: {line}")

    def finish(self) -> None:
        """Wait until every report has been handled."""
        self._finished.set()
        self.join()
