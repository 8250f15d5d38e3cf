"""The folder of a run, ``STORAGE/NAME``: what its files hold."""

from bit_ray import store
from bit_ray.config import from_dict
from bit_ray.data.stream.history import PLAN_FILE, RunRecord
from bit_ray.errors import ConfigError, ModelError
from bit_ray.training.plan import TrainPlan


def recorded_plan(run_uri: str) -> tuple[TrainPlan, str]:
    """Read a run's plan, and where the shard set lay that it trained on.

    Raises:
        ModelError: There is no run, or its plan is damaged.
        DataError: The file is no record of a run.
    """
    path = store.join(run_uri, PLAN_FILE)
    if not store.exists(path):
        raise ModelError(f"{run_uri}: holds no {PLAN_FILE}; accepted: the folder of a run, STORAGE/NAME; correct it")
    record = store.read_record(RunRecord, path)
    try:
        return from_dict(TrainPlan, record.plan), record.shards
    except ConfigError as error:
        raise ModelError(f"{path}: plan: {str(error)[:300]}; restore the file") from None
