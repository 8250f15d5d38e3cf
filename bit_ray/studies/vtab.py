"""VTAB-1k: one model, 19 tasks of 1,000 examples, the HyperRule for each, the whole test sets, the mean over tasks.

Every task is one Ray task of its own, from the publisher's files to the score: shards are written where they are
missing, the 1,000 examples are trained on in memory, the test set is read as a stream. What is finished stays so.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch

from bit_ray import store
from bit_ray.claim import CLAIM_FILE, claimed, claimed_run
from bit_ray.cluster.session import Resources, cluster, num_local_cores
from bit_ray.config import digest, replace, to_dict
from bit_ray.data.images.decode import decode_image
from bit_ray.data.shards.manifest import MANIFEST, read_manifest
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.base import Example
from bit_ray.data.sources.vtab.index import Index, fits, load_index, read_index, write_index
from bit_ray.data.sources.vtab.splits import draw_index, open_task
from bit_ray.data.sources.vtab.tasks import Task
from bit_ray.errors import BitRayError, ConfigError, DataError, root_cause
from bit_ray.models.zoo import create_model
from bit_ray.progress import track
from bit_ray.recipes.hyperrule import HyperRule, hyperrule
from bit_ray.studies.few_shot import read_examples, top_1_on
from bit_ray.studies.vtab_config import VtabConfig
from bit_ray.studies.vtab_scores import (
    MEAN_COLUMNS,
    TASK_COLUMNS,
    TaskScore,
    load_score,
    markdown,
    mean_rows,
    means,
    save_score,
    task_rows,
)
from bit_ray.tracking.runs import TrackedRun
from bit_ray.tracking.server import tracking_uri
from bit_ray.training.finetune import read_init
from bit_ray.training.in_memory import fit
from bit_ray.training.plan import transfer_plan

log = logging.getLogger(__name__)

# The largest task's shards are written in hours.
_WAIT_S = 86400.0


@dataclass(frozen=True)
class VtabReport:
    """What came out."""

    scores: tuple[TaskScore, ...]
    """Of the tasks that have been run, now or before, in the order of the benchmark."""
    problems: dict[str, str]
    """Why the others were not, by name: what to fetch and where to put it."""


@dataclass(frozen=True)
class _Start:
    """The weights that all tasks start from."""

    model: str
    uri: str
    digest: str
    tensors: dict[str, torch.Tensor] | None


def vtab_suite(config: VtabConfig) -> VtabReport:
    """Run the chosen tasks, as many side by side as the cluster has places, and record their means.

    Raises:
        DataError: not one of the tasks could be run.
        BitRayError: Anything else the user can put right.
    """
    config = _with_absolute_paths(config)
    start = _read_start(config)
    with claimed_run(config.storage, config.name):
        return _suite(config, start)


def _suite(config: VtabConfig, start: _Start) -> VtabReport:
    settings = _settings(config, start)
    place = store.join(config.storage, config.name, "scores")
    done = {task.name: load_score(store.join(place, f"{task.name}.json"), settings) for task in config.chosen}
    scores = {name: score for name, score in done.items() if score is not None}
    todo = [task for task in config.chosen if task.name not in scores]
    run = TrackedRun.open(
        config.tracking,
        run_name=config.name,
        storage=config.storage,
        params=to_dict(config),
        tags={"bit_ray.weights_sha256": start.digest},
        kind="vtab",
    )
    try:
        problems: dict[str, str] = {}
        if todo:
            with cluster() as resources:
                for name, result in _run(todo, config, start, settings, place, resources):
                    if isinstance(result, TaskScore):
                        scores[name] = result
                    else:
                        problems[name] = str(result)
                        log.warning("%s", result)
        if not scores:
            first = problems[todo[0].name]
            others = len(problems) - 1
            more = f" (and {others} more task{'s' * (others > 1)} without data or with a mistake)" if others else ""
            raise DataError(f"{first}{more}")
        report = VtabReport(tuple(scores[task.name] for task in config.chosen if task.name in scores), problems)
        _record(run, report)
    except BaseException:
        run.close("FAILED")
        raise
    run.close()
    return report


def plan_tasks(config: VtabConfig) -> list[tuple[Task, HyperRule | None, str]]:
    """What would be done with each task: its rule, and what it is learnt from, or no rule and why not.

    Opens the data, and writes nothing.
    """
    start = _read_start(config)
    found: list[tuple[Task, HyperRule | None, str]] = []
    for task in config.chosen:
        try:
            num_examples, size, said = _look(task, config)
            found.append((task, _rule(config, task, start.model, num_examples, size), said))
        except DataError as error:
            found.append((task, None, str(error)))
    return found


def _look(task: Task, config: VtabConfig) -> tuple[int, tuple[int, int], str]:
    """Number and median size of the images to learn from, and what they are."""
    learnt, scored = _splits(config)
    root = _shards(task, config)
    if all(store.exists(store.join(root, name, MANIFEST)) for name in (learnt, scored)):
        manifest = read_manifest(store.join(root, learnt))
        return manifest.num_examples, manifest.median_image_size, f"shards in {root}"
    data = open_task(task, config.data_dir)
    index = read_index(config.index, task) if config.index else None
    index = index or draw_index(data, config.subset_seed, config.num_train, config.num_val)
    source = data.subset(learnt, index)
    few = source.part(np.arange(min(9, len(source))))
    sizes = [decode_image(one.image, convert=True).shape[:2] for one in few if isinstance(one, Example)]
    height, width = np.median(np.array(sizes), axis=0).astype(int).tolist()
    return len(source), (height, width), "; ".join(filter(None, (index.origin, data.missing.partition(": ")[2])))


def _shards(task: Task, config: VtabConfig) -> str:
    """Folder of the task's shard sets."""
    return store.join(config.shards or store.join(config.storage, "vtab"), task.name)


