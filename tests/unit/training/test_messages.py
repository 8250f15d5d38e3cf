from dataclasses import replace

from bit_ray.training.messages import Sign, _Messages, most_behind_first, slowest

SIGN = Sign(rank=0, node_id="n", host="h", step=7, phase="computing", since_s=0.0)


def test_workers_hear_what_the_driver_has_recorded_once_it_asks_for_more():
    messages = _Messages()
    messages.signs(1)

    def recorded():
        return messages.show(1, SIGN, "").recorded

    for step in (5, 6):
        messages.send({"step": step})
    messages.send({"checkpoint": 6})
    assert recorded() == 0
    assert len(messages.take()) == 3
    assert recorded() == 0  # it may be killed before it has recorded them
    messages.send({"step": 7})
    messages.take()
    assert recorded() == 6
    messages.take()
    assert recorded() == 7
    assert messages.show(2, SIGN, "").leave


def test_the_worker_that_the_others_wait_for_is_named():
    signs = {
        0: (replace(SIGN, rank=0, step=9, phase="saving", since_s=3.0), 0.2),
        1: (replace(SIGN, rank=1, step=9), 0.2),
        2: (replace(SIGN, rank=2, step=8), 0.2),
        3: (replace(SIGN, rank=3, step=9), 7.0),
        4: (replace(SIGN, rank=4, step=7, phase="done"), 9.0),  # gives no signs any more, and nobody waits for it
    }
    assert [rank for rank, _ in most_behind_first(signs)] == [3, 2, 0, 1, 4]
    assert slowest(signs) == "worker 3 on h has been at step 9, computing, for 7 s, not heard of for 7 s"
    del signs[3], signs[2]
    assert slowest(signs) == "worker 0 on h has been at step 9, saving, for 3 s"
