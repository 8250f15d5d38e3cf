"""One group of Ray Train workers, started and watched from this process."""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.train
from ray.train import Result
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.logging.logging import LoggingManager

from bit_ray import store
from bit_ray.cluster.seats import free_group
from bit_ray.cluster.session import start_no_other_ray
from bit_ray.cluster.slots import Workers
from bit_ray.training.collectives import RecordedTorchConfig
from bit_ray.training.worker import WorkerConfig, train_worker

_SECONDS_TO_END = 10


class Fit(threading.Thread):
    """Runs Ray Train's trainer; the main thread stays free to watch and to hear signals."""

    def __init__(self, worker: WorkerConfig, trainer: Callable[[WorkerConfig], TorchTrainer]) -> None:
        super().__init__(name="fit", daemon=True)
        self.error: BaseException | None = None
        self.began = time.monotonic()
        self.group_id = ""
        """Of the placement group, from when there is one."""
        self.given_up = ""
        """Why its workers were ended from here."""
        self._worker, self._trainer = worker, trainer
        self._ended = threading.Event()

    def run(self) -> None:
        """Train to the end of the group, and keep the error that ended it."""
        try:
            self._trainer(self._worker).fit()
        except BaseException as error:
            self.error = error
            if isinstance(error, OSError) and not isinstance(error, ray.exceptions.RayError):
                # Of the file that Ray writes to see that there is a storage.
                self.error = store.failure(self._worker.folder.uri, error)
        finally:
            self._ended.set()

    def wait(self, seconds: float) -> bool:
        """Wait, at most so long; return whether it has ended.

        Not `join`: Python 3.11 takes a thread for dead if a signal's handler raises while it is waited for.
        """
        return self._ended.wait(seconds)

    def end(self) -> None:
        """End the group, and this thread: Ray ends a process, with status 1, that uses it after its shutdown."""
        for _ in range(_SECONDS_TO_END):
            free_group(self.group_id)  # which may come only now
            if self.wait(1.0):
                return
        start_no_other_ray()  # this thread waits for a store

    def took(self, group_id: str) -> None:
        """Note the group's room, for who ends it from here, and for the next start of the run if this process dies."""
        self.group_id = group_id
        store.write_bytes(self._worker.folder.group, group_id.encode())


def found_no_room(error: BaseException) -> bool:
    """Whether a group did not start because others had taken its place meanwhile."""
    return isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError)


def trainer(
    num_workers: int, workers: Workers, storage: str, give_up_after_s: float
) -> Callable[[WorkerConfig], TorchTrainer]:
    """Return what makes Ray's trainer for a group from what every worker gets.

    Args:
        num_workers: Workers of the group.
        workers: What each asks of the cluster.
        storage: URI of the run's folder, which every node reaches.
        give_up_after_s: Seconds after which a collective that waits has failed.
    """
    filesystem, path = store.filesystem(storage)
    use_gpu = workers.use_gpu
    return lambda worker: _Trainer(
        train_worker,
        train_loop_config={"worker": worker},
        torch_config=RecordedTorchConfig(timeout_s=int(give_up_after_s)),
        scaling_config=ray.train.ScalingConfig(
            num_workers=num_workers,
            use_gpu=use_gpu,
            resources_per_worker=workers.bundle,
            # Without GPUs a worker's readers need its node's cores; with GPUs, workers should be on few nodes.
            placement_strategy="PACK" if use_gpu else "SPREAD",
        ),
        run_config=ray.train.RunConfig(
            name=".ray",  # only its check that all nodes reach the storage is used
            # A start that fails would be tried again without end, with as many workers, on what may be gone.
            failure_config=ray.train.FailureConfig(controller_failure_limit=0),
            storage_path=path,
            storage_filesystem=filesystem,
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )


class _Trainer(TorchTrainer):
    """Ray's trainer without the three processes of each start that a run of ours has no use for.

    One hands out data sets, and workers have their own stream. One frees placement groups, which the run does by their
    recorded id: Ray's asks the dashboard, which a local cluster does not have. One has the controller, which only waits
    for the workers as this process does; its imports alone took seconds of every start.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [c for c in callbacks if not isinstance(c, DatasetsCallback | PlacementGroupCleanerCallback)]

    def _initialize_and_run_controller(self, **settings: Any) -> Result:
        with _logged_to_a_file():
            controller = _Controller(**{**settings, "scaling_policy": _Seated(self.scaling_config)})
            asyncio.run(controller.run())
            return controller.get_result()


@contextmanager
def _logged_to_a_file() -> Iterator[None]:
    """Keep what Ray Train says, and tracebacks of workers, with Ray's logs; our own lines say it in fewer words."""
    logger, folder = logging.getLogger("ray.train"), LoggingManager.get_log_directory()
    os.makedirs(folder, exist_ok=True)
    handler = logging.FileHandler(os.path.join(folder, "ray-train-controller.log"))
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger.addHandler(handler)
    propagate, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.propagate = propagate
        logger.removeHandler(handler)
        handler.close()


class _Seated(FixedScalingPolicy):
    """Asks for no nodes: the run has found room already, and Ray's demand would hold them for minutes after its end."""

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        """Announce nothing."""

    def _maybe_send_resource_request(self) -> None:
        """Announce nothing."""


class _Group(WorkerGroup):
    """Ray's group for a controller that is no actor."""

    def _create_placement_group(self, *arguments: Any) -> Any:
        handle = super()._create_placement_group(*arguments)
        fit = threading.current_thread()
        if isinstance(fit, Fit):
            fit.took(handle.placement_group.id.hex())
        return handle

    def _init_train_context_on_workers(
        self, workers: list[Any], sync_actor: Any, train_context_args: dict[str, list[Any]]
    ) -> None:
        begun = [
            worker.actor.init_train_context.remote(
                train_run_context=self._train_run_context,
                distributed_context=worker.distributed_context,
                synchronization_actor=sync_actor,
                storage_context=self._storage_context,
                worker_callbacks=self._worker_callbacks_to_propagate,
                controller_actor=None,  # workers ask it for Ray's own checkpoints, which are not used here
                **{name: values[number] for name, values in train_context_args.items()},
            )
            for number, worker in enumerate(workers)
        ]
        ray.get(begun)
        self._decorate_worker_log_file_paths(workers)


class _Controller(TrainController):
    """Ray's controller, as an object of this process."""

    worker_group_cls = _Group
