import os
import signal
import threading
import time

import pytest
import ray

from bit_ray.errors import StoppedError
from bit_ray.training.signals import Signals

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_local")]


@ray.remote(num_cpus=0)
def wait(seconds: float) -> None:
    time.sleep(seconds)


def send_both(signals: Signals) -> None:
    """The second when the first was heard: two that wait have no order."""
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    while not signals.first:
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)


def ask(signals: Signals, question: ray.ObjectRef) -> None:
    with signals.noted():
        ray.get(question)


def test_a_second_signal_ends_what_ray_is_asked_for_with_the_status_of_the_first() -> None:
    began, signals, question = time.monotonic(), Signals(), wait.remote(60)
    threading.Thread(target=send_both, args=(signals,), daemon=True).start()
    try:
        with pytest.raises(StoppedError, match="^ended by SIGTERM$") as caught:
            ask(signals, question)
        assert caught.value.status == 143
        assert time.monotonic() - began < 30
    finally:
        ray.cancel(question, force=True)
