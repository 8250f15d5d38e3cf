"""What a user sets for studies and sweeps; imports neither PyTorch nor Ray nor MLflow, so that ``--help`` is fast."""

import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

from bit_ray.config import DEFAULT_STORAGE, check_folder_name, replace
from bit_ray.errors import ConfigError, brief
from bit_ray.recipes.hyperrule import RuleOverrides
from bit_ray.studies.spaces import Method, parse_space, parse_values
from bit_ray.tracking.config import TrackingConfig
from bit_ray.training.config import ByRule, FinetuneConfig, PretrainConfig

Where = Literal["memory", "cluster"]

# What a study sets itself in each of its trainings, and what they do not use.
OWN = frozenset({"name", "seed", "storage", "tracking", "register", "dry_run", "test_shards", "probe"})
# Which examples: the same for all trials of a sweep, as a part of them is held out to select on.
_EXAMPLES = frozenset({"shards", "shots", "subset_seed"})


@dataclass(frozen=True, kw_only=True)
class _Many:
    """What all studies have in common."""

    where: Where = "memory"
    """memory: each training in one process, its examples in memory, one per GPU or core. cluster: each training is a
    Ray Train run with runtime.num_workers workers, which reads the shards as pretrain and finetune do."""
    side_by_side: int = 0
    """Trainings at a time; 0: as many as fit on the cluster."""
    save_every_s: float = 60.0
    """Seconds between two checkpoints of a training in memory; a killed one continues from the last."""
    price: float = 0.0
    """Price of an hour of one device (GPU, or CPU core without GPUs); 0: no costs are shown."""
    storage: str = DEFAULT_STORAGE
    """Folder of all runs, or s3://...; on a cluster of several nodes it must be one that all of them reach."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the study is recorded."""
    dry_run: bool = False
    """Print the trainings, their time and their price, and stop."""

    def __post_init__(self) -> None:
        if self.side_by_side < 0:
            raise ConfigError.of("side_by_side", self.side_by_side, "0 (as many as fit) or more", "raise it")
        if not 0 <= self.save_every_s < float("inf"):
            raise ConfigError.of("save_every_s", self.save_every_s, "0 or more seconds")
        if not 0 <= self.price < float("inf"):
            raise ConfigError.of("price", self.price, "0 or more")


@dataclass(frozen=True, kw_only=True)
class GridConfig(_Many):
    """Run a study of what the paper found: a grid of settings, several seeds each, and a report."""

    study: str = field(metadata={"positional": "STUDY"})
    """Which study: bit-ray study list shows them."""
    name: str = ""
    """Name of the MLflow run and of the folder of scores; the same name continues. Empty: the study's name."""
    set: tuple[str, ...] = ()
    """Settings of all trainings, such as shards=s3://BUCKET/train recipe.epochs=90; those of pretrain or finetune."""
    axes: tuple[str, ...] = ()
    """Values of an axis instead of the study's, such as recipe.weight-decay=1e-4,1e-5."""
    seeds: int = 0
    """Trainings of each point of the grid; 0: as many as the study has, at least 3 for a claim."""
    val_shards: str = ""
    """Shard set to measure on; empty: the study's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name:
            check_folder_name(self.name)
        if self.seeds < 0:
            raise ConfigError.of("seeds", self.seeds, "0 (the study's) or more", "raise it")
        _check_names("set", read_settings("set", self.set))
        _check_names("axes", (axis.name for axis in parse_space(self.axes, "axes")))


@dataclass(frozen=True, kw_only=True)
class _Search(_Many):
    """What all sweeps have in common."""

    trials: int = 40
    """Trainings of the sweep; the paper has 40, and found that 20 are nearly as good (App. A)."""
    search: Method = "random"
    """random: as the paper, and the only one that says what fewer trials would have reached. sobol: evenly spread.
    tpe, gp: propose from what the earlier trials scored (Optuna)."""
    search_seed: int = 0
    """Seed of the search."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trials < 1:
            raise ConfigError.of("trials", self.trials, "at least 1", "the paper has 40")
        if self.search_seed < 0:
            raise ConfigError.of("search_seed", self.search_seed, "0 or more", "raise it")


