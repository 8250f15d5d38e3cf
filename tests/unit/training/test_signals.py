import os
import signal
import time

import pytest

from bit_ray.errors import StoppedError
from bit_ray.training.signals import Signals


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # until the main thread has heard it


def interrupt_twice(signals):
    with signals.noted():
        assert not signals.end_if_told(saved=True)
        send(signal.SIGINT)
        assert signals.end_if_told(saved=False)
        with pytest.raises(StoppedError):
            signals.end_if_told(saved=True)
        send(signal.SIGTERM)
        pytest.fail("not heard")


def test_the_first_signal_is_noted_and_the_second_ends_what_the_main_thread_waits_for():
    before, signals = signal.getsignal(signal.SIGINT), Signals()
    with pytest.raises(StoppedError, match="^interrupted$") as caught:
        interrupt_twice(signals)
    assert caught.value.status == 130
    assert signals.first == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is before
