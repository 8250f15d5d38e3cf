import json
import re

import numpy as np
import pytest
import torch
import vtab_files as files
from mlflow import MlflowClient

from bit_ray.cli.main import main
from bit_ray.data.images.decode import decode_image
from bit_ray.data.images.resize import eval_view
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.vtab.index import load_index, write_index
from bit_ray.data.sources.vtab.splits import draw_index, open_task
from bit_ray.data.sources.vtab.tasks import find_task
from bit_ray.errors import ConfigError, DataError
from bit_ray.progress import console
from bit_ray.recipes.hyperrule import RuleOverrides, hyperrule
from bit_ray.studies.vtab import vtab_suite
from bit_ray.studies.vtab_config import VtabConfig
from bit_ray.training.device import normalize
from bit_ray.training.in_memory import Examples, fit
from bit_ray.training.plan import transfer_plan

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_local")]
NAME = "R1-1-1-1x0.5"
RULE = RuleOverrides(num_steps=12, batch_size=16, base_lr=0.03, resize=40, crop=32)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vtab_data")
    files.svhn(folder, num_train=60, num_test=90)
    files.eurosat(folder)
    files.clevr(folder, num_train=40, num_val=12)
    return folder


def config(data, place, tracking, **changes):
    return VtabConfig(
        **{
            "name": "suite",
            "tracking": tracking,
            "model": NAME,
            "tasks": ("svhn", "clevr-count", "eurosat"),
            "data_dir": str(data),
            "num_train": 20,
            "num_val": 4,
            "rule": RULE,
            "storage": str(place),
            **changes,
        }
    )


def plain_top_1(data, name):
    """The same without shards, Ray and suite: the sources, the rule, a fit, and a loop over single images."""
    task = find_task(name)
    opened = open_task(task, data)
    index = draw_index(opened, 0, 20, 4)

    def read(split):
        source = opened.subset(split, index)
        found = list(source.part(np.arange(len(source))))
        images = [decode_image(example.image, convert=True) for example in found]
        return Examples(tuple(e.id for e in found), images, np.array([e.labels[0] for e in found])), images

    train, images = read("train800val200")
    test, _ = read("test")
    rule = hyperrule(
        24, images[0].shape[:2], "code", NAME, random_crop=task.random_crop, random_flip=task.random_flip,
        num_steps=12, batch_size=16, base_lr=0.03, resize=40, crop=32,
    )  # fmt: skip
    plan = transfer_plan(
        rule, model=NAME, num_classes=task.num_classes, manifest_digest="", init="", init_digest="", seed=0
    )
    # The order of the examples in memory decides which step sees which: that of the shards.
    return plan, train, test


def in_order(examples, ids):
    place = {id: i for i, id in enumerate(examples.ids)}
    return examples.subset(np.array([place[id] for id in ids]))


def shard_ids(uri):
    from bit_ray.data.shards.read import read_tables

    return [id for table in read_tables(str(uri), read_manifest(str(uri)), ("id",)) for id in table["id"].to_pylist()]


