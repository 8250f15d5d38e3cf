"""Where runs are recorded, as settings; MLflow itself is not needed to read them."""

from dataclasses import dataclass, field

from bit_ray.config import DEFAULT_STORAGE
from bit_ray.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where a run is recorded."""

    uri: str = ""
    """MLflow tracking URI; empty: ``MLFLOW_TRACKING_URI``, or else a SQLite file in the run storage. Give a user and a
    password by MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD: other users of the machine can read flags."""
    experiment: str = "bit_ray"
    """MLflow experiment that the run belongs to; made when there is none."""

    def __post_init__(self) -> None:
        if not self.experiment.strip():
            raise ConfigError.of("experiment", "empty", "the name of an MLflow experiment", "leave it out for bit_ray")


@dataclass(frozen=True, kw_only=True)
class RegistryConfig:
    """Where registered models are looked up."""

    uri: str = ""
    """MLflow tracking URI; empty: MLFLOW_TRACKING_URI, or else the SQLite file in the run storage. Give a user and a
    password by MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD: other users of the machine can read flags."""


@dataclass(frozen=True, kw_only=True)
class UsesRegistry:
    """Settings of every command that takes a registered model and records nothing."""

    storage: str = DEFAULT_STORAGE
    """Folder of all runs, with the default registry."""
    tracking: RegistryConfig = field(default_factory=RegistryConfig)
    """Where the registry is."""
