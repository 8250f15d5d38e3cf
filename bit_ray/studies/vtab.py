"""VTAB-1k: one model, 19 tasks of 1,000 examples, the HyperRule for each, the whole test sets, the mean over tasks.

Every task is one Ray task, from the publisher's files to the score: missing shards are written, the 1,000 examples are
trained on in memory, the test set is read as a stream. A finished task is not run again.
"""

import logging
import time
from dataclasses import dataclass

import torch

from bit_ray import store
from bit_ray.claim import claimed_run
from bit_ray.config import digest, replace, to_dict
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.sources.vtab.index import Index
from bit_ray.data.sources.vtab.tasks import Task
from bit_ray.errors import BitRayError, ConfigError, DataError
from bit_ray.models.zoo import create_model
from bit_ray.recipes.hyperrule import HyperRule, hyperrule
from bit_ray.run_folder import RunFolder
from bit_ray.studies.engine import Bar, Study
from bit_ray.studies.transfer import top_1_on, transfer
from bit_ray.studies.tuner import Trial
from bit_ray.studies.vtab_config import VtabConfig
from bit_ray.studies.vtab_scores import (
    MEAN_COLUMNS,
    TASK_COLUMNS,
    TaskScore,
    load_score,
    markdown,
    mean_rows,
    means,
    task_rows,
)
from bit_ray.studies.vtab_shards import prepare_shards, training_images
from bit_ray.tracking.address import tracking_uri
from bit_ray.tracking.runs import TrackedRun
from bit_ray.training.initial_weights import InitialWeights, read_init
from bit_ray.training.plan import transfer_plan

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class VtabReport:
    """Scores of the tasks, and the tasks that were not run."""

    scores: tuple[TaskScore, ...]
    """Scores of the tasks that have been run, now or before, in the order of the benchmark."""
    problems: dict[str, str]
    """Why the others were not run, by name: what to fetch and where to put it."""


def vtab_suite(config: VtabConfig) -> VtabReport:
    """Run the chosen tasks, as many in parallel as the cluster has GPUs or cores, and record their means.

    Raises:
        BitRayError: None of the tasks could be run, or anything else that the user can fix.
    """
    config = _with_absolute_paths(config)
    start = _read_start(config)
    with claimed_run(config.storage, config.name):
        return _study(config, start)


def _study(config: VtabConfig, start: InitialWeights) -> VtabReport:
    settings = _settings(config, start)
    trials = [
        Trial(
            key=task.name,
            identity=settings,
            params={"task": task.name, "group": task.group},
            arguments=(task, config, start.model, start.digest, settings),
            size=task.sizes[2],
        )
        for task in config.chosen
    ]
    study = Study(RunFolder.of(config.storage, config.name), trials, load_score)
    with TrackedRun.open(
        config.tracking,
        run_name=config.name,
        storage=config.storage,
        params=to_dict(config),
        tags={"bit_ray.weights_sha256": start.digest},
        kind="vtab",
    ) as run:
        found = study.run(
            _prepare_train_and_test,
            dict(start.tensors) or None,
            run,
            Bar("VTAB-1k", "tasks"),
            side_by_side=config.side_by_side,
            keep_going=True,
        )
        if not study.scores:
            first, *others = (found[task.name] for task in config.chosen)
            for error in others:
                log.warning("%s", error)
            raise first
        for error in found.values():
            log.warning("%s", error)
        problems = {name: str(error) for name, error in found.items()}
        scores = tuple(study.scores[task.name] for task in config.chosen if task.name in study.scores)
        report = VtabReport(scores, problems)
        _record(run, report)
    return report


def plan_tasks(config: VtabConfig) -> list[tuple[Task, HyperRule | None, str]]:
    """What would be done with each task: its rule and its training data, or no rule and why not.

    Opens the data, but writes nothing.
    """
    start = _read_start(config)
    found: list[tuple[Task, HyperRule | None, str]] = []
    for task in config.chosen:
        try:
            num_examples, size, origin = training_images(task, config)
            found.append((task, _rule(config, task, start.model, num_examples, size), origin))
        except DataError as error:
            found.append((task, None, str(error.about(task.name))))
    return found


def _read_start(config: VtabConfig) -> InitialWeights:
    """Return the weights that all tasks start from; without tensors: from scratch."""
    if not config.init:
        create_model(config.model, 1)  # refuses an unknown name
        return InitialWeights(config.model, {}, "", "")
    init = read_init(config.init, tracking_uri(config.tracking.uri, config.storage))
    if config.model and config.model != init.model:
        given = f"{config.model}, but the weights in {config.init} are of {init.model}"
        raise ConfigError.of("model", given, remedy="leave it out")
    return init


