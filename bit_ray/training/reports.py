"""Sends a worker's metrics to the driver, which shows them and passes them to MLflow."""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ray
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bit_ray.data.stream.requests import BadExample
from bit_ray.evaluation.trend import loss_line
from bit_ray.progress import TrainingProgress, console
from bit_ray.recipes.schedules import Schedule

if TYPE_CHECKING:
    from bit_ray.tracking.runs import TrackedRun


def report_queue() -> Queue:
    """Queue of metrics from rank 0 to the driver, on the driver's node, so no other node's failure ends it.

    Not ``ray.train.report``, which its controller collects every two seconds and which blocks the worker until then.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})


class Listener(threading.Thread):
    """Feeds the progress display and the MLflow run from the workers' reports."""

    def __init__(
        self,
        reports: Queue,
        run: "TrackedRun",
        progress: TrainingProgress,
        schedule: Schedule,
        on_checkpoint: Callable[[int], None],
    ):
        """``on_checkpoint`` gets the step of each complete checkpoint; it must not wait."""
        super().__init__(name="reports", daemon=True)
        self.reports, self.tracked, self.progress, self.on_checkpoint = reports, run, progress, on_checkpoint
        self.schedule = schedule
        self.history: list[dict[str, Any]] = []
        self.bad_images: list[BadExample] = []
        self._finished = threading.Event()

    def run(self) -> None:
        """Handle reports until `finish`."""
        while True:
            finished = self._finished.is_set()
            try:
                metrics = self.reports.get(timeout=0.5)
            except Empty:
                if finished:
                    return
                continue
            if "checkpoint" in metrics:
                self._show_trend(metrics["checkpoint"])
                self.on_checkpoint(metrics["checkpoint"])
                continue
            self.bad_images += metrics.pop("bad_images")
            self.progress.update(metrics)
            if self.history and metrics["step"] <= self.history[-1]["step"]:
                continue  # reported already, before workers were started again
            self.history.append(metrics)
            numbers = {name: value for name, value in metrics.items() if "/" in name}
            self.tracked.log_metrics(numbers, step=metrics["step"])

    def _show_trend(self, step: int) -> None:
        """Print whether the loss still falls, once there are enough values."""
        if not self.history or self.history[-1]["step"] != step:
            return  # reported already, before workers were started again
        steps, losses = zip(*((m["step"], m["train/loss"]) for m in self.history), strict=True)
        if line := loss_line(steps, losses, self.schedule):
            console.print(f"{self.progress.title}: step {step}: {line}")

    def finish(self) -> None:
        """Wait until every report has been handled."""
        self._finished.set()
        self.join()
