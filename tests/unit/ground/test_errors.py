import pickle

import pytest

from bit_ray.data.images.decode import ImageError
from bit_ray.errors import ConfigError, DataError, one_line
from bit_ray.store import UnfitFileError
from bit_ray.training.healing import NonFiniteError


def test_the_parts_of_an_error_are_data_and_make_its_line() -> None:
    error = DataError.of("k", 5, "at most 3, the number of examples of crane", "lower it")
    assert str(error) == "k: 5; accepted: at most 3, the number of examples of crane; lower it"
    assert error.field == "k"
    assert str(ConfigError.of("init", "empty", remedy="give it")) == "init: empty; give it"
    assert str(ConfigError.of("seed", "given 'a'", "a number", "")) == "seed: given 'a'; accepted: a number"


def test_a_caller_names_the_field_as_its_user_knows_it() -> None:
    error = ConfigError.of("micro_batch_size", 3, "an even number", "add one")
    assert str(error.under("runtime")) == "runtime.micro_batch_size: 3; accepted: an even number; add one"
    assert str(error.renamed("rule.batch_size")) == "rule.batch_size: 3; accepted: an even number; add one"
    assert type(error.under("runtime")) is ConfigError
    assert str(error.under("")) == str(error)


def test_an_error_of_words_alone_has_no_field_and_keeps_its_words() -> None:
    error = ConfigError("two words")
    assert error.field == ""
    assert error.renamed("shots") is error
    assert str(error.under("runtime")) == "runtime: two words"


@pytest.mark.parametrize("error", [DataError("no image"), DataError.of("crop", 16, "32"), NonFiniteError(3)])
def test_a_subject_comes_before_the_message_once(error: DataError) -> None:
    of_task = error.about("svhn")
    assert (type(of_task), str(of_task)) == (type(error), f"svhn: {error}")
    assert of_task.about("svhn") is of_task
    assert str(of_task.about("svhn:train")) == f"svhn:train: svhn: {error}"


def test_an_error_of_a_subject_has_it_already() -> None:
    error = DataError.of("svhn", "train_32x32.mat is missing", "it", "fetch it")
    assert error.about("svhn") is error


def test_a_password_in_a_field_or_a_value_is_not_shown() -> None:
    error = ConfigError.of("uri", "https://user:secret@host", "another")
    for text in (str(error), str(error.renamed("--uri")), str(error.about("https://user:secret@host"))):
        assert "secret" not in text


@pytest.mark.parametrize(
    "error",
    [
        ConfigError.of("a", 1, "2", "set it to 2"),
        ImageError("grayscale", convertible=True),
        NonFiniteError(3),
        UnfitFileError("x.bin", "a pipe"),
        DataError("x"),
    ],
)
def test_an_error_keeps_its_parts_on_the_way_between_processes(error: DataError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))
    assert str(again.renamed("b")) == str(error.renamed("b"))


def test_the_text_of_another_library_becomes_one_line() -> None:
    database = RuntimeError(
        "(sqlite3.OperationalError) database or disk is full\n[SQL: INSERT INTO m VALUES (?)]\n[par"
    )
    assert one_line(database) == "(sqlite3.OperationalError) database or disk is full"
    assert one_line(RuntimeError("two\n  lines")) == "two lines"
    assert one_line(RuntimeError()) == "RuntimeError"
    assert one_line(RuntimeError("x" * 301)) == "x" * 297 + "..."
