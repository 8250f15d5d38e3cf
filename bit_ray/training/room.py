"""Room for workers on a cluster that grows and shrinks: waiting for the first, and looking for more meanwhile."""

import time
from collections.abc import Callable

from bit_ray.cluster.seats import Seats, as_text
from bit_ray.cluster.slots import Workers
from bit_ray.progress import console
from bit_ray.training.goodput import pays

_SECONDS_BETWEEN_LOOKS = 0.25
# For a cluster that does not grow.
_SECONDS_TO_COUNT = 5.0


def wait_for_room(name: str, workers: Workers, grow_after_s: float, why: str, end_if_told: Callable[[], object]) -> int:
    """Wait until there is room for the least number of workers; return how many there is room for.

    Args:
        name: Of the run, in what is printed.
        workers: Least and most workers.
        grow_after_s: How long room that has changed must stay as it is.
        why: They are needed, in what is printed.
        end_if_told: Called again and again; may raise.
    """
    least, most, _ = workers
    began = changed = time.monotonic()
    ready, looks, next_line = 0, 0, began + 10
    seats = Seats(workers.bundle, most)
    try:
        while True:
            end_if_told()
            now, found = time.monotonic(), seats.ready()
            if found == most:
                return most
            if found != ready:
                ready, changed, looks = found, now, looks + 1
            settled = _SECONDS_TO_COUNT if looks <= 1 else grow_after_s
            if ready >= least and now - changed >= settled:
                return ready
            if now >= next_line and ready < least:
                next_line = now + 60
                console.print(
                    f"{name}: waiting for room: {ready} of {least} workers fit, each with {as_text(workers.bundle)}; "
                    f"add nodes if no autoscaler does, or lower runtime.num-workers ({why})"
                )
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    finally:
        seats.release()


class Growth:
    """Looks whether there is room for more workers that lasts, and that pays for a new start."""

    def __init__(self, workers: Workers, num_workers: int, settled_s: float) -> None:
        self._workers, self._num_workers, self._settled_s = workers, num_workers, settled_s
        self._seats: Seats | None = None
        self._ready, self._since = 0, 0.0

    def reason(self, steps_left: int, seconds_per_step: float, seconds_of_a_start: float) -> str:
        """Return why the workers should leave for a larger group; empty if they should not."""
        missing = self._workers.most - self._num_workers
        if not missing:
            return ""
        if self._seats is None:  # only now: before, they could have taken what the workers themselves needed
            self._seats = Seats(self._workers.bundle, missing)
        now, ready = time.monotonic(), self._seats.ready()
        if ready != self._ready:
            self._ready, self._since = ready, now
        if not ready or now - self._since < self._settled_s:
            return ""
        if not pays(self._num_workers, ready, steps_left, seconds_per_step, seconds_of_a_start):
            return ""
        return f"room for {ready} more worker{'s' if ready > 1 else ''}"

    def end(self) -> None:
        """Give up the room that was found."""
        if self._seats is not None:
            self._seats.release()
