"""What a user sets for an evaluation; imports neither PyTorch nor Ray nor MLflow, so that ``--help`` comes at once."""

from dataclasses import dataclass, field

from bit_ray.errors import ConfigError
from bit_ray.tracking.config import TrackingConfig


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Evaluate a saved model on a shard set."""

    model: str
    """models:/NAME@ALIAS, or a saved model's folder or URI."""
    shards: str
    """Shard set to evaluate on: a folder, s3://... or gs://..."""
    name: str = ""
    """Name of the MLflow run; empty: made from the model and the shard set."""
    batch_size: int = 64
    """Images per forward pass."""
    storage: str = "bit_ray_runs"
    """Folder of all runs, where the default tracking store lies."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the evaluation is recorded."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size: {self.batch_size}; an integer of at least 1; raise it")
