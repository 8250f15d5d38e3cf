import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bit_ray.planning.ranges import Range, number

positive = st.floats(1e-6, 1e6)
ranges = st.tuples(positive, positive, positive).map(lambda values: Range(*sorted(values)))


@given(ranges, ranges, st.sampled_from(["times", "over", "plus", "least", "most"]))
def test_the_interval_of_a_result_holds_the_result_of_any_two_ends(a: Range, b: Range, name: str) -> None:
    plain = {
        "times": lambda x, y: x * y,
        "over": lambda x, y: x / y,
        "plus": lambda x, y: x + y,
        "least": min,
        "most": max,
    }[name]
    found = getattr(a, name)(b)
    all_of_them = [plain(x, y) for x in a for y in b]
    assert found.low == pytest.approx(min(all_of_them))
    assert found.high == pytest.approx(max(all_of_them))
    assert found.likely == pytest.approx(plain(a.likely, b.likely))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0736, "0.0736"), (2.5, "2.50"), (96, "96.0"), (1319.4, "1,319"), (math.inf, "never")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_amounts_and_times_have_the_unit_that_suits_them() -> None:
    assert Range(1.199e15, 1.319e15, 1.439e15).sized("B") == "1.32 PB (1.20 to 1.44)"
    assert Range.exactly(39_200).sized("B/s") == "39.2 kB/s"
    assert Range.exactly(0.5).sized("B") == "0.500 B"
    assert Range(108_000, 216_000, 450_000).lasting() == "2.50 days (1.25 to 5.21)"
    assert Range.exactly(0.0736).lasting() == "73.6 ms"
    assert Range.exactly(0.0).lasting() == "0 ms"
    assert Range(60, 119, math.inf).lasting() == "119 s (60.0 to never)"


def test_a_known_number_is_shown_without_an_interval() -> None:
    assert Range.exactly(8).shown("GB") == "8.00 GB"
    assert Range(1, 2, 4).shown("ms", 1e3) == "2,000 ms (1,000 to 4,000)"
