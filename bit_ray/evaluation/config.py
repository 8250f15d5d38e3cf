"""What a user sets for an evaluation; imports neither PyTorch nor Ray nor MLflow, so that ``--help`` comes at once."""

from dataclasses import dataclass, field

from bit_ray.config import DEFAULT_STORAGE
from bit_ray.errors import ConfigError
from bit_ray.tracking.config import TrackingConfig


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Evaluate a saved model on a shard set."""

    model: str
    """models:/NAME@ALIAS, a saved model's folder or URI, or BiT weights of another program, as in predict."""
    shards: str
    """Shard set to evaluate on: a folder, s3://... or gs://..."""
    labels: str = ""
    """File of class names, one per line, for weights that come without; or the word shards: the outputs are the set's
    classes in the set's order, as those of ImageNet weights are; empty: their folder's, or ImageNet's."""
    crop_size: int = 0
    """Side of the squares that images are resized to, pixels, for weights that come without; 0: as their names say."""
    name: str = ""
    """Name of the MLflow run; empty: made from the model and the shard set."""
    batch_size: int = 64
    """Images per forward pass."""
    storage: str = DEFAULT_STORAGE
    """Folder of all runs, with the default tracking store."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the evaluation is recorded."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError.of("batch_size", self.batch_size, "a whole number of at least 1", "raise it")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Scores of frozen features, in seconds: ridge regression and nearest neighbours on a few examples per class."""

    shards: str = ""
    """Single-label shard set that the examples are drawn from; empty: no probes."""
    test_shards: str = ""
    """Shard set of the same classes to score on, in full."""
    shots: tuple[int, ...] = (1, 5, 10, 25)
    """Examples per class."""
    num_subsets: int = 3
    """Draws for each of them; the median counts."""
    neighbors: int = 10
    """Neighbours that vote, at most as many as there are examples per class."""
    resize: int = 0
    """Side of the square that images are resized to before the centre crop, pixels; big_vision has 256; 0: images are
    seen as the model was saved to see them."""
    crop: int = 0
    """Side of the centre crop, pixels; big_vision has 224; 0 with resize 0."""
    num_cpus: int = 1
    """CPU cores of a probe during pre-training; it waits until they are free."""

    def __post_init__(self) -> None:
        if not self.shots or min(self.shots) < 1 or len(set(self.shots)) < len(self.shots):
            raise ConfigError.of("shots", self.shots, "different whole numbers of at least 1", "for example 1 5 10")
        for name in ("num_subsets", "neighbors", "num_cpus"):
            if getattr(self, name) < 1:
                raise ConfigError.of(name, getattr(self, name), "a whole number of at least 1", "raise it")
        if not 0 <= self.crop <= self.resize or (self.crop == 0) != (self.resize == 0):
            given = f"{self.crop} with resize {self.resize}"
            accepted = "both 0, or a crop of at most resize"
            raise ConfigError.of("crop", given, accepted, "big_vision has 256 and 224")
        if bool(self.shards) != bool(self.test_shards):
            given = f"{self.test_shards!r} with shards {self.shards!r}"
            raise ConfigError.of("test_shards", given, "both or neither", "give the missing one")
