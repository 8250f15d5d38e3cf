"""The plan that a run recorded in its folder."""

from bit_ray.config import from_dict
from bit_ray.errors import ConfigError, ModelError
from bit_ray.run_folder import RunFolder
from bit_ray.training.plan import TrainPlan


def recorded_plan(run_uri: str) -> tuple[TrainPlan, str]:
    """Read a run's plan, and the URI of the shard set that it trained on.

    Raises:
        ModelError: There is no run, or its plan is damaged.
        DataError: The file is not a record of a run.
    """
    folder = RunFolder(run_uri)
    record = folder.record()
    try:
        return from_dict(TrainPlan, record.plan), record.shards
    except ConfigError as error:
        raise ModelError(f"{folder.plan}: plan: {str(error)[:300]}; restore the file") from None
