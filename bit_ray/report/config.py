"""What a user sets for the page of a model; imports neither PyTorch nor Ray nor MLflow, so that ``--help`` is fast."""

from dataclasses import dataclass, field

from bit_ray.errors import ConfigError
from bit_ray.tracking.config import UsesRegistry


@dataclass(frozen=True, kw_only=True)
class ModelReportConfig(UsesRegistry):
    """Write a page about a model: what it is, how good, where it errs, what it looks at; one file."""

    model: str = field(metadata={"positional": "MODEL"})
    """models:/NAME@ALIAS, a run's name or folder, a saved model's folder or URI, or weights as in predict."""
    output: str = ""
    """File to write, ending in .html; empty: the model's name in the current folder."""
    images: str = ""
    """Images to judge it by: a folder of class folders, or a shard set; empty: the test set that its run recorded."""
    num_images: int = 2000
    """Most images that are scored; of a larger set they are drawn by seed 0."""

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise ConfigError.of("num_images", self.num_images, "1 or more", "raise it")
        if self.output and not self.output.lower().endswith((".html", ".htm")):
            raise ConfigError.of("output", self.output, "a file ending in .html", "rename it")
