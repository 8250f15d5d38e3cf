"""The engine of all studies: it runs trials in parallel on the cluster, and keeps their scores, so none runs twice.

A study has a folder, ``STORAGE/NAME``, with a score file per trial, and an MLflow run with a child run per trial.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import ray

from bit_ray import store
from bit_ray.cluster.session import cluster
from bit_ray.cluster.slots import Resources, num_local_cores
from bit_ray.cluster.tasks import each
from bit_ray.errors import BitRayError, root_cause
from bit_ray.progress import track
from bit_ray.run_folder import RunFolder
from bit_ray.tracking.runs import TrackedRun

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

S = TypeVar("S", bound="DataclassInstance")


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


class Study(Generic[S]):
    """The trials of a study and the scores so far."""

    def __init__(self, folder: RunFolder, trials: Sequence[Trial], load: Callable[[str, str], S | None]) -> None:
        """Read the scores of an earlier start.

        Args:
            folder: The study's folder.
            trials: All of them.
            load: Reads the score of a URI and an identity; None if there is no score with this identity.
        """
        self.folder, self.trials = folder, trials
        found = {trial.key: load(folder.score(trial.key), trial.identity) for trial in trials}
        self.scores: dict[str, S] = {key: score for key, score in found.items() if score is not None}
        """Score of each finished trial, by key."""

    def run(
        self,
        function: Callable[..., S],
        shared: Any,
        tracked: TrackedRun,
        *,
        title: str,
        unit: str,
        side_by_side: int = 0,
        num_threads: int = 0,
        keep_going: bool = False,
    ) -> dict[str, BitRayError]:
        """Run the trials that have no score, as many at a time as the cluster has GPUs or cores.

        Args:
            function: Called in a Ray task as ``function(shared, *trial.arguments, num_threads)``; may run again.
            shared: Argument that all trials get.
            tracked: The study's MLflow run.
            title: What is running, for the display.
            unit: What the display counts.
            side_by_side: Most trials at a time; 0: no further limit.
            num_threads: Threads of a trial without a GPU; 0: it also gets the cores that no other can use.
            keep_going: Whether the others continue after a user's mistake in one.

        Returns:
            The user's mistakes, by key.

        Raises:
            BitRayError: The first of them, without ``keep_going``.
        """
        todo = sorted((trial for trial in self.trials if trial.key not in self.scores), key=lambda trial: -trial.size)
        params = {trial.key: trial.params for trial in todo}
        problems: dict[str, BitRayError] = {}
        if not todo:
            return problems
        with cluster() as resources:
            at_a_time = min(side_by_side or resources.num_slots, resources.num_slots, len(todo))
            num_threads, options = _share(resources, at_a_time, num_threads)
            ref = ray.put(shared)
            tasks = ((function, ref, trial.key, trial.arguments, num_threads) for trial in todo)
            outcomes = each(_carry_out, tasks, at_a_time, cancel=True, **options)
            try:
                with track(title, len(todo), unit) as advance, closing(outcomes):
                    for key, outcome in outcomes:
                        if isinstance(outcome, BitRayError):
                            if not keep_going:
                                raise outcome
                            problems[key] = outcome
                        else:
                            values = asdict(outcome)
                            store.write_json(self.folder.score(key), values)
                            self.scores[key] = outcome
                            numbers = {name: v for name, v in values.items() if isinstance(v, float)}
                            tracked.log_child(key, params=params[key], metrics=numbers)
                        advance(1)
            except ray.exceptions.RayError as error:
                raise root_cause(error) or error from None
        return problems


def _share(resources: Resources, at_a_time: int, num_threads: int) -> tuple[int, dict[str, int]]:
    """Return the threads of a trial, and the CPUs and GPUs that it asks Ray for."""
    num_cpus = resources.num_cpus // resources.num_slots
    if resources.num_gpus:
        return max(1, num_cpus), {"num_cpus": max(1, num_cpus), "num_gpus": 1}
    num_threads = num_threads or max(1, min(num_local_cores(), resources.num_slots // at_a_time))
    return num_threads, {"num_cpus": num_cpus * num_threads, "num_gpus": 0}


def _carry_out(
    function: Callable[..., S], shared: Any, key: str, arguments: tuple[Any, ...], num_threads: int
) -> tuple[str, S | BitRayError]:
    """One trial; a user's mistake is returned, not raised, because it does not affect the other trials."""
    try:
        return key, function(shared, *arguments, num_threads)
    except BitRayError as error:
        return key, error