@dataclass(frozen=True, kw_only=True)
class SweepConfig(_Search):
    """Search over any settings of pretrain or finetune, by what they score on a validation part."""

    command: Literal["pretrain", "finetune"] = field(metadata={"positional": "COMMAND"})
    """Whose settings are searched: pretrain or finetune."""
    name: str
    """Name of the MLflow run and of the folder of scores; the same name continues."""
    set: tuple[str, ...] = ()
    """Settings of all trials, such as shards=s3://BUCKET/train init=models:/NAME@champion."""
    space: tuple[str, ...] = ()
    """What is searched: rule.base-lr=log:1e-4:1e-1 rule.num-steps=500,1000 rule.dropout=uniform:0:0.7."""
    val_shards: str = ""
    """Shard set to select on; empty: a part of the training set."""
    val_share: float = 0.2
    """Share of the training set to select on, where val_shards is empty."""
    stop_early: bool = False
    """Successive halving (ASHA): a trial ends itself after 25 % or 50 % of its steps unless it is among the best third
    of those that came so far. Saves most of the images; with a stepwise rate it favours what learns fast early."""
    fewer: Literal["auto", "always", "never"] = "auto"
    """Report what fewer trials would have reached. auto: where it can be said, which needs search random, where memory,
    and trials that ran to their end; always: refuse a sweep that cannot say it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_folder_name(self.name)
        check_share(self.val_share)
        _check_names("set", read_settings("set", self.set))
        _check_searched(self.space)
        if not self.space:
            accepted = "at least one setting, such as rule.base-lr=log:1e-4:1e-1"
            raise ConfigError.of("space", "empty", accepted, "add one")
        if self.stop_early and self.where == "cluster":
            accepted = "on with where memory, because trials on a cluster are measured at their end"
            raise ConfigError.of("stop_early", "on with where cluster", accepted, "leave one out")
        if self.fewer == "always" and (why := self.against_fewer):
            accepted = "always with search random and where memory, without stop_early"
            raise ConfigError.of("fewer", f"always, but {why}", accepted, "choose one")

    @property
    def against_fewer(self) -> str:
        """Why this sweep does not say what fewer trials would have reached; empty if it does."""
        if self.search != "random":
            return f"the trials of search {self.search} are not independent"
        if self.stop_early:
            return "stop_early ends trials before they can be compared"
        return "trials on a cluster are not measured on two halves" if self.where == "cluster" else ""


@dataclass(frozen=True, kw_only=True)
class CompareConfig(_Search, ByRule):
    """Compare BiT-HyperRule with a sweep of the paper's space (App. A): accuracy, regret and costs."""

    name: str = "hyperrule-or-sweep"
    """Name of the MLflow run and of the folder of scores; the same name continues."""
    init: str = ""
    """Weights to transfer: models:/NAME@ALIAS, a saved model's folder or URI, or an .npz; empty: the embedded ones."""
    tasks: tuple[str, ...] = ()
    """Tasks: TRAIN_SHARDS,TEST_SHARDS each; or TRAIN_SHARDS,TEST_SHARDS,K for K examples per class. Empty: the embedded
    digits, from a network that is pre-trained on the embedded characters first."""
    space: tuple[str, ...] = ()
    """Space of the sweep instead of the paper's, as in bit-ray sweep."""
    seeds: int = 5
    """Trainings of the rule, and of the best of the sweep, per task."""
    val_share: float = 0.2
    """Share of each task's training examples that the sweep selects on."""
    rule: RuleOverrides = field(default_factory=RuleOverrides)
    """Settings that replace the profile's, for the rule and for all trials."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_folder_name(self.name)
        check_share(self.val_share)
        _check_searched(self.space)
        if self.search not in ("random", "sobol"):
            accepted = "random or sobol, because all trials are known before the first"
            raise ConfigError.of("search", self.search, accepted, "choose one")
        if self.seeds < 2:
            raise ConfigError.of("seeds", self.seeds, "at least 2 for an interval, better 5", "raise it")
        for task in self.tasks:
            parts = task.split(",")
            if len(parts) not in (2, 3) or not all(parts) or (len(parts) == 3 and not parts[2].isdecimal()):
                accepted = "TRAIN_SHARDS,TEST_SHARDS or TRAIN_SHARDS,TEST_SHARDS,K"
                raise ConfigError.of("tasks", repr(task), accepted)
        if self.where == "cluster":
            accepted = "memory, because the sweep learns from a part of each set"
            raise ConfigError.of("where", "cluster", accepted, "leave it out")
        if self.tasks and not self.init:
            raise ConfigError.of("init", "empty, but tasks are given", "weights to transfer", "name them")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write the report of a study again, from what MLflow has of it, finished or not."""

    name: str = field(metadata={"positional": "NAME"})
    """Name of the study."""
    output: str = ""
    """Local folder to write to; empty: STORAGE/NAME/report."""
    storage: str = DEFAULT_STORAGE
    """Folder of all runs."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the study is recorded."""