def _with_absolute_paths(config: VtabConfig) -> VtabConfig:
    """The same config for processes with another current directory."""
    names = ("data_dir", "shards", "index", "storage")
    paths = {name: getattr(config, name) for name in names}
    return replace(config, {name: store.absolute(path) for name, path in paths.items() if path})


def _settings(config: VtabConfig, start: InitialWeights) -> str:
    """Digest of what decides the scores; tasks, folders and tracking are not part of it."""
    names = ("index", "subset_seed", "num_train", "num_val", "protocol", "profile", "rule", "train", "seed")
    chosen = to_dict(config)
    for name in ("decay_to_init", "dropout"):  # runs started before these settings existed continue
        if not chosen["rule"][name]:
            del chosen["rule"][name]
    return digest({"model": start.model, "weights": start.digest, **{name: chosen[name] for name in names}})


def _rule(config: VtabConfig, task: Task, model: str, num_examples: int, image_size: tuple[int, int]) -> HyperRule:
    return hyperrule(
        num_examples,
        image_size,
        config.profile,
        model,
        random_crop=task.random_crop,
        random_flip=task.random_flip,
        overrides=config.rule,
    )


def _prepare_train_and_test(
    tensors: dict[str, torch.Tensor] | None,
    task: Task,
    config: VtabConfig,
    model: str,
    init_digest: str,
    settings: str,
    num_threads: int,
) -> TaskScore:
    """One task from data to score; runs in a Ray task and may run again."""
    try:
        uris, index = prepare_shards(task, config)
        began = time.monotonic()
        manifest, test_manifest = (read_manifest(uri) for uri in uris)
        for uri, found in zip(uris, (manifest, test_manifest), strict=True):
            if found.multi_label or found.num_classes != task.num_classes or found.class_names != manifest.class_names:
                raise DataError(
                    f"{uri}: {found.num_classes} classes; accepted: the {task.num_classes} of the task, named as in "
                    f"{uris[0]}; delete the set, and it is written again"
                )
        rule = _rule(config, task, model, manifest.num_examples, manifest.median_image_size)
        plan = transfer_plan(
            rule,
            model=model,
            num_classes=task.num_classes,
            manifest_digest=manifest.digest,
            init=config.init,
            init_digest=init_digest,
            seed=config.seed,
            train=config.train,
        )
        micro = config.runtime.micro_batch_size
        network = transfer(plan, uris[0], manifest, None, tensors, num_threads=num_threads, micro_batch_size=micro)
        top_1 = top_1_on(network, uris[1], test_manifest, plan)
    except BitRayError as error:
        raise error.about(task.name) from None
    return TaskScore(
        task=task.name,
        top_1=top_1,
        num_train=plan.num_examples,
        num_test=test_manifest.num_examples,
        statement=_statement(task, config, index, test_manifest.num_examples),
        rule=to_dict(rule),
        seconds=time.monotonic() - began,
        settings_digest=settings,
    )


def _statement(task: Task, config: VtabConfig, index: Index, num_test: int) -> str:
    parts = [index.statement if index.train else f"{task.name}: {index.origin}"]
    if config.protocol == "test":
        if index.has_own_test(task):
            parts.append("test images by a fixed split of bit_ray, because no split is published")
        if num_test != task.sizes[2]:
            parts.append(f"{num_test:,} of {task.sizes[2]:,} test images")
    else:
        parts.append("scored on the validation examples")
    return "; ".join(parts)


def _record(run: TrackedRun, report: VtabReport) -> None:
    """Log each score and the means as metrics, and both tables."""
    top_1 = {score.task: score.top_1 for score in report.scores}
    run.log_metrics({f"vtab/{name}": value for name, value in top_1.items()}, step=0)
    # Means change when a continued study has more tasks: their step is the number of tasks.
    run.log_metrics({f"vtab_mean/{mean.group.replace(' ', '_')}": mean.top_1 for mean in means(top_1)}, step=len(top_1))
    table = markdown(TASK_COLUMNS, task_rows(report.scores))
    statements = "".join(f"- {score.statement}\n" for score in report.scores)
    run.log_text(f"{markdown(MEAN_COLUMNS, mean_rows(report.scores))}\n{table}\n{statements}", "vtab.md")
