"""What a user sets for VTAB-1k; imports neither PyTorch nor Ray nor MLflow, so that ``--help`` comes at once."""

from dataclasses import dataclass, field
from typing import Literal

from bit_ray.config import DEFAULT_STORAGE, check_folder_name
from bit_ray.data.sources.base import DEFAULT_DATA_DIR
from bit_ray.data.sources.vtab.tasks import NUM_TRAIN, NUM_VAL, TASKS, Task, find_task
from bit_ray.errors import ConfigError
from bit_ray.recipes.hyperrule import Profile, RuleOverrides
from bit_ray.tracking.config import TrackingConfig
from bit_ray.training.config import InMemoryRuntime, check_train


@dataclass(frozen=True, kw_only=True)
class VtabConfig:
    """Transfer one model to the 19 tasks of VTAB-1k, 1,000 examples each."""

    name: str
    """Name of the MLflow run, and of the folder of scores; the same name continues and runs no finished task again."""
    init: str = ""
    """Weights to transfer: models:/NAME@ALIAS, a saved model's folder or URI, or an .npz; empty: from scratch."""
    model: str = ""
    """Network, when training from scratch; otherwise the weights say it."""
    tasks: tuple[str, ...] = ()
    """Tasks to run; empty: all 19."""
    data_dir: str = DEFAULT_DATA_DIR
    """Folder of the publishers' files, a folder for each data set: docs/vtab.md lists them."""
    shards: str = ""
    """Folder of the tasks' shard sets, SHARDS/TASK/SPLIT, written from data-dir where missing; empty: STORAGE/vtab."""
    index: str = ""
    """Folder of lists of the examples to learn from: TASK.json, or TASK/train800.txt and TASK/val200.txt."""
    subset_seed: int = 0
    """0: the canonical examples where they are known, else a draw; 1 and up: other draws."""
    num_train: int = NUM_TRAIN
    """Training examples; the benchmark has 800."""
    num_val: int = NUM_VAL
    """Validation examples; the benchmark has 200."""
    protocol: Literal["test", "val"] = "test"
    """test: learn from train800val200 and score the whole test set. val: learn from train800 and score val200, for
    choosing settings."""
    profile: Profile = "code"
    """HyperRule as in the reference code, as in the paper, or the authors' cheaper one."""
    rule: RuleOverrides = field(default_factory=RuleOverrides)
    """Settings that replace the profile's, for all tasks."""
    train: str = "all"
    """What is trained: all, head, stages:K, norm_bias or adapters:R, as in finetune."""
    seed: int = 0
    """Seed of the order and the views."""
    runtime: InMemoryRuntime = field(default_factory=InMemoryRuntime)
    """How each task is carried out; none of it changes what is learned."""
    side_by_side: int = 0
    """Tasks at a time; 0: as many as the cluster has GPUs or cores."""
    storage: str = DEFAULT_STORAGE
    """Folder of all runs, or s3://...; on a cluster of several nodes it must be one that all of them reach."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the study is recorded."""
    dry_run: bool = False
    """Print what would be done with each task, and what data are missing, and stop."""

    def __post_init__(self) -> None:
        check_folder_name(self.name)
        if not self.init and not self.model:
            given = "empty, and model is empty"
            raise ConfigError.of("init", given, "weights to start from, or a model to train from scratch", "give one")
        check_train(self.train, self.init)
        for name, least in (("num_train", 1), ("num_val", 1), ("seed", 0), ("subset_seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError.of(name, getattr(self, name), f"a whole number of at least {least}", "raise it")
        if self.side_by_side < 0:
            raise ConfigError.of("side_by_side", self.side_by_side, "0 (as many as possible) or more", "raise it")
        if len(set(self.tasks)) < len(self.tasks):
            raise ConfigError.of("tasks", " ".join(self.tasks), "each task once", "remove the repetition")
        _ = self.chosen  # which checks the names

    @property
    def chosen(self) -> tuple[Task, ...]:
        """The tasks to run, in the order of the benchmark."""
        wanted = [find_task(name) for name in self.tasks]
        return tuple(task for task in TASKS if task in wanted or not wanted)
