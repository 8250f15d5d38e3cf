import math

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from scipy import stats

from bit_ray.errors import ConfigError
from bit_ray.studies.spaces import Axis, parse_space, parse_values, shown

MANY = settings(deadline=None, database=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
U = np.random.default_rng(0).random(5000)
ALMOST_ONE = 1 - 2**-53
# Each test of a distribution has a fixed seed; were it random, a right one would fail once in 10,000 runs.
P = 1e-4


def axis(text):
    [found] = parse_space([f"x={text}"])
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rule.base-lr=log:1e-4:1e-1", Axis(name="rule.base_lr", kind="log", low=1e-4, high=0.1)),
        (" rule.dropout =uniform:-1:.5", Axis(name="rule.dropout", kind="uniform", low=-1, high=0.5)),
        ("shots=int:1:9", Axis(name="shots", kind="int", low=1, high=9)),
        ("rule.num-steps=logint:10:1e4", Axis(name="rule.num_steps", kind="logint", low=10, high=10_000)),
        ("a=0,0.1,1e-4,1.5E+3", Axis(name="a", kind="choice", values=(0, 0.1, 1e-4, 1500.0))),
        ("a=true,null, text,0", Axis(name="a", kind="choice", values=(True, None, "text", 0))),
        ("a=[30,60],[45],[]", Axis(name="a", kind="choice", values=([30, 60], [45], []))),
        ("a=[1e-4,1]", Axis(name="a", kind="choice", values=([1e-4, 1],))),
        ("shards=glyphs:s,glyphs:m", Axis(name="shards", kind="choice", values=("glyphs:s", "glyphs:m"))),
        ("shards=glyphs:s:val", Axis(name="shards", kind="choice", values=("glyphs:s:val",))),
        ("init=models:/a@b,s3://c/d", Axis(name="init", kind="choice", values=("models:/a@b", "s3://c/d"))),
        ("kind=log,uniform", Axis(name="kind", kind="choice", values=("log", "uniform"))),
    ],
)
def test_every_form_is_read(text, expected):
    assert parse_space([text]) == (expected,)
    assert [type(value) for value in parse_space([text])[0].values] == [type(value) for value in expected.values]


def test_the_axes_of_a_space_are_in_its_order():
    assert [a.name for a in parse_space(["b=1,2", "a=log:1:2"])] == ["b", "a"]
    assert parse_space([]) == ()


def uniform_share(text, values):
    """Where values lie in the distribution, uniform in [0, 1] if they are distributed as they say."""
    a = axis(text)
    if a.kind == "log":
        return np.log(np.array(values) / a.low) / math.log(a.high / a.low)
    return (np.array(values) - a.low) / (a.high - a.low)


@pytest.mark.parametrize("text", ["log:1e-4:1e-1", "log:1:1000", "uniform:0:0.7", "uniform:-3:5"])
def test_numbers_are_uniform_in_their_distribution(text):
    values = [axis(text).at(u) for u in U]
    assert stats.kstest(uniform_share(text, values), "uniform").pvalue > P


@pytest.mark.parametrize("text", ["int:1:6", "int:-2:2", "int:0:1", "0,0.1,0.4", "true,false"])
def test_whole_numbers_and_choices_are_equally_frequent(text):
    a = axis(text)
    values = a.values if a.kind == "choice" else range(int(a.low), int(a.high) + 1)
    drawn = [a.at(u) for u in U]
    counts = [drawn.count(value) for value in values]
    assert sum(counts) == len(U)
    assert stats.chisquare(counts).pvalue > P
    assert {type(value) for value in drawn} == {type(value) for value in values}


def test_a_whole_number_k_on_a_logarithmic_scale_has_the_width_of_k_to_k_plus_1():
    drawn = [axis("logint:2:40").at(u) for u in U]
    values = np.arange(2, 41)
    expected = np.log((values + 1) / values) / math.log(41 / 2) * len(U)
    assert stats.chisquare([drawn.count(value) for value in values], expected).pvalue > P
    assert {type(value) for value in drawn} == {int}


NUMBERS = st.floats(-1e300, 1e300, allow_subnormal=False)


@MANY
@given(st.sampled_from(["log", "uniform", "int", "logint"]), NUMBERS, NUMBERS, st.floats(0, ALMOST_ONE))
@example("uniform", -1e300, 1e300, 0.0)
@example("log", 1e-300, 1e300, 0.999)
@example("log", 1e-4, 1e-1, ALMOST_ONE)
@example("logint", 1, 3, ALMOST_ONE)
@example("int", 0, 2**50 - 1, ALMOST_ONE)
def test_a_value_is_in_its_range(kind, low, high, u):
    if kind in ("int", "logint"):
        low, high = float(math.floor(low)), float(math.floor(high))
    try:
        a = Axis(name="x", kind=kind, low=low, high=high)
    except ConfigError:
        assert low >= high or (low <= 0 and kind in ("log", "logint"))
        return
    for share in (0.0, u, ALMOST_ONE):
        assert low <= a.at(share) <= high
    assert [a.is_near_border(low), a.is_near_border(high)] == ["lower", "upper"]


@MANY
@given(st.integers(1, 50), st.floats(0, ALMOST_ONE))
def test_a_choice_is_one_of_its_values(number, u):
    a = Axis(name="x", kind="choice", values=tuple(range(number)))
    assert a.at(u) in a.values
    assert a.at(ALMOST_ONE) == number - 1


SPECS = st.text("log:unifrmt0123456789.eE-+=,[]{}&*!#'\"% \n", max_size=30)


