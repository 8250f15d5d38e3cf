import re
from dataclasses import asdict

import pytest

from bit_ray import store
from bit_ray.data.sources.vtab.tasks import TASKS
from bit_ray.errors import ConfigError, DataError
from bit_ray.studies.vtab_config import VtabConfig
from bit_ray.studies.vtab_scores import (
    MEAN_COLUMNS,
    OVERALL,
    PUBLISHED_MEANS,
    PUBLISHED_TASKS,
    TaskScore,
    load_score,
    mean_rows,
    means,
    task_rows,
)


def score(task, top_1, digest="d"):
    return TaskScore(
        task=task, top_1=top_1, num_train=1000, num_test=20, statement="s", rule={}, seconds=1.0,
        settings_digest=digest,
    )  # fmt: skip


def test_published_tasks_give_the_published_means_over_tasks():
    # ResNet-50, task_adaptation: the per-task row must reproduce its own means, natural 73.46 to overall 66.37.
    found = {mean.group: mean.top_1 for mean in means(PUBLISHED_TASKS)}
    published = PUBLISHED_MEANS["R50 supervised, sweep"]
    assert found == pytest.approx(published, abs=0.06)  # the row is rounded to a tenth


@pytest.mark.parametrize("name", [name for name, row in PUBLISHED_MEANS.items() if len(row) == 4])
def test_published_overall_means_weigh_groups_by_their_tasks(name):
    row = PUBLISHED_MEANS[name]
    weighed = (7 * row["natural"] + 4 * row["specialized"] + 8 * row["structured"]) / 19
    assert weighed == pytest.approx(row[OVERALL], abs=0.02)
    of_groups = (row["natural"] + row["specialized"] + row["structured"]) / 3
    assert of_groups != pytest.approx(row[OVERALL], abs=0.5)


def test_means_of_a_part_say_so():
    top_1 = {"svhn": 0.5, "dtd": 0.7, "clevr-count": 0.3}
    found = {mean.group: (mean.num_done, mean.num_tasks, round(mean.top_1, 6)) for mean in means(top_1)}
    assert found == {"natural": (2, 7, 0.6), "structured": (1, 8, 0.3), OVERALL: (3, 19, 0.5)}
    rows = mean_rows([score(name, value) for name, value in top_1.items()])
    assert MEAN_COLUMNS == ("top-1, %", "natural", "specialized", "structured", OVERALL)
    assert rows[0] == ("this run", "60.00 (2 of 7)", "", "30.00 (1 of 8)", "50.00 (3 of 19)")
    assert rows[1] == ("BiT-M R152x4, re-run", "80.77", "85.67", "61.08", "73.51")


def test_whole_studies_are_shown_without_remark():
    rows = mean_rows([score(task.name, 0.25) for task in TASKS])
    assert rows[0] == ("this run", "25.00", "25.00", "25.00", "25.00")
    assert task_rows([score("sun397", 0.34567)]) == [("sun397", "natural", "20", "34.57%", "34.4%")]


def test_a_score_comes_back_and_another_setting_is_refused(tmp_path):
    uri = str(tmp_path / "svhn.json")
    assert load_score(uri, "d") is None
    store.write_json(uri, asdict(score("svhn", 0.5)))
    assert load_score(uri, "d") == score("svhn", 0.5)
    with pytest.raises(ConfigError, match=f"svhn was run under this name with other settings.*delete {re.escape(uri)}"):
        load_score(uri, "other")
    (tmp_path / "svhn.json").write_text('{"format": 1, "task": "svhn"}')
    with pytest.raises(DataError, match="top_1: missing; .*; delete it to run the task again"):
        load_score(uri, "d")
    (tmp_path / "svhn.json").write_text("[]")
    with pytest.raises(DataError, match="delete it to run the task again"):
        load_score(uri, "d")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ""}, "init: empty, and model is empty"),
        ({"tasks": ("svhn", "svhn")}, "tasks: svhn svhn; accepted: each task once"),
        ({"tasks": ("svnh",)}, r"tasks: svnh; accepted: .*; did you mean svhn\?"),
        ({"num_train": 0}, "num_train: 0; accepted: a whole number of at least 1"),
        ({"side_by_side": -1}, "side_by_side: -1"),
        ({"subset_seed": -1}, "subset_seed: -1"),
        ({"train": "heads"}, "train: 'heads'; accepted: all, head, "),
        ({"train": "head"}, "train: head, but init is empty"),
    ],
)
def test_settings_that_cannot_work_are_one_line(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        VtabConfig(**{"name": "x", "model": "R50x1", **changes})
    assert "\n" not in str(caught.value)


def test_tasks_run_in_the_order_of_the_benchmark():
    assert [task.name for task in VtabConfig(name="x", model="R50x1", tasks=("dmlab", "svhn")).chosen] == [
        "svhn",
        "dmlab",
    ]
    assert len(VtabConfig(name="x", model="R50x1").chosen) == 19
