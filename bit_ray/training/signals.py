"""Ctrl-C and SIGTERM while a run trains: it saves first."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from bit_ray.errors import StoppedError


class Signals:
    """SIGINT and SIGTERM to this process."""

    def __init__(self) -> None:
        self._heard: list[int] = []

    @property
    def first(self) -> int:
        """Number of the first that came; 0: none."""
        return self._heard[0] if self._heard else 0

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note the first signal instead of ending at once; only the main thread can.

        Raises:
            StoppedError: There was another one, wherever the main thread was, such as at a store that does not answer.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def hear(number: int, _: FrameType | None) -> None:
            self._heard.append(number)
            if len(self._heard) > 1:
                raise self._stopped()

        before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        except KeyboardInterrupt as error:
            if isinstance(error, StoppedError) or not self._heard:
                raise
            raise self._stopped() from None  # Ray makes another one of what a handler raises while it is asked
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def end_if_told(self, *, saved: bool) -> bool:
        """Return whether the process was asked to end.

        Raises:
            StoppedError: There is nothing to save, or it was asked twice.
        """
        if self._heard and (saved or len(self._heard) > 1):
            raise self._stopped()
        return bool(self._heard)

    def _stopped(self) -> StoppedError:
        return StoppedError(self.first, "interrupted" if self.first == signal.SIGINT else "ended by SIGTERM")
