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


def send(*numbers: int) -> None:
    for number in numbers:
        time.sleep(0.5)
        os.kill(os.getpid(), number)


def ask(signals: Signals, question: ray.ObjectRef) -> None:
    with signals.noted():
        ray.get(question)


def test_a_second_signal_ends_what_ray_is_asked_for_with_the_status_of_the_first() -> None:
    began, question = time.monotonic(), wait.remote(60)
    threading.Thread(target=send, args=(signal.SIGTERM, signal.SIGINT)).start()
    try:
        with pytest.raises(StoppedError, match="^ended by SIGTERM$") as caught:
            ask(Signals(), question)
        assert caught.value.status == 143
        assert time.monotonic() - began < 30
    finally:
        ray.cancel(question, force=True)
