"""One function over many tasks: in this process, or as Ray tasks with a bounded number in flight."""

from collections.abc import Callable, Generator, Iterable, Sequence
from itertools import islice
from typing import Any, TypeVar

from bit_ray.cluster.slots import Resources
from bit_ray.errors import BitRayError, ConfigError, root_cause

# More parts than slots, so that a slow one does not delay the end; a small set does not need so many.
_PARTS_PER_SLOT, _SMALL = 4, 64
T = TypeVar("T")
Item = TypeVar("Item")


def each(
    function: Callable[..., T],
    tasks: Iterable[tuple[Any, ...]],
    num_workers: int,
    *,
    num_cpus: int = 1,
    num_gpus: int = 0,
    cancel: bool = False,
) -> Generator[T, None, None]:
    """Yield ``function(*task)`` for every task: in order in this process, or as they finish from Ray.

    Args:
        function: importable by name, its result and arguments picklable; may run twice if a worker dies.
        tasks: taken one by one, only when a worker is free.
        num_workers: Ray tasks in flight, on the cluster of ``RAY_ADDRESS`` or one started here; 0 is this process.
        num_cpus: CPUs of a task.
        num_gpus: GPUs of a task.
        cancel: Whether tasks that still run at the end are cancelled instead of waited for.

    Raises:
        ConfigError: num_workers is negative.
        BitRayError: from the function, without a remote traceback. No task is still running then.
    """
    if num_workers < 0:
        raise ConfigError.of("num_workers", num_workers, "0 (this process) or more")
    if num_workers == 0:
        for task in tasks:
            yield function(*task)
        return
    import ray

    from bit_ray.cluster.session import cluster

    with cluster():
        # Not inside the placement group of a trial that calls this: it has only the trial's own share of a CPU.
        remote = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, scheduling_strategy="DEFAULT")(_call)
        pending: list[Any] = []
        queue = iter(tasks)
        try:
            while True:
                for task in islice(queue, num_workers - len(pending)):
                    pending.append(remote.remote(function, *task))
                if not pending:
                    break
                done, pending = ray.wait(pending, num_returns=1)
                outcome = ray.get(done[0])
                if isinstance(outcome, BitRayError):
                    raise outcome
                yield outcome
        finally:
            for ref in pending if cancel else ():
                ray.cancel(ref, force=True)
            # When the caller cleans up after a failure, no task may still be writing.
            if pending and not cancel:
                ray.wait(pending, num_returns=len(pending))


def spread_over_cluster(
    function: Callable[..., T], items: Sequence[Item], resources: Resources, *shared: Any
) -> list[T]:
    """Return ``function(part, *shared)`` of parts of the items, in their order: Ray tasks, a GPU each if there are any.

    Args:
        function: As for `each`.
        items: Split into parts of about equal length, which keep their order; at least one.
        resources: The running cluster.
        shared: Sent to every node once.

    Raises:
        BitRayError: As for `each`.
    """
    import ray

    slots = resources.slots_for(len(items))
    num_parts = min(len(items), slots * _PARTS_PER_SLOT if len(items) > _SMALL else slots)
    cuts = [round(len(items) * part / num_parts) for part in range(num_parts + 1)]
    sent = ray.put(shared)
    tasks = ((number, function, items[cuts[number] : cuts[number + 1]], sent) for number in range(num_parts))
    try:
        results = dict(each(_part, tasks, slots, num_gpus=1 if resources.most_gpus else 0))
    except ray.exceptions.RayError as error:
        raise root_cause(error) or error from None
    return [results[number] for number in range(num_parts)]


def _part(number: int, function: Callable[..., T], part: Any, shared: tuple[Any, ...]) -> tuple[int, T]:
    return number, function(part, *shared)


def _call(function: Callable[..., T], *task: Any) -> T | BitRayError:
    # A user's mistake is returned as a value: raised here, it would reach the driver inside a RayTaskError.
    try:
        return function(*task)
    except BitRayError as error:
        return error
