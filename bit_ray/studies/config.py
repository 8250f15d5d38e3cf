"""What a user sets for a study; imports neither PyTorch nor Ray nor MLflow, so that ``--help`` comes at once."""

from dataclasses import dataclass, field

from bit_ray.config import DEFAULT_STORAGE, check_folder_name
from bit_ray.errors import ConfigError
from bit_ray.tracking.config import TrackingConfig
from bit_ray.training.config import ByRule, parse_train


@dataclass(frozen=True, kw_only=True)
class FewShotConfig(ByRule):
    """Few-shot transfer of one model, over several subset sizes and draws."""

    name: str
    """Name of the MLflow run, and of the folder of index files and scores; the same name continues."""
    init: str
    """Weights to transfer: models:/NAME@ALIAS, a saved model's folder or URI, or an official .npz."""
    shards: str
    """Shard set that the subsets are drawn from."""
    test_shards: str
    """Shard set to evaluate on, in full."""
    shots: tuple[int, ...] = (1, 5, 10, 25, 50, 100)
    """Examples per class (paper Fig. 2)."""
    num_subsets: int = 5
    """Draws per number of shots; the median is reported (paper §3.5)."""
    subsets: str = ""
    """Folder of index files K-per-class-seed-S.json to use instead of drawing; empty: STORAGE/NAME/subsets, where what
    is drawn is saved."""
    scratch_lrs: tuple[float, ...] = ()
    """Learning rates to try from scratch, for comparison: the best on training images outside the draw counts. Empty:
    no comparison."""
    train: str = "all"
    """What is trained of the pre-trained network: all, head, stages:K, norm_bias or adapters:R, as in finetune."""
    storage: str = DEFAULT_STORAGE
    """Folder of all runs, or s3://..."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the study is recorded."""

    def __post_init__(self) -> None:
        check_folder_name(self.name)
        parse_train(self.train)
        if not self.shots or min(self.shots) < 1 or len(set(self.shots)) < len(self.shots):
            raise ConfigError.of("shots", self.shots, "different whole numbers of at least 1", "for example 1 5 10")
        if self.num_subsets < 1:
            raise ConfigError.of("num_subsets", self.num_subsets, "a whole number of at least 1", "the paper has 5")


@dataclass(frozen=True, kw_only=True)
class DiagnoseConfig:
    """Say of a recorded run, finished or not, whether it is still learning."""

    run: str = field(metadata={"positional": "RUN"})
    """Name of the run."""
    storage: str = DEFAULT_STORAGE
    """Folder of all runs, or s3://..."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the run is recorded."""

    def __post_init__(self) -> None:
        if "/" in self.run:
            raise ConfigError.of("run", self.run, "the name of a run", "give its folder by --storage")
        check_folder_name(self.run)
