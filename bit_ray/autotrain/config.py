"""What a user sets to train on a folder; imports neither PyTorch nor Ray nor MLflow, so that ``--help`` is fast."""

from dataclasses import dataclass, field
from typing import Literal

from bit_ray.config import DEFAULT_STORAGE, check_folder_name
from bit_ray.errors import ConfigError
from bit_ray.tracking.config import TrackingConfig
from bit_ray.training.config import RegisterAs


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Make a classifier from a folder of images: look, split, train, choose, calibrate, test, register."""

    folder: str = field(metadata={"positional": "FOLDER"})
    """Folder with a folder of images for each class; or with train, and if wanted val and test, with those below."""
    name: str = ""
    """Name of the run and of the registered model; empty: the folder's."""
    minutes: float = 10.0
    """Time that it may take on this machine. More time buys fine-tuning, larger views and larger batches."""
    init: str = ""
    """Weights to start from, as in finetune; empty: the best for these images of those at hand, else bit_m_r50x1."""
    method: Literal["auto", "head", "finetune"] = "auto"
    """Train a linear head on frozen features, or fine-tune all of the network; auto: both, if there is time, and take
    what is better on the validation images."""
    crop_size: int = 0
    """Side of the squares that images are resized to, pixels; 0: chosen by cross-validation."""
    random_flip: bool = True
    """Mirror images at random in fine-tuning; off where left and right matter, as for digits and letters."""
    val_share: float = 0.15
    """Share of each class to choose by, where the folder has no val."""
    test_share: float = 0.2
    """Share of each class to test on, where the folder has no test."""
    drop_duplicates: bool = False
    """Leave out of val and test what is also in train: copies, and near-duplicates (resized, recompressed, cropped)."""
    seed: int = 0
    """Seed of the split and of the training."""
    storage: str = DEFAULT_STORAGE
    """Folder of all runs, with the default registry."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the run is recorded."""
    register: RegisterAs = field(default_factory=RegisterAs)
    """Where the finished model is registered."""
    dry_run: bool = False
    """Look through the folder, print what is there and how it would be split, and stop."""

    def __post_init__(self) -> None:
        if self.name:
            check_folder_name(self.name)
        if not 0 < self.minutes < 10_000:
            raise ConfigError.of("minutes", self.minutes, "more than 0 and less than 10,000", "change it")
        if self.crop_size and not 32 <= self.crop_size <= 1024:
            raise ConfigError.of("crop_size", self.crop_size, "0, or 32 to 1024 pixels", "change it")
        for name in ("val_share", "test_share"):
            if not 0 < getattr(self, name) < 0.5:
                raise ConfigError.of(name, getattr(self, name), "more than 0 and less than 0.5", "change it")
        if self.seed < 0:
            raise ConfigError.of("seed", self.seed, "0 or more", "raise it")
