"""Early stopping in which every trial ends itself, against the rule worked out by hand."""

import numpy as np
import pytest

from bit_ray.errors import DataError
from bit_ray.studies.halving import goes_on, rung_steps


def test_rungs_are_shares_of_the_length_and_never_the_end():
    assert rung_steps(100) == (25, 50)
    assert rung_steps(500) == (125, 250)
    assert rung_steps(3) == (1, 2)
    assert rung_steps(2) == (1,)
    assert rung_steps(1) == ()


def test_a_trial_goes_on_while_it_is_in_the_best_third_of_those_so_far(tmp_path):
    order = [0.5, 0.4, 0.6, 0.3, 0.55, 0.6, 0.7]
    # One of the first three, two of four to six, three of seven; equal scores go on together.
    assert [goes_on(str(tmp_path), 0, f"trial-{n}", score) for n, score in enumerate(order)] == [
        True, False, True, False, True, True, True,
    ]  # fmt: skip


def test_rungs_do_not_see_each_other_and_a_second_arrival_replaces_the_first(tmp_path):
    folder = str(tmp_path)
    assert goes_on(folder, 0, "a", 0.9)
    assert goes_on(folder, 1, "b", 0.1)
    assert not goes_on(folder, 0, "b", 0.1)
    assert goes_on(folder, 0, "a", 0.8)  # killed after it had gone on
    assert sorted(path.name for path in (tmp_path / "0").iterdir()) == ["a.json", "b.json"]


def test_the_better_the_score_the_further_it_goes(tmp_path):
    scores = np.random.default_rng(0).permutation(100) / 100
    went_on = [score for n, score in enumerate(scores) if goes_on(str(tmp_path), 0, f"{n:03d}", score)]
    assert 0.99 in went_on
    assert 20 <= len(went_on) <= 40  # a third of those so far, at each of them
    assert np.mean(went_on) > 0.75


@pytest.mark.parametrize("content", [b"", b"{}", b'{"score": "x"}', b'{"score": NaN}', b"[1]"])
def test_a_damaged_file_is_named(tmp_path, content):
    goes_on(str(tmp_path), 0, "a", 0.5)
    (tmp_path / "0" / "a.json").write_bytes(content)
    with pytest.raises(DataError, match="a.json"):
        goes_on(str(tmp_path), 0, "b", 0.5)
