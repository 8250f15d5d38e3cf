"""Scores of VTAB-1k: per task, per group and over all, next to published scores."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from bit_ray import store
from bit_ray.data.sources.vtab.tasks import GROUPS, TASKS
from bit_ray.errors import ConfigError

OVERALL = "all 19"

# Top-1, per cent. The re-runs are those of big_transfer:README with BiT-M weights, not the models of the paper.
# The baselines are ResNet-50 with a sweep of four settings (task_adaptation:docs/data/results.csv).
PUBLISHED_MEANS: dict[str, dict[str, float]] = {
    "BiT-M R152x4, re-run": {"natural": 80.77, "specialized": 85.67, "structured": 61.08, OVERALL: 73.51},
    "BiT-M R101x3, re-run": {"natural": 80.29, "specialized": 85.75, "structured": 59.40, OVERALL: 72.65},
    "BiT-L R152x4, paper": {OVERALL: 76.29},
    "BiT-M R152x4, paper": {OVERALL: 70.64},
    "BiT-S R152x4, paper": {OVERALL: 66.87},
    "R50 supervised, sweep": {"natural": 73.46, "specialized": 82.49, "structured": 52.10, OVERALL: 66.37},
    "R50 from scratch, sweep": {"natural": 27.91, "specialized": 68.94, "structured": 43.57, OVERALL: 43.14},
}
PUBLISHED_TASKS: dict[str, float] = {
    "cifar100": 57.0,
    "caltech101": 91.0,
    "dtd": 66.0,
    "oxford_flowers102": 88.6,
    "oxford_iiit_pet": 89.9,
    "svhn": 87.3,
    "sun397": 34.4,
    "patch_camelyon": 80.6,
    "eurosat": 95.3,
    "resisc45": 80.8,
    "diabetic_retinopathy": 73.2,
    "clevr-count": 41.0,
    "clevr-distance": 56.1,
    "dmlab": 36.3,
    "kitti-distance": 70.6,
    "dsprites-xpos": 85.7,
    "dsprites-orientation": 46.0,
    "smallnorb-azimuth": 45.7,
    "smallnorb-elevation": 35.4,
}
"""Top-1 of the supervised ResNet-50 on each task, per cent."""


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """The result of one task."""

    task: str
    """Its name."""
    top_1: float
    """Top-1 as a fraction of 1, the benchmark's metric for every task."""
    num_train: int
    """Examples learned from."""
    num_test: int
    """Images scored."""
    statement: str
    """What the examples were, and whether the numbers may be compared with published ones."""
    rule: dict[str, Any]
    """Settings of the training, by the HyperRule."""
    seconds: float
    """Time of training and test, without writing shards."""
    settings_digest: str
    """Digest of all that decides the score."""
    format: Literal[1] = 1


@dataclass(frozen=True, kw_only=True)
class Mean:
    """Mean top-1 over tasks."""

    group: str
    """Group, or all of them."""
    num_done: int
    """Tasks that were run."""
    num_tasks: int
    """Tasks in total."""
    top_1: float
    """Mean top-1 as a fraction of 1."""


def means(top_1: Mapping[str, float]) -> list[Mean]:
    """Mean of each group and of all tasks that were run; a group without such tasks is left out.

    The last is the mean over tasks, not over groups (task_adaptation; 7, 4 and 8 tasks).

    Args:
        top_1: fraction of 1 by name of the task.
    """
    found = []
    for group in (*GROUPS, OVERALL):
        names = [task.name for task in TASKS if group in (task.group, OVERALL)]
        done = [top_1[name] for name in names if name in top_1]
        if done:
            found.append(Mean(group=group, num_done=len(done), num_tasks=len(names), top_1=sum(done) / len(done)))
    return found


TASK_COLUMNS = ("task", "group", "images", "top-1", "published R50")
MEAN_COLUMNS = ("top-1, %", *GROUPS, OVERALL)


def task_rows(scores: Iterable[TaskScore]) -> list[tuple[str, ...]]:
    """Rows of a table: task, group, scored images, top-1, and the published ResNet-50's top-1."""
    groups = {task.name: task.group for task in TASKS}
    return [
        (s.task, groups[s.task], f"{s.num_test:,}", f"{s.top_1:.2%}", f"{PUBLISHED_TASKS[s.task]:.1f}%") for s in scores
    ]


def mean_rows(scores: Iterable[TaskScore]) -> list[tuple[str, ...]]:
    """Rows of a table of means: this run, then each published one."""
    found = {mean.group: mean for mean in means({score.task: score.top_1 for score in scores})}
    cells = ["this run"]
    for group in MEAN_COLUMNS[1:]:
        mean = found.get(group)
        part = f" ({mean.num_done} of {mean.num_tasks})" if mean and mean.num_done < mean.num_tasks else ""
        cells.append(f"{100 * mean.top_1:.2f}{part}" if mean else "")
    rows = [tuple(cells)]
    for name, values in PUBLISHED_MEANS.items():
        rows.append((name, *(f"{values[group]:.2f}" if group in values else "" for group in MEAN_COLUMNS[1:])))
    return rows


def markdown(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [header, ("---",) * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def load_score(uri: str, identity: str) -> TaskScore | None:
    """Read the score of a finished task; None if there is none.

    Raises:
        DataError: the file is not a score file.
        ConfigError: the task was run with other settings.
    """
    if not store.exists(uri):
        return None
    score = store.read_record(TaskScore, uri, "delete it to run the task again")
    if score.settings_digest != identity:
        given = f"{score.task} was run under this name with other settings or weights"
        raise ConfigError.of("name", given, "the same settings and weights", f"choose another name, or delete {uri}")
    return score