def test_tasks_run_side_by_side_are_recorded_and_not_run_again(
    data, tmp_path, tracking, capsys, monkeypatch, two_trials_at_a_time
):
    monkeypatch.setattr(console, "_width", 200)
    report = vtab_suite(config(data, tmp_path, tracking))
    assert [score.task for score in report.scores] == ["svhn", "eurosat", "clevr-count"]
    assert report.problems == {}
    top_1 = {score.task: score.top_1 for score in report.scores}
    assert {score.task: (score.num_train, score.num_test) for score in report.scores} == {
        "svhn": (24, 90), "eurosat": (24, 20), "clevr-count": (24, 12),
    }  # fmt: skip

    rules = {score.task: score.rule for score in report.scores}
    assert [rules[name]["random_crop"] for name in ("svhn", "clevr-count")] == [True, False]
    assert all(rule["regime"] == "small" and rule["mixup_alpha"] == 0 for rule in rules.values())
    statements = {score.task: score.statement for score in report.scores}
    assert statements["svhn"] == (
        "svhn: 20 + 4 examples, the first in the order of TensorFlow Datasets, but not of the whole published set; "
        "90 of 26,032 test images"
    )
    assert statements["eurosat"].endswith("; 20 of 5,400 test images")

    # The same by a plain loop, without shards and Ray.
    plan, train, test = plain_top_1(data, "svhn")
    train = in_order(train, shard_ids(tmp_path / "vtab" / "svhn" / "train800val200"))
    torch.set_num_threads(2)
    model = fit(plan, train)
    right = 0
    with torch.inference_mode():
        for image, label in zip(test.images, test.labels, strict=True):
            view = eval_view(image, resize_mode="square", resize_size=32, crop_size=32)
            x = normalize(torch.from_numpy(view[None]), torch.device("cpu"))
            right += int(model(x).argmax(1)) == label
    assert top_1["svhn"] == pytest.approx(right / 90, abs=1 / 90 + 1e-9)  # one image may lie on the edge of two classes
    assert top_1["svhn"] > 0.2  # shades that a few steps can tell apart; chance is 0.1

    client = MlflowClient(tracking_uri=tracking.uri)
    runs = client.search_runs([client.get_experiment_by_name(tracking.experiment).experiment_id])
    [run] = [run for run in runs if run.data.tags["bit_ray.kind"] == "vtab"]
    below = [child for child in runs if child.data.tags.get("mlflow.parentRunId") == run.info.run_id]
    assert {child.info.run_name: child.data.metrics["top_1"] for child in below} == top_1
    assert run.info.status == "FINISHED"
    assert {name: run.data.metrics[f"vtab/{name}"] for name in top_1} == top_1
    assert run.data.metrics["vtab_mean/natural"] == top_1["svhn"]
    assert run.data.metrics["vtab_mean/all_19"] == pytest.approx(sum(top_1.values()) / 3)

    index = load_index(tmp_path / "vtab" / "svhn" / "index.json", find_task("svhn"))
    assert len(index.train + index.val) == len(set(index.train + index.val)) == 24
    assert set(shard_ids(tmp_path / "vtab" / "svhn" / "train800val200")) == set(index.train + index.val)

    again = vtab_suite(config("/nowhere", tmp_path, tracking))
    assert again == report  # the seconds, too: nothing was run

    flags = ["--name", "suite", "--model", NAME, "--tasks", "svhn", "clevr-count", "eurosat", "--num-train", "20"]
    flags += ["--num-val", "4", "--rule.num-steps", "12", "--rule.batch-size", "16", "--rule.base-lr", "0.03"]
    flags += ["--rule.resize", "40", "--rule.crop", "32", "--storage", str(tmp_path)]
    flags += ["--tracking.uri", tracking.uri, "--tracking.experiment", tracking.experiment]
    assert main(["vtab", *flags]) == 0
    printed = capsys.readouterr().out
    assert re.search(rf"svhn .* natural .* 90 .* {top_1['svhn']:.2%} .* 87.3%", printed)
    assert re.search(rf"this run .* {100 * top_1['svhn']:.2f} \(1 of 7\)", printed)
    assert re.search("BiT-M R152x4, re-run .* 80.77 .* 85.67 .* 61.08 .* 73.51", printed)
    assert statements["eurosat"] in printed.replace("\n", " ")

    with pytest.raises(ConfigError, match="name: svhn was run under this name with other settings"):
        vtab_suite(config(data, tmp_path, tracking, seed=1))