def _read_start(config: VtabConfig) -> _Start:
    if not config.init:
        create_model(config.model, 1)  # which refuses an unknown name
        return _Start(config.model, "", "", None)
    init = read_init(config.init, tracking_uri(config.tracking.uri, config.storage))
    if config.model and config.model != init.model:
        raise ConfigError(f"model: {config.model}, but {config.init} holds {init.model}; leave model out")
    return _Start(init.model, config.init, init.digest, dict(init.tensors))


def _with_absolute_paths(config: VtabConfig) -> VtabConfig:
    """The same for processes that have another current directory."""
    names = ("data_dir", "shards", "index", "storage")
    paths = {name: getattr(config, name) for name in names}
    return replace(config, {name: store.absolute(path) for name, path in paths.items() if path})


def _settings(config: VtabConfig, start: _Start) -> str:
    """Digest of what decides the scores, whatever the tasks, the places and the record."""
    names = ("index", "subset_seed", "num_train", "num_val", "protocol", "profile", "rule", "train", "seed")
    chosen = to_dict(config)
    for name in ("decay_to_init", "dropout"):  # suites begun before there were these go on
        if chosen["rule"][name] is None:
            del chosen["rule"][name]
    return digest({"model": start.model, "weights": start.digest, **{name: chosen[name] for name in names}})


def _splits(config: VtabConfig) -> tuple[str, str]:
    """What is learnt from, and what is scored."""
    return ("train800val200", "test") if config.protocol == "test" else ("train800", "val200")


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


