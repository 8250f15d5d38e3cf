"""The engine of all studies: Ray Tune runs trials side by side, and their scores are kept, so that none runs twice.

A study has a folder, ``STORAGE/NAME``, with a score file per trial, and an MLflow run with a child run per trial. The
score files are the state: a study that is started again reads them and gives the other trials to a new Tuner. Tune's
own state is not used: it is up to ten seconds old, so that finished trials would run again after a crash.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from bit_ray import store
from bit_ray.cluster.session import cluster
from bit_ray.cluster.slots import Resources, num_local_cores
from bit_ray.errors import BitRayError, ConfigError
from bit_ray.progress import track
from bit_ray.run_folder import RunFolder
from bit_ray.studies.tuner import Collect, Feed, Trial, run_trials

if TYPE_CHECKING:  # each trial's process imports this file, and has no use for MLflow
    from _typeshed import DataclassInstance

    from bit_ray.tracking.runs import TrackedRun

S = TypeVar("S", bound="DataclassInstance")

# What Tune asks for a trial that only waits for the workers of its own Ray Train run.
_HOST_CPUS = 0.01


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a trial takes of the cluster that is a Ray Train run of its own: all workers, with their readers."""

    num_cpus: float
    num_gpus: float = 0


class Bar:
    """What one sees while trials run: how many are finished, and how long the others take.

    Args:
        title: What is running.
        unit: What is counted.
    """

    def __init__(self, title: str, unit: str) -> None:
        self._title, self._unit = title, unit

    @contextmanager
    def open(self, total: int) -> Iterator[None]:
        """Show them; ``total`` is how many will run."""
        with track(self._title, total, self._unit) as self._advance:
            yield

    def started(self, trial: Trial) -> None:
        """Note a trial that begins."""

    def finished(self, trial: Trial) -> None:
        """Note a trial that has a score, or failed."""
        self._advance(1)


