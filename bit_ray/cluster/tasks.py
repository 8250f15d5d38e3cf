"""One function over many tasks: in this process, or as Ray tasks with a bounded number in flight."""

from collections.abc import Callable, Generator, Iterable
from itertools import islice
from typing import Any, TypeVar

from bit_ray.errors import BitRayError, ConfigError

T = TypeVar("T")


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
        tasks: taken one by one, no faster than they are worked on.
        num_workers: Ray tasks in flight, on the cluster of ``RAY_ADDRESS`` or one started here; 0 is this process.
        num_cpus: Of a task.
        num_gpus: Of a task.
        cancel: Whether tasks that still run at the end are cancelled instead of waited for.

    Raises:
        ConfigError: num_workers is negative.
        BitRayError: what the function raised, without a remote traceback. No task is still running then.
    """
    if num_workers < 0:
        raise ConfigError(f"num_workers: {num_workers}; accepted: 0 (this process) or more; correct it")
    if num_workers == 0:
        for task in tasks:
            yield function(*task)
        return
    import ray

    from bit_ray.cluster.session import cluster

    with cluster():
        remote = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus)(_call)
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
            # A caller that cleans up after a failure must not meet a task that still writes.
            if pending and not cancel:
                ray.wait(pending, num_returns=len(pending))


def _call(function: Callable[..., T], *task: Any) -> T | BitRayError:
    # A mistake of the user travels as a value: raised here, it would reach the driver inside a RayTaskError.
    try:
        return function(*task)
    except BitRayError as error:
        return error
