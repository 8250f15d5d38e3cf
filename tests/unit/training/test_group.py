import signal
import threading
from types import SimpleNamespace

import pytest

from bit_ray.errors import StoreError
from bit_ray.run_folder import RunFolder
from bit_ray.training import group
from bit_ray.training.group import Fit


def test_a_storage_that_ray_cannot_write_to_is_an_error_of_one_line():
    def trainer(worker):
        raise OSError("AWS Error NETWORK_CONNECTION during\nCreateMultipartUpload")

    fit = Fit(SimpleNamespace(folder=RunFolder("s3://b/runs/x")), trainer)
    fit.run()
    assert isinstance(fit.error, StoreError)
    assert str(fit.error).startswith("s3://b/runs/x: ")
    assert "\n" not in str(fit.error)
    assert fit.error.passing


class Told(Exception):
    """What the handler of a signal raises."""


def test_a_group_that_runs_has_not_ended_because_a_signal_came_while_it_was_waited_for(monkeypatch):
    may_end, freed = threading.Event(), []

    def told(number, frame):
        raise Told

    before = signal.signal(signal.SIGALRM, told)
    fit = Fit(SimpleNamespace(folder=None), lambda worker: SimpleNamespace(fit=lambda: may_end.wait(30)))
    fit.start()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(Told):
            fit.wait(10)
        assert not fit.wait(0)
        fit.group_id = "of this group"
        monkeypatch.setattr(group, "free_group", lambda group_id: (freed.append(group_id), may_end.set()))
        fit.end()
        assert fit.wait(0)
        assert freed == ["of this group"]
    finally:
        signal.signal(signal.SIGALRM, before)
        may_end.set()
