"""The way of a worker's report to the driver: out of Ray Train's controller through a queue to terminal and MLflow.

Ray Train's controller imports this module when a run starts, so it stays free of MLflow and PyTorch.
"""

import threading
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.util.queue import Empty, Queue

from bit_ray.progress import TrainingProgress

if TYPE_CHECKING:
    from bit_ray.tracking.runs import TrackedRun


class Forward(ray.train.UserCallback):
    """Runs in Ray Train's controller and hands the reports of rank 0 to the driver."""

    def __init__(self, events: Queue):
        self._actor = events.actor

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        # Waited for: what is only on its way when the controller ends is lost.
        ray.get(self._actor.put_nowait.remote(metrics[0]))


class Listener(threading.Thread):
    """Feeds the progress display and the MLflow run from the workers' reports."""

    def __init__(self, events: Queue, run: "TrackedRun", progress: TrainingProgress):
        super().__init__(name="reports", daemon=True)
        self.events, self.tracked, self.progress = events, run, progress
        self.history: list[dict[str, Any]] = []
        self._finished = threading.Event()

    def run(self) -> None:
        while True:
            finished = self._finished.is_set()
            try:
                metrics = self.events.get(timeout=0.5)
            except Empty:
                if finished:
                    return
                continue
            self.progress.update(metrics)
            if self.history and metrics["step"] <= self.history[-1]["step"]:
                continue  # reported already, before workers were started again
            self.history.append(metrics)
            numbers = {name: value for name, value in metrics.items() if "/" in name}
            self.tracked.log_metrics(numbers, step=metrics["step"])

    def finish(self) -> None:
        """Wait until every report has been handled."""
        self._finished.set()
        self.join()