def check_share(share: float) -> None:
    """Refuse a share of the training set that leaves nothing to learn from or to select on.

    Raises:
        ConfigError: it is refused.
    """
    if not 0 < share <= 0.5:
        raise ConfigError.of("val_share", share, "above 0, at most 0.5", "the paper has 0.2")


def _check_names(field: str, names: Iterable[str]) -> None:
    if wrong := next((name for name in names if name.partition(".")[0] in OWN), None):
        raise ConfigError.of(field, wrong, "another setting: a study sets this one in each training", "leave it out")


def _check_searched(space: tuple[str, ...]) -> None:
    names = [axis.name for axis in parse_space(space)]
    _check_names("space", names)
    if wrong := next((name for name in names if name in _EXAMPLES), None):
        raise ConfigError.of("space", wrong, "another setting: all trials have the same examples", "leave it out")


def read_settings(field: str, texts: tuple[str, ...]) -> dict[str, Any]:
    """Read settings such as ``recipe.epochs=90``; their names are checked by `changed`.

    Raises:
        ConfigError: one has another form, or is given twice.
    """
    settings: dict[str, Any] = {}
    for text in texts:
        name, given, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not given or not name:
            raise ConfigError.of(field, brief(text), "SETTING=VALUE, such as recipe.epochs=90")
        if name in settings:
            raise ConfigError.of(field, f"{name} is given twice", "each setting once", "remove one")
        values = parse_values(value, field)
        settings[name] = values[0] if len(values) == 1 else value
    return settings


def changed(config: PretrainConfig | FinetuneConfig, settings: dict[str, Any], field: str) -> Any:
    """Return the config of a training with some settings replaced by dotted name.

    Raises:
        ConfigError: there is no such setting, with the nearest name; or its value is refused.
    """
    try:
        return replace(config, settings)
    except ConfigError as error:
        raise ConfigError(str(error)).about(field) from None


def swept(config: SweepConfig) -> PretrainConfig | FinetuneConfig:
    """Return the settings that all trials of a sweep have in common.

    Raises:
        ConfigError: one is unknown or refused, or the shard set or what to start from is missing.
    """
    settings = read_settings("set", config.set)
    if not settings.get("shards"):
        raise ConfigError.of("set", "without shards", "the shard set to train on, --set shards=...", "add it")
    if config.command == "pretrain":
        upstream: PretrainConfig = changed(PretrainConfig(name="trial", shards="?"), settings, "set")
        return upstream
    downstream: FinetuneConfig = changed(FinetuneConfig(name="trial", shards="?"), settings, "set")
    if not downstream.init and not downstream.model:
        accepted = "weights to start from, --set init=..., or a model, --set model=..."
        raise ConfigError.of("set", "without init and model", accepted, "add one")
    return downstream


def command(verb: str, config: GridConfig | SweepConfig | CompareConfig) -> str:
    """Return the command line of a study: every setting that has not its default.

    Args:
        verb: Of the command, such as ``study run``.
        config: The settings.
    """
    places = [str(getattr(config, field.name)) for field in fields(config) if "positional" in field.metadata]
    return shlex.join(["bit-ray", *verb.split(), *places, *_flags(config, "")])


def _flags(config: Any, prefix: str) -> list[str]:
    words: list[str] = []
    for one in fields(config):
        value, name = getattr(config, one.name), one.name.replace("_", "-")
        default = one.default_factory() if callable(one.default_factory) else one.default
        if is_dataclass(value):
            words += _flags(value, f"{prefix}{name}.")
        elif "positional" not in one.metadata and value != default:
            words.append(f"--{prefix}{'no-' if value is False else ''}{name}")
            words += [] if isinstance(value, bool) else map(str, value) if isinstance(value, tuple) else [str(value)]
    return words
