import pickle
import string

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from bit_ray.errors import BitRayError, ConfigError, ModelError
from bit_ray.uris import shown, shown_in

FEW = settings(deadline=None, database=None, max_examples=300)
SCHEMES = st.sampled_from(["http", "https", "s3", "gs", "postgresql", "mysql+pymysql"])
USERS = st.text(st.sampled_from(string.ascii_letters + string.digits + "@:.+-_%"), max_size=8)
# Whatever can be typed, but no line end, and not a space first, where a password could not be told from a sentence.
PASSWORDS = st.text(st.characters(codec="utf-8", exclude_characters="\n"), min_size=6).filter(
    lambda text: not text[0].isspace()
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://alice:secret@host:5000/x", "http://***@host:5000/x"),
        ("http://alice@host", "http://***@host"),
        ("http://:secret@host", "http://***@host"),
        ("http://alice:PL/ANTED@h", "http://***@h"),
        ("http://alice:PL ANTED@h", "http://***@h"),
        ("http://alice:PL@NTED@h", "http://***@h"),
        ("http://alice:12345/ab@h", "http://***@h"),
        ("s3://AK:SECRET/with/slash@bucket/path", "s3://***@bucket/path"),
        ("mysql+pymysql://me:pw@host/db: refused", "mysql+pymysql://***@host/db: refused"),
        ("http://***@h: refused; load models:/NAME@ALIAS", "http://***@h: refused; load models:/NAME@ALIAS"),
        ("a http://u:p@a, b http://u:p@b", "a http://***@b"),
        ("s3://b/k?access_key=AK&secret_key=SK&region=r", "s3://b/k?access_key=***&secret_key=***&region=r"),
        (
            "s3://b/k?X-Amz-Credential=AK%2Fus&X-Amz-Date=1&X-Amz-Security-Token=T&X-Amz-Signature=ab: refused",
            "s3://b/k?X-Amz-Credential=***&X-Amz-Date=1&X-Amz-Security-Token=***&X-Amz-Signature=*** refused",
        ),
        ("https://h/c?sv=1&sig=ab%3D", "https://h/c?sv=1&sig=***"),
        ("postgresql://h/db?user=me&password=pw", "postgresql://h/db?user=me&password=***"),
        ("s3://b/k?endpoint_override=me:pw@h:9&scheme=http", "s3://b/k?endpoint_override=***@h:9&scheme=http"),
    ],
)
def test_what_is_secret_in_a_uri_is_masked(text: str, expected: str) -> None:
    assert shown(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "models:/digits@champion",
        "s3://bucket/sets@v2/train",
        "s3://bucket/runs?endpoint_override=127.0.0.1:9000&scheme=http",
        "http://127.0.0.1:5000: cannot be reached (connection refused)",
        "s3://bucket: no such bucket; accepted: models:/NAME@ALIAS",
        "sqlite:////home/me@work/mlflow.db",
        "file:///data/a@b.jpg",
        "/data/photos@2x/a:b@c.jpg",
        "me@example.com wrote http://example.com/a?page=2",
        "two\nlines: http://host:80\nme@example.com",
    ],
)
def test_what_is_not_secret_stays_as_it_is(text: str) -> None:
    assert shown(text) == text


@FEW
@given(
    scheme=SCHEMES, user=USERS, password=PASSWORDS, around=st.tuples(*[st.sampled_from(["", "tried ", ": not"])] * 2)
)
@example(scheme="http", user="alice", password="PL@NT ED/x?#", around=("", ""))
def test_no_password_is_left_in_any_text(scheme: str, user: str, password: str, around: tuple[str, str]) -> None:
    rest = f"{around[0]}{scheme}://***@host.example/path{around[1]}"
    assume(password not in rest)
    text = rest.replace("***", f"{user}:{password}")
    assert shown(text) == rest
    assert password not in str(ModelError(text))


@FEW
@given(
    name=st.sampled_from(["secret_key", "Access-Key", "X-Amz-Signature", "token", "PASSWORD", "sig"]),
    value=st.text(st.characters(codec="ascii", exclude_categories=["Cc"], exclude_characters=" &@"), min_size=4),
    before=st.sampled_from(["?", "?region=r&", "?a=b;", "#"]),
)
def test_no_value_of_a_setting_named_like_a_secret_is_left(name: str, value: str, before: str) -> None:
    rest = f"https://host/path{before}{name}=***&x=1"
    assert shown(rest.replace("***", value)) == rest


@FEW
@given(st.text(st.sampled_from("ab :/@?&=;#*\n") | st.characters()))
def test_masking_twice_is_masking_once(text: str) -> None:
    assert shown(shown(text)) == shown(text)


def test_a_long_hostile_text_takes_no_time() -> None:
    for part in ("://", "://a:b", "?key", "?key=", "://a:b@", "?a=@", "&secretsecret"):
        assert len(shown(part * 200_000)) > 0


def test_plain_data_are_masked_at_any_depth() -> None:
    data = {"tracking": {"uri": "http://u:pw@h"}, "shards": ["s3://b/x", ("http://u:pw@h", 1)], "lr": 0.1, "init": None}
    assert shown_in(data) == {
        "tracking": {"uri": "http://***@h"},
        "shards": ["s3://b/x", ["http://***@h", 1]],
        "lr": 0.1,
        "init": None,
    }


def test_an_error_of_ours_shows_no_password_also_after_a_journey() -> None:
    error = ConfigError("uri: http://u:secret@h refused", 3)
    assert error.args == ("uri: http://***@h refused", 3)
    assert isinstance(error, BitRayError)
    assert isinstance(error, ValueError)
    back = pickle.loads(pickle.dumps(error))
    assert (type(back), back.args) == (ConfigError, error.args)
    assert str(ModelError(" in one\nline ")) == " in one\\nline "
