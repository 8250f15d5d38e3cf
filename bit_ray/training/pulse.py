"""Publishes where a run is while it trains: as metrics of Ray, which Prometheus reads, and as `RunFolder.now`.

The driver has all of it: the workers do nothing for it, and it ends with the driver.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ray.util.metrics import Gauge

from bit_ray import store
from bit_ray.config import to_dict
from bit_ray.errors import BitRayError
from bit_ray.run_folder import RunFolder
from bit_ray.run_records import Now

log = logging.getLogger(__name__)

# Ray forgets a gauge that is not set again: so the values of an attempt or a run that is over do not stay.
_SECONDS_BETWEEN_VALUES = 1.0
_SECONDS_BETWEEN_RECORDS = 15.0


class Pulse(threading.Thread):
    """Tells where a run is until `end`; a failure of the store or of Ray's metrics does not concern the training."""

    def __init__(self, name: str, kind: str, folder: RunFolder, look: Callable[[], Now]) -> None:
        """``look`` returns where the run is."""
        super().__init__(name="pulse", daemon=True)
        self._tags = {"run": name, "kind": kind}
        self._folder, self._look = folder, look
        self._gauges: dict[str, Gauge] = {}
        self._ended = threading.Event()

    def run(self) -> None:
        """Show values until `end`, which shows the last ones."""
        record_at, recorded = 0.0, True
        while True:
            ended, now = self._ended.is_set(), self._look()
            self._show(now)
            if ended or time.monotonic() >= record_at:
                record_at = time.monotonic() + _SECONDS_BETWEEN_RECORDS
                recorded = self._record(now, told=not recorded)
            if ended:
                return
            self._ended.wait(_SECONDS_BETWEEN_VALUES)

    def end(self) -> None:
        """Show the last values, and no more."""
        self._ended.set()
        self.join()

    def _show(self, now: Now) -> None:
        tags = self._tags | {"attempt": str(now.attempt)}
        for name, value in values(now).items():
            self._set(name, value, tags)
        for worker in now.workers:
            of_worker = tags | {"rank": str(worker.rank), "phase": worker.phase}
            self._set("worker/step", worker.step, tags | {"rank": str(worker.rank)})
            self._set("worker/phase_s", worker.seconds, of_worker)

    def _set(self, name: str, value: float, tags: Mapping[str, str]) -> None:
        if not math.isfinite(value):
            return
        try:
            if name not in self._gauges:
                self._gauges[name] = Gauge(metric_name(name), name, tuple(tags))
            self._gauges[name].set(float(value), dict(tags))
        except Exception as error:  # whatever Ray's metrics lack here, the training does not
            log.debug("%s is not shown: %s", name, error)

    def _record(self, now: Now, *, told: bool) -> bool:
        """Write it down; return whether that worked."""
        try:
            # `bit-ray status` names one worker, and the file of a run on many stays small.
            store.write_json(self._folder.now, to_dict(replace(now, workers=now.workers[:1])))
        except BitRayError as error:
            if not told:
                log.warning("%s; the training continues", error)
            return False
        return True


def metric_name(name: str) -> str:
    """Return a metric's name in Ray: ``bit_ray_train_loss`` for ``train/loss``. Prometheus has ``ray_`` before it."""
    return "bit_ray_" + "".join(c if c.isascii() and c.isalnum() else "_" for c in name)


def values(now: Now) -> dict[str, float]:
    """Return what is known of the run as a whole, by the names that MLflow has, or would have."""
    about: dict[str, Any] = {
        "run/step": now.step,
        "run/num_steps": now.num_steps,
        "run/attempt": now.attempt,
        "run/workers": now.num_workers,
        "run/workers_wanted": now.num_workers_wanted,
        "run/goodput": now.goodput,
        "run/still_s": now.still_s,
        "run/checkpoint_age_s": now.checkpoint_age_s,
    }
    return {**now.metrics, **about}
