"""Trials with Ray Tune: each in a process of its own, one after the other as there is room."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from bit_ray.cluster.seats import as_text, is_waited_for
from bit_ray.errors import ModelError
from bit_ray.locks import scratch_directory
from bit_ray.progress import console

# Starts of one trial's process after it was killed. A mistake or a bug is a result, and is not tried again.
_MAX_FAILURES = 3
_SECONDS_TO_FIRST_LINE = 10.0
_SECONDS_BETWEEN_LINES = 60.0
_SETTINGS_OF_TUNE = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the old output is silent when it is told to
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends a study as it ends any other command
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",
    "TUNE_WARN_THRESHOLD_S": "60",
}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training and its test."""

    key: str
    """Name of its score file and of its MLflow run; unique in the study."""
    identity: str
    """Digest of all that decides its score."""
    params: Mapping[str, Any]
    """What distinguishes it from the other trials, for the record."""
    arguments: tuple[Any, ...]
    """Arguments of the study's function, except the shared one."""
    size: float
    """How much work it is, in any unit: the largest start first, so that no core is idle at the end."""


class Feed(Searcher):
    """Gives Tune one trial after the other."""

    def __init__(self, todo: Sequence[Trial], more: Callable[[], Trial | None] | None) -> None:
        super().__init__()
        self.stopped = False
        self.error: Exception | None = None
        """What went wrong outside the processes of trials, such as a score that could not be written."""
        self._todo, self._more = list(todo), more

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """Return the next trial as the config of a trial of Tune."""
        trial = None
        if not self.stopped:
            with self.ending_all():
                trial = self._todo.pop(0) if self._todo else self._more() if self._more is not None else None
        return Searcher.FINISHED if trial is None else {"trial": trial}

    @contextmanager
    def ending_all(self) -> Iterator[None]:
        """Note an error, which ends all: Tune would run the trial again, or leave the others running."""
        try:
            yield
        except Exception as error:
            self.error, self.stopped = self.error or error, True

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Do nothing: scores are read from their files."""

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """Accept everything: what is best is not Tune's business."""
        return True

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Save nothing: the score files are the state."""

    def __reduce__(self) -> Any:
        """Return an empty one: Tune keeps a copy of its settings, for a restart that is not used."""
        return Feed, ([], None)


class Collect(tune.Callback):
    """Passes on what has come out of each trial, and says when none has room."""

    def __init__(
        self,
        feed: Feed,
        asked: Mapping[str, float],
        started: Callable[[Trial], None] | None = None,
        finished: Callable[[Trial, Any], None] | None = None,
    ) -> None:
        self._feed, self._asked, self._started, self._finished = feed, asked, started, finished
        self._next_line = 0.0

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Say that all wait for room, if they do: another job may have it."""
        states = {trial.status for trial in trials}
        now = time.monotonic()
        if "RUNNING" in states or "PENDING" not in states or not self._next_line:
            self._next_line = now + _SECONDS_TO_FIRST_LINE
        elif now >= self._next_line:
            self._next_line = now + _SECONDS_BETWEEN_LINES
            if is_waited_for(self._asked):  # not for a process that starts
                each = as_text(self._asked)
                console.print(f"trials: waiting for room for one, with {each}; add nodes, or end what takes them")

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Pass on that it begins."""
        if self._started is not None:
            with self._feed.ending_all():
                self._started(trial.config["trial"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Pass on the outcome."""
        if self._finished is not None and "outcome" in trial.last_result:
            with self._feed.ending_all():
                self._finished(trial.config["trial"], trial.last_result["outcome"])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Begin no other trial: its process ended again and again, as that of the next would."""
        self._feed.stopped = True

    def __reduce__(self) -> Any:
        """As `Feed`."""
        return Collect, (Feed([], None), {})


class _Stopper(tune.Stopper):
    """Ends the trials that still run after a problem."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Stop no single trial."""
        return False

    def stop_all(self) -> bool:
        """Return whether all must end."""
        return self._feed.stopped


def run_trials(
    function: Callable[..., Any],
    shared: Any,
    num_threads: int,
    feed: Feed,
    collect: Collect,
    at_a_time: int,
    asked: dict[str, float],
    *,
    stoppable: bool,
) -> None:
    """Run all trials of a feed.

    Args:
        function: Called in a process of its own as ``function(shared, *trial.arguments, num_threads)``.
        shared: Argument that all trials get.
        num_threads: Of a trial.
        feed: Gives the trials.
        collect: Gets what comes out.
        at_a_time: Most trials at a time.
        asked: What each asks of the cluster.
        stoppable: Whether one that runs may be stopped from outside.

    Raises:
        ModelError: the process of a trial was killed again and again.
    """
    logging.getLogger("ray.tune").setLevel(logging.ERROR)  # it misses the result files that are switched off
    with scratch_directory() as scratch, _settings(_SETTINGS_OF_TUNE):
        tuner = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(_carry_out, function=function, shared=shared, num_threads=num_threads), asked
            ),
            tune_config=tune.TuneConfig(
                search_alg=feed,
                num_samples=-1,
                max_concurrent_trials=at_a_time,
                reuse_actors=True,
                trial_name_creator=_key,
                trial_dirname_creator=_key,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(scratch),
                callbacks=[collect],
                failure_config=tune.FailureConfig(max_failures=_MAX_FAILURES),
                stop=_Stopper(feed) if stoppable else None,
                verbose=0,
            ),
        )
        errors = tuner.fit().errors
    if errors and feed.error is None:
        reason = str(errors[0]).strip().splitlines()[-1]
        raise ModelError(
            f"trials: the process of one ended {_MAX_FAILURES + 1} times (last: {reason}); accepted: processes with "
            "enough memory; lower side_by_side, and start the study again to continue it"
        )


def _key(trial: Any) -> str:
    return str(trial.config["trial"].key)


@contextmanager
def _settings(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _carry_out(config: dict[str, Any], function: Callable[..., Any], shared: Any, num_threads: int) -> None:
    """One trial, in a process of Ray Tune; what it raises is returned, as another try would raise it again."""
    try:
        outcome: Any = function(shared, *config["trial"].arguments, num_threads)
    except Exception as error:
        outcome = error
    tune.report({"outcome": outcome})
