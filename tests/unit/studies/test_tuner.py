"""What Ray Tune is given next, and what ends a study."""

from types import SimpleNamespace

from ray.tune.search import Searcher

from bit_ray.errors import ConfigError
from bit_ray.studies.tuner import Collect, Feed


def test_an_error_of_what_proposes_trials_ends_the_study_and_is_kept():
    refused = ConfigError.of("weight_decay", -1, "0 or more")

    def propose():
        raise refused

    feed = Feed([], propose)
    assert feed.suggest("trial") == Searcher.FINISHED
    assert (feed.error, feed.stopped) == (refused, True)


def test_an_error_after_a_trial_ends_the_study_without_running_the_trial_again():
    """Tune takes an exception in a callback for a failure of the trial, and starts it again."""

    def full(trial, outcome):
        raise OSError("no space left")

    feed = Feed([], None)
    trial = SimpleNamespace(config={"trial": "t"}, last_result={"outcome": 1})
    Collect(feed, {}, None, full).on_trial_complete(0, [], trial)
    assert str(feed.error) == "no space left"
    assert feed.suggest("next") == Searcher.FINISHED