@MANY
@given(st.one_of(st.text(max_size=30), SPECS, SPECS.map("x={}".format), SPECS.map("x=log:1:{}".format)))
@example("x=2001-99-99")
@example("x=2001-01-01")
@example("x=1.2.3e4")
@example("x=.nan")
@example("x=1e999")
@example("x=&a [*a]")
@example("x=" + "[" * 1000)
@example("x=" + "9" * 5000)
@example("x={a: 1}")
@example("x=1]\n---\n[2")
@example("x=]")
@example("x=log:nan:1")
@example("x=uniform:0:inf")
@example("x\ud800=1,\ud800")
@example("x=\x00")
def test_any_text_is_an_axis_or_one_line(text):
    try:
        [found] = parse_space([text])
    except ConfigError as caught:
        refused = str(caught)
    else:
        refused = ""
    if refused:
        assert "\n" not in refused
        assert refused.startswith("space: ")
        assert refused.count("; ") >= 2
        assert len(refused) < 400
        return
    assert found.name == text.partition("=")[0].strip().replace("-", "_")
    value = found.at(0.3)
    assert value in found.values if found.kind == "choice" else found.low <= value <= found.high


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "space: ''; accepted: SETTING=VALUES with log:LOW:HIGH, uniform:LOW:HIGH, int:LOW:HIGH, logint:LOW:HIGH, "
             "or values such as 0,0.1,0.4; correct it"),
        ("a", "space: 'a'; accepted: SETTING=VALUES"),
        ("=1,2", "space: '=1,2'; accepted: SETTING=VALUES"),
        ("a=", "space: 'a='; accepted: SETTING=VALUES"),
        ("a=,", "space: ','; accepted: values between commas"),
        ("a=1,1.0", "space: a has no values, or one twice; accepted: different values; correct it"),
        ("a=[1],[1]", "space: a has no values, or one twice"),
        ("a=uniform:1:0", "space: a from 1 to 0; accepted: a lower and a higher finite number; correct it"),
        ("a=uniform:1:1", "space: a from 1 to 1; accepted: a lower and a higher finite number; correct it"),
        ("a=uniform:0:inf", "space: a from 0 to inf; accepted: a lower and a higher finite number; correct it"),
        ("a=uniform:nan:1", "space: a from nan to 1; accepted: a lower and a higher finite number; correct it"),
        ("a=log:0:1", "space: a from 0 to 1; accepted: above 0 on a logarithmic scale; correct it"),
        ("a=logint:-1:5", "space: a from -1 to 5; accepted: above 0 on a logarithmic scale; correct it"),
        ("a=int:1:2.5", "space: a from 1 to 2.5; accepted: whole numbers; correct it"),
        ("a=logint:1.5:2", "space: a from 1.5 to 2; accepted: whole numbers; correct it"),
        ("a=log:1:x", "space: 'a=log:1:x'; accepted: log:LOW:HIGH"),
        ("a=log:1", "space: 'a=log:1'; accepted: log:LOW:HIGH"),
        ("a=log:1:2:3", "space: 'a=log:1:2:3'; accepted: log:LOW:HIGH"),
        ("a=unifrom:0:1", "space: 'a=unifrom:0:1'; accepted: log:LOW:HIGH"),
        ("a=1,{b: 2}", "space: '1,{b: 2}'; accepted: values between commas"),
        ("a=1,.nan", "space: '1,.nan'; accepted: values between commas"),
    ],
)  # fmt: skip
def test_what_cannot_be_searched_is_refused_with_field_value_and_remedy(text, message):
    with pytest.raises(ConfigError) as caught:
        parse_space([text])
    assert str(caught.value).startswith(message)
    assert str(caught.value).rpartition("; ")[2] in ("correct it", "correct them")


def test_a_setting_given_twice_is_refused_however_it_is_written():
    with pytest.raises(ConfigError, match="^space: a_b is given twice; accepted: each setting once; remove one$"):
        parse_space(["a-b=1,2", "c=1,2", "a_b=log:1:2"])


def test_true_and_1_are_different_values():
    assert axis("1,true,0,false").values == (1, True, 0, False)


def test_an_error_names_the_setting_that_the_text_came_from():
    with pytest.raises(ConfigError, match="^axes: "):
        parse_space(["a=log:0:1"], "axes")
    with pytest.raises(ConfigError, match="^axes: "):
        parse_space(["a=1,{"], "axes")
    with pytest.raises(ConfigError, match="^set: '{'; accepted: values between commas"):
        parse_values("{", "set")


@pytest.mark.parametrize(
    ("text", "value", "end"),
    [
        ("uniform:0:1", 0.049, "lower"),
        ("uniform:0:1", 0.051, ""),
        ("uniform:0:1", 0.949, ""),
        ("uniform:0:1", 0.951, "upper"),
        ("log:1e-4:1", 1.5e-4, "lower"),  # 4.4 % of four decades
        ("log:1e-4:1", 1.7e-4, ""),  # 5.8 %
        ("log:1e-4:1", 0.7, "upper"),
        ("log:1e-4:1", 0.5, ""),
        ("int:1:101", 6, ""),
        ("int:1:101", 5, "lower"),
        ("logint:1:1024", 1, "lower"),
        ("logint:1:1024", 32, ""),
        ("1,2,4", 4, ""),
    ],
)
def test_the_outer_twentieth_of_a_range_is_its_border(text, value, end):
    assert axis(text).is_near_border(value) == end


def test_values_are_shown_with_three_digits():
    assert shown({"rule.base_lr": 0.0123456, "rule.num_steps": 1000, "a": None}) == (
        "rule.base_lr 0.0123, rule.num_steps 1000, a None"
    )
