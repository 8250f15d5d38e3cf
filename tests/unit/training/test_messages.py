from bit_ray.training.messages import Sign, _Messages

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
