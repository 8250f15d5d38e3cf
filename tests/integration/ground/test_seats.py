import time

import pytest

from bit_ray.cluster import seats
from bit_ray.cluster.seats import Seats

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]


def ready(held: Seats, expected: int) -> int:
    deadline = time.monotonic() + 30
    while held.ready() != expected and time.monotonic() < deadline:
        time.sleep(0.05)
    return held.ready()


def test_room_for_many_workers_is_counted_in_groups_of_several(
    ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seats, "_MOST_GROUPS", 2)
    few = Seats({"CPU": 0.01}, 5)
    assert ready(few, 5) == 5
    few.release()
    many = Seats({"CPU": 1.9}, 5)  # groups of three and two workers, and 6 CPUs
    assert ready(many, 3) == 3
    many.release()
    assert many.ready() == 0
