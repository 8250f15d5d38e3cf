import pickle

from bit_ray.errors import ConfigError, DataError


def test_the_parts_of_an_error_are_data_and_make_its_line() -> None:
    error = DataError.of("k", 5, "at most 3, the number of examples of crane", "lower it")
    assert str(error) == "k: 5; at most 3, the number of examples of crane; lower it"
    assert error.field == "k"


def test_a_caller_names_the_field_as_its_user_knows_it() -> None:
    error = ConfigError.of("micro_batch_size", 3, "an even number", "add one")
    assert str(error.under("runtime")) == "runtime.micro_batch_size: 3; an even number; add one"
    assert str(error.renamed("rule.batch_size")) == "rule.batch_size: 3; an even number; add one"
    assert type(error.under("runtime")) is ConfigError
    assert str(error.under("")) == str(error)


def test_an_error_of_words_alone_has_no_field_and_stays_as_it_is() -> None:
    error = ConfigError("two words")
    assert error.field == ""
    assert error.renamed("shots") is error
    assert error.under("runtime") is error


def test_an_error_keeps_its_parts_on_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(ConfigError.of("a", 1, "2", "set it to 2")))
    assert (error.field, str(error), str(error.renamed("b"))) == ("a", "a: 1; 2; set it to 2", "b: 1; 2; set it to 2")
