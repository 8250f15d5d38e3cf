"""Probes of a run's checkpoints while it trains: on cores that do not train; training never waits for them.

The driver hears of a checkpoint when it is complete, passes its URI to a Ray actor, and records the scores at the
checkpoint's step. One probe runs at a time. When it ends, the newest checkpoint is next; those in between, which may
be deleted by then, are skipped. The actor has the lowest priority of the system, so on a busy core it gets only what
training leaves. It lives as long as the run, because starting a process costs seconds of CPU.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import ray
import torch

from bit_ray import store
from bit_ray.cluster.slots import Resources
from bit_ray.errors import BitRayError, ConfigError, root_cause
from bit_ray.evaluation.frozen import ProbeScore
from bit_ray.evaluation.probe import ProbeTask, probe, probe_metrics
from bit_ray.inference.classifier import load_model
from bit_ray.locks import scratch_directory
from bit_ray.progress import console
from bit_ray.uris import shown
from bit_ray.weights.location import DESCRIPTION_FILE

if TYPE_CHECKING:  # MLflow comes with it, and the actor needs none
    from bit_ray.tracking.runs import TrackedRun

log = logging.getLogger(__name__)

# Linux runs such a process only when nothing else wants the core.
_LOWEST = getattr(os, "SCHED_IDLE", None)


def check_room(task: ProbeTask, resources: Resources, num_workers: int) -> None:
    """Make sure that a probe finds CPUs that no worker uses.

    Raises:
        ConfigError: The cluster does not have enough.
    """
    num_cpus = task.config.num_cpus
    if num_workers + num_cpus > resources.most_cpus:
        most = max(0, resources.most_cpus - num_workers)
        accepted = f"at most {most}, the CPUs that {num_workers} training workers leave"
        remedy = "lower runtime.num_workers, or leave out probe.shards"
        raise ConfigError.of("probe.num_cpus", num_cpus, accepted, remedy)


class CheckpointProbes(threading.Thread):
    """Scores checkpoints as they arrive, in a background thread of the driver."""

    def __init__(
        self,
        task: ProbeTask,
        run: "TrackedRun",
        name: str,
        resources: Resources,
        num_workers: int,
        on_scores: Callable[[int, dict[str, float]], None] = lambda step, scores: None,
    ):
        """Start; ``num_workers`` workers train, with a GPU each if there are GPUs."""
        super().__init__(name="probes", daemon=True)
        self.history: list[tuple[int, dict[str, float]]] = []
        """Step of each probed checkpoint, and its scores by name."""
        self.num_passed_over = 0
        """Checkpoints that were not probed, because there was a newer one or they were deleted."""
        self.task = task
        self._tracked, self._title, self._on_scores = run, name, on_scores
        self._prober = ray.remote(
            num_cpus=task.config.num_cpus,
            # A GPU only if the workers leave one.
            num_gpus=1 if resources.most_gpus > num_workers else 0,
            max_restarts=-1,
            max_task_retries=1,
        )(_Prober).remote(task)
        self._changed = threading.Condition()
        self._newest: tuple[int, str] | None = None
        self._finished = self._cancelled = False
        self._running: ray.ObjectRef | None = None
        self._step = -1
        self.start()

    @property
    def needed(self) -> set[int]:
        """Steps of the checkpoints that are being probed, or will be."""
        with self._changed:
            return {self._step} | ({self._newest[0]} if self._newest is not None else set())

    def offer(self, step: int, uri: str) -> None:
        """Hand over a complete checkpoint; returns at once."""
        with self._changed:
            self.num_passed_over += self._newest is not None
            self._newest = (step, uri)
            self._changed.notify()

    def finish(self) -> None:
        """Wait until the newest checkpoint has been probed."""
        with self._changed:
            self._finished = True
            self._changed.notify()
        self.join()
        ray.kill(self._prober)

    def cancel(self) -> None:
        """End at once, even if a probe is running."""
        with self._changed:
            self._finished = self._cancelled = True
            self._newest = None
            self._changed.notify()
        ray.kill(self._prober)
        self.join()

    def run(self) -> None:
        """Probe until `finish` or `cancel`."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._newest is not None or self._finished)
                if self._newest is None:
                    return
                (step, uri), self._newest = self._newest, None
                self._step = step
                self._running = self._prober.probe.remote(uri)
            try:
                found = ray.get(self._running)
            except Exception as error:  # a probe that fails must not end a training
                if not self._cancelled:
                    reason = shown(str(root_cause(error) or error).strip().splitlines()[-1])
                    log.warning("probe of the checkpoint of step %d failed: %s; training continues", step, reason)
                continue
            finally:
                self._running = None
            if found is None:
                self.num_passed_over += 1
                continue
            scores, seconds = found
            metrics = probe_metrics(scores)
            self.history.append((step, metrics))
            try:
                self._on_scores(step, metrics)
            except BitRayError as error:
                log.warning("%s: %s; training continues", self._title, error)
            self._tracked.log_metrics({**metrics, "probe/seconds": seconds}, step=step)
            last = max(score.k for score in scores)
            ridge, knn = (metrics[f"probe/{kind}_{last}_shot"] for kind in ("ridge", "knn"))
            console.print(
                f"{self._title}: probe of step {step}  {last} per class: ridge {ridge:.1%}, neighbours {knn:.1%}  "
                f"{seconds:.1f} s"
            )


class _Prober:
    """Scores checkpoints in a separate process with the lowest priority; a Ray actor."""

    def __init__(self, task: ProbeTask):
        _step_back()
        torch.set_num_threads(task.config.num_cpus)
        self.task = task
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def probe(self, uri: str) -> tuple[list[ProbeScore], float] | None:
        """Scores of a checkpoint and the seconds they took, or None if it has been deleted."""
        started = time.perf_counter()
        with scratch_directory() as directory:
            try:
                classifier = load_model(uri, device=self.device, cache=directory)  # not used afterwards
            except (BitRayError, OSError):
                if not store.exists(store.join(uri, DESCRIPTION_FILE)):
                    return None  # the run keeps only its newest checkpoints
                raise
        return probe(classifier, self.task), time.perf_counter() - started


def _step_back() -> None:
    """Give this process the lowest priority on the machine."""
    try:
        if _LOWEST is not None:
            os.sched_setscheduler(0, _LOWEST, os.sched_param(0))
            return
    except OSError:
        pass  # a sandbox that forbids it
    os.nice(19)