def _run(
    todo: list[Task], config: VtabConfig, start: _Start, settings: str, place: str, resources: Resources
) -> Iterator[tuple[str, TaskScore | BitRayError]]:
    """The outcome of each task, as they finish."""
    at_a_time = min(config.side_by_side or resources.num_places, resources.num_places, len(todo))
    if resources.num_gpus:
        num_threads = max(1, resources.num_cpus // resources.num_places)
        options = {"num_cpus": num_threads, "num_gpus": 1}
    else:  # one task uses the cores that no other can
        num_threads = max(1, min(num_local_cores(), resources.num_places // at_a_time))
        options = {"num_cpus": resources.num_cpus // resources.num_places * num_threads, "num_gpus": 0}
    remote = ray.remote(**options, max_retries=3)(_outcome)
    tensors = ray.put(start.tensors)
    # The largest test sets first, so that no core idles at the end.
    waiting = sorted(todo, key=lambda task: task.sizes[2])
    pending: dict[Any, str] = {}
    try:
        with track("VTAB-1k", len(todo), "tasks") as advance:
            while waiting or pending:
                while waiting and len(pending) < at_a_time:
                    task = waiting.pop()
                    score = store.join(place, f"{task.name}.json")
                    ref = remote.remote(
                        task, config, (start.model, start.uri, start.digest), tensors, settings, score, num_threads
                    )
                    pending[ref] = task.name
                [ref], _ = ray.wait(list(pending), num_returns=1)
                yield pending.pop(ref), ray.get(ref)
                advance(1)
    except ray.exceptions.RayError as error:
        raise root_cause(error) or error from None
    finally:
        for ref in pending:
            ray.cancel(ref, force=True)


def _outcome(
    task: Task,
    config: VtabConfig,
    start: tuple[str, str, str],
    tensors: dict[str, torch.Tensor] | None,
    settings: str,
    score_uri: str,
    num_threads: int,
) -> TaskScore | BitRayError:
    """One task from data to score, or a user's mistake as a value; runs in a Ray task and may run again."""
    try:
        uris, index = prepare_shards(task, config)
        score = _train_and_test(task, config, _Start(*start, tensors), uris, index, settings, num_threads)
    except BitRayError as error:
        # Another task's data are no worse for it.
        return error if str(error).startswith(f"{task.name}: ") else type(error)(f"{task.name}: {error}")
    save_score(score, score_uri)
    return score


def prepare_shards(task: Task, config: VtabConfig) -> tuple[tuple[str, str], Index]:
    """Return the shard sets to learn from and to score, written where they are missing, and the index they follow.

    Suites that share a folder of shards wait for each other here.

    Raises:
        DataError: data are missing or damaged, an index does not fit, or the shards follow another one.
        ConfigError: another suite has been writing them for a day.
    """
    root = _shards(task, config)
    if all(store.exists(store.join(root, name, MANIFEST)) for name in _splits(config)):
        return _prepare_shards(task, config, root)
    busy = f"{task.name}: {root} is being written"
    with claimed(store.join(root, CLAIM_FILE), busy, remedy="wait for it, or choose other shards", wait_s=_WAIT_S):
        return _prepare_shards(task, config, root)


def _prepare_shards(task: Task, config: VtabConfig, root: str) -> tuple[tuple[str, str], Index]:
    index_uri = store.join(root, "index.json")
    uris = [store.join(root, name) for name in _splits(config)]
    listed = read_index(config.index, task) if config.index else None
    stored = load_index(index_uri, task) if store.exists(index_uri) else None
    if stored is not None:
        if listed:
            same = (stored.train, stored.val, stored.test) == (listed.train, listed.val, listed.test)
        else:
            same = fits(stored, config.subset_seed, config.num_train, config.num_val)
        if not same:
            raise DataError(
                f"{task.name}: {index_uri} has other examples than asked for ({stored.statement}); accepted: the same "
                "index, seed and numbers; choose another folder of shards"
            )
    written = all(store.exists(store.join(uri, MANIFEST)) for uri in uris)
    if written and stored is None and listed is None:  # by bit-ray shards write
        return (uris[0], uris[1]), Index(task=task.name, origin=f"as in the shards {root}", train=(), val=())
    if stored is None or not written:
        data = open_task(task, config.data_dir)
        stored = stored or listed or draw_index(data, config.subset_seed, config.num_train, config.num_val)
        for name, uri in zip(_splits(config), uris, strict=True):
            source = data.subset(name, stored)
            if name == _splits(config)[0]:
                write_index(stored, index_uri)
            write_shards(source, uri, name=f"vtab:{task.name}:{name}", convert_images=True)
    return (uris[0], uris[1]), stored


def _train_and_test(
    task: Task, config: VtabConfig, start: _Start, uris: tuple[str, str], index: Index, settings: str, num_threads: int
) -> TaskScore:
    began = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(num_threads)
    manifest, test_manifest = (read_manifest(uri) for uri in uris)
    for uri, found in zip(uris, (manifest, test_manifest), strict=True):
        if found.multi_label or found.num_classes != task.num_classes or found.class_names != manifest.class_names:
            raise DataError(
                f"{task.name}: {uri} has {found.num_classes} classes; accepted: the {task.num_classes} of the task, "
                f"named as in {uris[0]}; delete it to have it written again"
            )
    rule = _rule(config, task, start.model, manifest.num_examples, manifest.median_image_size)
    plan = transfer_plan(
        rule,
        model=start.model,
        num_classes=task.num_classes,
        manifest_digest=manifest.digest,
        init=start.uri,
        init_digest=start.digest,
        seed=config.seed,
        train=config.train,
    )
    examples = read_examples(uris[0], manifest, None, plan)
    model = fit(plan, examples, start.tensors, device=device, micro_batch_size=config.micro_batch_size)
    top_1 = top_1_on(model, uris[1], test_manifest, plan)
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
    said = [index.statement if index.train else f"{task.name}: {index.origin}"]
    if config.protocol == "test":
        if index.has_own_test(task):
            said.append("test images by a fixed split of our own, since none is published")
        if num_test != task.sizes[2]:
            said.append(f"{num_test:,} of {task.sizes[2]:,} test images")
    else:
        said.append("scored on the validation examples")
    return "; ".join(said)


def _record(run: TrackedRun, report: VtabReport) -> None:
    """Log each score and the means as metrics, and both tables."""
    top_1 = {score.task: score.top_1 for score in report.scores}
    run.log_metrics({f"vtab/{name}": value for name, value in top_1.items()}, step=0)
    # Means change when a continued suite has more tasks: their step is the number of tasks.
    run.log_metrics({f"vtab_mean/{mean.group.replace(' ', '_')}": mean.top_1 for mean in means(top_1)}, step=len(top_1))
    table = markdown(TASK_COLUMNS, task_rows(report.scores))
    said = "".join(f"- {score.statement}\n" for score in report.scores)
    run.log_text(f"{markdown(MEAN_COLUMNS, mean_rows(report.scores))}\n{table}\n{said}", "vtab.md")
