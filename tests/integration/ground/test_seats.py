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
    for each, number, fit in (
        (0.01, 5, 5),  # groups of three and two
        (1.9, 4, 2),  # two groups of two, of which 6 CPUs have room for one
    ):
        held = Seats({"CPU": each}, number)
        try:
            assert ready(held, fit) == fit
        finally:  # other tests wait for these CPUs
            held.release()
        assert held.ready() == 0