class Study(Generic[S]):
    """The trials of a study and the scores so far."""

    def __init__(self, folder: RunFolder, trials: Sequence[Trial], load: Callable[[str, str], S | None]) -> None:
        """Read the scores of an earlier start.

        Args:
            folder: The study's folder.
            trials: All of them, or those that are known so far; see `run`.
            load: Reads the score of a URI and an identity; None if there is no score with this identity.
        """
        self.folder, self.load = folder, load
        self.trials: dict[str, Trial] = {}
        """Trials by key."""
        self.scores: dict[str, S] = {}
        """Score of each finished trial, by key."""
        for trial in trials:
            self.add(trial)

    def add(self, trial: Trial) -> S | None:
        """Add a trial, and return its score if it is finished already."""
        self.trials[trial.key] = trial
        score = self.load(self.folder.score(trial.key), trial.identity)
        if score is not None:
            self.scores[trial.key] = score
        return score

    def unfinished(self) -> list[Trial]:
        """Return the trials without a score, the largest first."""
        return sorted((t for key, t in self.trials.items() if key not in self.scores), key=lambda trial: -trial.size)

    def run(
        self,
        function: Callable[..., S],
        shared: Any,
        tracked: "TrackedRun",
        display: Bar,
        *,
        side_by_side: int = 0,
        num_threads: int = 0,
        keep_going: bool = False,
        need: Callable[[Resources], Need] | None = None,
        more: Callable[[], Trial | None] | None = None,
        num_more: int = 0,
        on_score: Callable[[Trial, S], None] | None = None,
    ) -> dict[str, BitRayError]:
        """Run the trials that have no score, as many at a time as the cluster has GPUs or cores.

        Args:
            function: Called in a process of Ray Tune as ``function(shared, *trial.arguments, num_threads)``; may run
                again after its process was killed.
            shared: Argument that all trials get.
            tracked: The study's MLflow run.
            display: Shows them while they run.
            side_by_side: Most trials at a time; 0: no further limit.
            num_threads: Threads of a trial without a GPU; 0: it also gets the cores that no other can use.
            keep_going: Whether the others continue after a user's mistake in one.
            need: What each trial takes of the cluster, if it starts workers; it is then never stopped from outside,
                which would leave their CPUs occupied. None: it computes in its own process.
            more: Called when there is room for one more trial than the known ones; None, or its value None, ends it.
            num_more: How many trials ``more`` will return.
            on_score: Called with each trial that is finished.

        Returns:
            The user's mistakes, by key.

        Raises:
            BitRayError: The first of them, without ``keep_going``; or there is no room for a trial.
        """
        todo = self.unfinished()
        problems: dict[str, BitRayError] = {}
        if not todo and not num_more:
            return problems
        with cluster() as resources:
            at_a_time, num_threads, asked = _room(
                resources,
                min(side_by_side or len(todo) + num_more, len(todo) + num_more),
                num_threads,
                need(resources) if need is not None else None,
            )
            with display.open(len(todo) + num_more):
                feed = Feed(todo, more)

                def finished(trial: Trial, outcome: Any) -> None:
                    if isinstance(outcome, BitRayError):
                        problems[trial.key] = outcome
                        feed.stopped |= not keep_going
                    elif isinstance(outcome, Exception):
                        raise outcome
                    else:
                        values = asdict(outcome)
                        store.write_json(self.folder.score(trial.key), values)
                        self.trials[trial.key], self.scores[trial.key] = trial, outcome
                        tracked.log_child(trial.key, params=trial.params, metrics=_numbers(values))
                        if on_score is not None:
                            on_score(trial, outcome)
                    display.finished(trial)

                collect = Collect(feed, asked, display.started, finished)
                run_trials(function, shared, num_threads, feed, collect, at_a_time, asked, stoppable=need is None)
            if feed.error is not None:
                raise feed.error
        if problems and not keep_going:
            raise next(iter(problems.values()))
        return problems


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the fractional numbers of a score, and those of its mappings by ``NAME/KEY``."""
    nested = {f"{name}/{key}": v for name, part in values.items() if isinstance(part, dict) for key, v in part.items()}
    return {name: value for name, value in {**values, **nested}.items() if isinstance(value, float)}


def room_for(resources: Resources, need: Need) -> int:
    """Return how many trials that are Ray Train runs of their own fit on a cluster at a time.

    Raises:
        ConfigError: there is no room for one.
    """
    rooms = [resources.most_cpus / (need.num_cpus + _HOST_CPUS)]
    rooms += [resources.most_gpus / need.num_gpus] if need.num_gpus else []
    if min(rooms) < 1:
        raise ConfigError.of(
            "runtime.num_workers",
            f"a trial takes {need.num_cpus:g} CPUs and {need.num_gpus:g} GPUs",
            f"at most {resources.most_cpus} and {resources.most_gpus}, all of the cluster",
            "lower num_workers, or use a larger cluster",
        )
    return int(min(rooms))


def _room(resources: Resources, most: int, num_threads: int, need: Need | None) -> tuple[int, int, dict[str, float]]:
    """Return the trials at a time, the threads of each, and the CPUs and GPUs that its process asks for.

    Raises:
        ConfigError: there is no room for one.
    """
    if need is not None:
        return min(most, room_for(resources, need)), max(1, num_threads), {"CPU": _HOST_CPUS}
    at_a_time = min(most, resources.num_slots)
    # No more than one node has: it would be waited for without end.
    of_one = resources.cpus_of_one or resources.most_cpus
    num_cpus = min(resources.most_cpus // resources.num_slots, of_one)
    if resources.most_gpus:
        return at_a_time, max(1, num_cpus), {"CPU": max(1, num_cpus), "GPU": 1}
    shared = min(num_local_cores() if resources.local else of_one, resources.num_slots // at_a_time)
    num_threads = num_threads or max(1, shared)
    return at_a_time, num_threads, {"CPU": num_cpus * num_threads}