def test_a_task_without_data_or_with_a_list_of_absent_examples_is_one_line_and_the_others_go_on(
    data, tmp_path, tracking, caplog
):
    index = draw_index(open_task(find_task("svhn"), data), 5, 20, 4)
    lists = tmp_path / "lists"
    write_index(index, lists / "svhn.json")
    found = json.loads((lists / "svhn.json").read_text())
    found["train"][3] = "train/99999"
    (lists / "svhn.json").write_text(json.dumps(found))
    wanted = config(data, tmp_path, tracking, tasks=("dtd", "svhn", "eurosat"), index=str(lists), protocol="val")
    report = vtab_suite(wanted)
    assert [score.task for score in report.scores] == ["eurosat"]
    assert (report.scores[0].num_train, report.scores[0].num_test) == (20, 4)
    assert re.fullmatch(
        r"dtd: .*/dtd/dtd is missing; accepted: dtd-r1.0.1.tar.gz, .*; fetch from https://\S+ into the folder dtd of "
        r"the data folder",
        report.problems["dtd"],
    )
    assert report.problems["svhn"].startswith("svhn: train/99999 is in the index but not in the data; accepted: ids")
    assert "\n" not in report.problems["svhn"]

    files.dtd(data)
    write_index(index, lists / "svhn.json")
    mended = vtab_suite(wanted)
    assert mended.problems == {}
    assert [score.task for score in mended.scores] == ["dtd", "svhn", "eurosat"]
    assert mended.scores[2] == report.scores[0]  # the seconds, too
    assert set(shard_ids(tmp_path / "vtab" / "svhn" / "train800")) == set(index.train)
    assert set(shard_ids(tmp_path / "vtab" / "svhn" / "val200")) == set(index.val)
    # Where nothing can be run, the first task is the error; other examples than the shards have are not taken for them.
    none = config(
        data, tmp_path, tracking, name="none", tasks=("kitti-distance", "svhn", "sun397"), protocol="val", subset_seed=1
    )
    caplog.clear()
    with pytest.raises(DataError, match=r"sun397: .* is missing; accepted: .*"):
        vtab_suite(none)
    others = [record.getMessage() for record in caplog.records if record.name == "bit_ray.studies.vtab"]
    assert re.match(
        r"svhn: .*/vtab/svhn/index.json has other examples than asked for .*; accepted: the same index", others[0]
    )
    assert others[1].startswith("kitti-distance: ")


def test_a_setting_that_cannot_work_is_named_as_the_user_typed_it_once_for_the_first_task(
    data, tmp_path, tracking, monkeypatch, capfd, caplog
):
    monkeypatch.chdir(tmp_path)
    flags = ["--name", "x", "--model", NAME, "--tasks", "svhn", "eurosat", "--data-dir", str(data), "--num-train", "20"]
    flags += ["--num-val", "4", "--tracking.uri", tracking.uri, "--tracking.experiment", tracking.experiment]
    flags += ["--rule.mixup-alpha", "0.1", "--rule.num-steps", "12", "--rule.batch-size", "16"]
    assert main(["vtab", *flags, "--runtime.micro-batch-size", "3"]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error == (
        "error: svhn: --runtime.micro-batch-size: 3; accepted: an even number, because MixUp mixes pairs of "
        "neighbours; add one"
    )
    assert [
        record.getMessage().partition(";")[0] for record in caplog.records if record.name == "bit_ray.studies.vtab"
    ] == ["eurosat: micro_batch_size: 3"]
    assert main(["vtab", *flags, "--rule.warmup-steps", "12", "--dry-run"]) == 2
    assert capfd.readouterr().err.startswith("error: --rule.warmup-steps: 12; accepted: 0 to 11 in a run of 12 steps; ")


def test_shards_written_before_are_used_and_those_of_other_classes_refused(data, tmp_path, tracking):
    shards = tmp_path / "shards"
    # eurosat has ten classes, as svhn, but others.
    for place, source in (
        ("eurosat/train800", "vtab:eurosat:val"),
        ("eurosat/val200", "vtab:eurosat:test"),
        ("svhn/train800", "vtab:svhn:val"),
        ("svhn/val200", "vtab:eurosat:test"),
    ):
        write_shards(source, shards / place, name=source, data_dir=data, convert_images=True)
    wanted = config("/nowhere", tmp_path, tracking, tasks=("svhn", "eurosat"), protocol="val", shards=str(shards))
    report = vtab_suite(wanted)
    assert [(score.task, score.num_train, score.num_test) for score in report.scores] == [("eurosat", 20, 20)]
    assert report.scores[0].statement.startswith(f"eurosat: as in the shards {shards}/eurosat")
    assert re.match(
        r"svhn: .*/svhn/val200: 10 classes; accepted: the 10 of the task, named as", report.problems["svhn"]
    )
