"""What a user sets for the demo of a model; imports neither PyTorch nor Ray nor MLflow, so that ``--help`` is fast."""

from dataclasses import dataclass, field
from typing import Literal

from bit_ray.errors import ConfigError
from bit_ray.tracking.config import UsesRegistry


@dataclass(frozen=True, kw_only=True)
class DemoConfig(UsesRegistry):
    """Serve a page for this machine alone, where images are dropped and their classes shown."""

    model: str = field(metadata={"positional": "MODEL"})
    """models:/NAME@ALIAS, a run's name or folder, a saved model's folder or URI, or weights as in predict."""
    port: int = 0
    """Port on 127.0.0.1; 0: one that is free."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise ConfigError.of("port", self.port, "0 to 65535")
