"""``bit-ray fewshot``, ``vtab``, ``probe``, ``episodes``, ``models rank``: protocols of many trainings, or of none."""

from dataclasses import dataclass, field
from typing import Literal

from bit_ray.cli.flags import positional
from bit_ray.config import DEFAULT_STORAGE
from bit_ray.errors import ConfigError, DataError
from bit_ray.evaluation.config import ProbeConfig
from bit_ray.progress import console, print_table
from bit_ray.studies.config import FewShotConfig
from bit_ray.studies.vtab_config import VtabConfig
from bit_ray.tracking.config import UsesRegistry


@dataclass(frozen=True, kw_only=True)
class ProbeModelConfig(ProbeConfig, UsesRegistry):
    """Score frozen features in seconds: ridge regression and nearest neighbours on a few examples."""

    model: str = field(metadata=positional("MODEL"))
    """models:/NAME@ALIAS, or a saved model's folder or URI."""
    shards: str = field(metadata=positional("SHARDS"))
    """Single-label shard set that the examples are drawn from."""
    test_shards: str = field(metadata=positional("TEST_SHARDS"))
    """Shard set of the same classes to score on, in full."""
    num_cpus: int = field(default=1, init=False)  # only for probes during a training


@dataclass(frozen=True, kw_only=True)
class EpisodesConfig(UsesRegistry):
    """Score the frozen features of a model by N-way K-shot episodes and the nearest class mean."""

    model: str = field(metadata=positional("MODEL"))
    """models:/NAME@ALIAS, or a saved model's folder or URI."""
    shards: str = field(metadata=positional("SHARDS"))
    """Single-label shard set that support and queries are drawn from, best with classes that are new to the model."""
    ways: int = 5
    """Classes of an episode."""
    shots: tuple[int, ...] = (1, 5)
    """Support examples per class."""
    queries: int = 15
    """Query examples per class."""
    num_episodes: int = 600
    """Episodes; mean and 95 % interval are over them."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        if not self.shots:
            raise ConfigError.of("shots", "empty", "whole numbers of at least 1", "for example 1 5")


@dataclass(frozen=True, kw_only=True)
class RankConfig(UsesRegistry):
    """Rank registered models by their features of some images, before any fine-tuning."""

    images: str = field(metadata=positional("FOLDER"))
    """Folder of class folders, a table of paths and labels, or a single-label shard set."""
    models: tuple[str, ...] = ()
    """Models to rank, such as models:/NAME@ALIAS or folders; empty: all versions in the registry."""
    shots: int = 5
    """Examples per class of the ridge regression, which is tested on the others."""
    per_class: int = 100
    """Most examples of a class to look at."""
    by: Literal["ridge", "knn", "logme"] = "ridge"
    """Score to sort by."""
    convert_images: bool = False
    """Convert grayscale, CMYK, 16-bit, alpha, palette and animated images to 8-bit RGB instead of refusing them."""
    storage: str = DEFAULT_STORAGE
    """Folder of all runs, with the default registry; a folder of images is written there as a shard set."""


def fewshot(config: FewShotConfig) -> None:
    """Run the few-shot protocol, and print medians and spread."""
    from bit_ray.cli.first_look import look

    sets = (config.shards, config.test_shards)
    look("fewshot", config.init, *sets, tracking=config.tracking, storage=config.storage)
    from bit_ray import store
    from bit_ray.evaluation.subsets import summarize
    from bit_ray.studies.few_shot import FROM_SCRATCH, fewshot_suite

    report = fewshot_suite(config)
    rows = []
    for row in report.rows:
        s = summarize(row.values)
        rate = f"{report.scratch_lr[row.k]:g}" if row.series == FROM_SCRATCH else ""
        spread = f"{s.lowest:.1%} to {s.highest:.1%}"
        rows.append((str(row.k), row.series, f"{s.median:.2%}", spread, f"{100 * s.std:.1f}", rate))
    header = ("per class", "method", "median", "lowest to highest", "std", "best lr")
    print_table(f"Top-1 of {config.init} on {config.test_shards}, {config.num_subsets} draws", rows, header)
    console.print(f"Index files: {config.subsets or store.join(config.storage, config.name, 'subsets')}")


def vtab(config: VtabConfig) -> None:
    """Run the tasks of VTAB-1k and print their scores next to published ones; a dry run prints what would be done."""
    from bit_ray.cli.first_look import look

    look("vtab", config.init, tracking=config.tracking, storage=config.storage)
    from bit_ray.studies.vtab import vtab_suite
    from bit_ray.studies.vtab_scores import MEAN_COLUMNS, TASK_COLUMNS, mean_rows, task_rows

    if config.dry_run:
        _print_vtab_plan(config)
        return
    report = vtab_suite(config)
    print_table(f"Top-1 of {config.init or config.model}", task_rows(report.scores), TASK_COLUMNS)
    print_table("Means over tasks", mean_rows(report.scores), MEAN_COLUMNS)
    for score in report.scores:
        console.print(score.statement)
    if report.problems and config.tasks:
        raise DataError(f"{len(report.problems)} of {len(config.chosen)} tasks left out; see above")


def _print_vtab_plan(config: VtabConfig) -> None:
    from bit_ray.studies.vtab import plan_tasks

    rows, lines = [], []
    for task, rule, origin in plan_tasks(config):
        cells = ["no data", "", "", ""]
        if rule is not None:
            views = f"{rule.resize} to {rule.crop}" if rule.random_crop else f"{rule.crop}"
            cells = [f"{rule.num_examples:,}", f"{rule.num_steps:,}", views, "yes" if rule.random_flip else "no"]
        rows.append((task.name, task.group, *cells, f"{task.sizes[2]:,}"))
        lines.append(origin if rule is None else f"{task.name}: {origin}")
    header = ("task", "group", "examples", "steps", "pixels", "flip", "test images")
    print_table(f"VTAB-1k of {config.init or config.model}, profile {config.profile}", rows, header)
    for line in lines:
        console.print(line)


def probe(config: ProbeModelConfig) -> None:
    """Print the scores of both probes."""
    from bit_ray.cli.first_look import look

    sets = (config.shards, config.test_shards)
    look("probe", config.model, *sets, tracking=config.tracking, storage=config.storage)
    import time

    from bit_ray.cluster.session import cluster
    from bit_ray.evaluation.probe import probe, probe_task
    from bit_ray.evaluation.subsets import summarize
    from bit_ray.inference.classifier import load_model
    from bit_ray.tracking.address import tracking_uri

    task = probe_task(config)
    classifier = load_model(
        config.model, tracking_uri=tracking_uri(config.tracking.uri, config.storage), features_only=True
    )
    with cluster() as resources:
        started = time.perf_counter()
        scores = probe(classifier, task, resources)
        seconds = time.perf_counter() - started
    rows = []
    for score in scores:
        ridge, knn = summarize(score.ridge), summarize(score.knn)
        rows.append((str(score.k), *(f"{s.median:.2%} ({s.lowest:.1%} to {s.highest:.1%})" for s in (ridge, knn))))
    title = f"{config.model} on {config.test_shards}, top-1, median of {config.num_subsets} draws, {seconds:.1f} s"
    print_table(title, rows, ("per class", "ridge", f"{config.neighbors} nearest neighbours"))


def episodes(config: EpisodesConfig) -> None:
    """Print mean and interval over episodes."""
    from bit_ray.cli.first_look import look

    look("episodes of", config.model, config.shards, tracking=config.tracking, storage=config.storage)
    from bit_ray.cluster.session import cluster
    from bit_ray.data.shards.manifest import read_manifest
    from bit_ray.evaluation.frozen import episodes
    from bit_ray.inference.classifier import load_model
    from bit_ray.inference.features import cluster_features
    from bit_ray.tracking.address import tracking_uri

    manifest = read_manifest(config.shards)
    classifier = load_model(
        config.model, tracking_uri=tracking_uri(config.tracking.uri, config.storage), features_only=True
    )
    with cluster() as resources:
        found = cluster_features(classifier, config.shards, manifest, resources)
    rows = []
    for shots in config.shots:
        score = episodes(
            found.features,
            found.labels,
            ways=config.ways,
            shots=shots,
            queries=config.queries,
            num_episodes=config.num_episodes,
            seed=config.seed,
            class_names=manifest.class_names,
        )
        rows.append((f"{config.ways}-way {shots}-shot", f"{score.mean:.2%}", f"± {score.interval:.2%}"))
    title = f"{config.model} on {config.shards}, {config.num_episodes} episodes, nearest class mean"
    print_table(title, rows, ("episodes", "mean top-1", "95 % interval"))


def rank(config: RankConfig) -> None:
    """Print the models, the most promising first."""
    import hashlib
    from pathlib import PurePath

    from bit_ray import store
    from bit_ray.cluster.session import cluster
    from bit_ray.data.shards.manifest import MANIFEST, read_manifest
    from bit_ray.data.shards.write import write_shards
    from bit_ray.evaluation.rank import rank_models
    from bit_ray.tracking.address import tracking_uri
    from bit_ray.tracking.registry import list_models

    registry = tracking_uri(config.tracking.uri, config.storage)
    uris = list(config.models) or [f"models:/{m.name}/{m.version}" for m in list_models(registry)]
    if not uris:
        remedy = "pre-train one, or name some with --models"
        raise ConfigError.of("models", "empty, and no model is registered", "at least one model", remedy)
    with cluster() as resources:
        shards = config.images
        if not store.exists(store.join(shards, MANIFEST)):
            name = PurePath(shards.rstrip("/")).name
            mark = hashlib.sha256(store.absolute(shards).encode()).hexdigest()[:8]
            shards = store.join(config.storage, "ranked", f"{name}-{mark}")
            write_shards(
                config.images,
                shards,
                name=name,
                convert_images=config.convert_images,
                num_workers=resources.num_slots,
            )
            console.print(f"{config.images}: written as the shard set {shards}")
        ranked, broken = rank_models(
            uris,
            shards,
            read_manifest(shards),
            resources,
            shots=config.shots,
            per_class=config.per_class,
            by=config.by,
            tracking_uri=registry,
        )
    rows = [
        (str(i), row.uri, row.model, f"{row.ridge:.2%}", f"{row.knn:.2%}", f"{row.logme:.4f}", f"{row.seconds:.1f}")
        for i, row in enumerate(ranked, start=1)
    ]
    header = ("", "model", "network", "ridge", "k-NN", "LogME", "seconds")
    if rows:
        print_table(f"Models for {config.images}, by {config.by}; ridge from {config.shots} per class", rows, header)
    for row in ranked:
        if row.trained_on_these:
            console.print(f"{row.uri} was trained on these images: its scores say little of others")
    for uri, reason in broken:
        console.print(f"left out: {uri}: {reason}")
