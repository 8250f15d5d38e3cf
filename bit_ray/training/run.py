"""The plan that a run recorded in its folder."""

from bit_ray import store
from bit_ray.config import from_dict
from bit_ray.errors import ConfigError, ModelError
from bit_ray.run_folder import RunFolder, RunRecord
from bit_ray.training.plan import TrainPlan


def recorded_plan(run_uri: str) -> tuple[TrainPlan, str]:
    """Read a run's plan, and the URI of the shard set that it trained on.

    Raises:
        ModelError: There is no run, or its plan is damaged.
        DataError: The file is not a record of a run.
    """
    path = RunFolder(run_uri).plan
    if not store.exists(path):
        raise ModelError(f"{run_uri}: no plan.json in it; accepted: the folder of a run, STORAGE/NAME; correct it")
    record = store.read_record(RunRecord, path)
    try:
        return from_dict(TrainPlan, record.plan), record.shards
    except ConfigError as error:
        raise ModelError(f"{path}: plan: {str(error)[:300]}; restore the file") from None
