import contextlib
import functools
import io
import json
import re
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from sklearn.metrics import accuracy_score

from bit_ray.cli.main import main
from bit_ray.config_files import write_config
from bit_ray.data.images.decode import decode_image
from bit_ray.data.images.resize import eval_view
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.shards.read import read_tables, to_examples
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.embedded.digits import DigitsSource
from bit_ray.errors import ConfigError, DataError
from bit_ray.evaluation.subsets import few_shot_subset
from bit_ray.models.zoo import create_model
from bit_ray.recipes.hyperrule import RuleOverrides, hyperrule
from bit_ray.studies.config import FewShotConfig
from bit_ray.studies.few_shot import FROM_SCRATCH, PRE_TRAINED, fewshot_suite
from bit_ray.tracking.config import TrackingConfig
from bit_ray.training.in_memory import Examples, fit
from bit_ray.training.plan import transfer_plan
from bit_ray.weights.package import ModelSpec, save_package

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600), pytest.mark.usefixtures("ray_local")]
MODEL = "R1-1-1-1x0.5"
RULE = RuleOverrides(resize=36, crop=32, num_steps=6, warmup_steps=0, boundaries=(), batch_size=16, base_lr=0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """400 training digits, 100 test digits in row groups that no batch divides, and a network to start from."""
    folder = tmp_path_factory.mktemp("suite")
    train, test = DigitsSource("train"), DigitsSource("test")
    write_shards(
        iter(train.part(np.arange(400))),
        folder / "train",
        name="train",
        class_names=train.class_names,
        row_group_size=64,
    )
    write_shards(
        iter(test.part(np.arange(100))), folder / "test", name="test", class_names=test.class_names, row_group_size=33
    )
    torch.manual_seed(0)
    spec = ModelSpec(
        model=MODEL, num_classes=3, class_names=("a", "b", "c"), multi_label=False, resize_mode="square",
        resize_size=32, crop_size=32,
    )  # fmt: skip
    save_package(folder / "model", create_model(MODEL, 3), spec)
    return folder


def suite(folder, storage, **changes):
    settings = {
        "name": "suite",
        "init": str(folder / "model"),
        "shards": str(folder / "train"),
        "test_shards": str(folder / "test"),
        "shots": (1, 2),
        "num_subsets": 2,
        "rule": RULE,
        "random_flip": False,
        "storage": str(storage),
    }
    return FewShotConfig(**settings | changes)


@functools.cache
def examples(folder, name):
    found = [e for t in read_tables(folder / name, read_manifest(folder / name)) for e in to_examples(t)]
    images = [decode_image(e.image) for e in found]
    return Examples(tuple(e.id for e in found), images, np.array([e.labels[0] for e in found]))


@pytest.fixture(scope="module")
def by_command(folder, tmp_path_factory, mlflow_store, ray_local):
    """A study that the command ran, and what it printed."""
    storage = tmp_path_factory.mktemp("runs")
    tracking = TrackingConfig(uri=mlflow_store, experiment="few-shot")
    config = suite(folder, storage, scratch_lrs=(0.01, 0.03), tracking=tracking)
    write_config(config, storage / "config.json")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["fewshot", "--config", str(storage / "config.json")]) == 0
    return config, printed.getvalue()


@pytest.fixture(scope="module")
def done(by_command):
    """The same study and its report."""
    config, _ = by_command
    return config, fewshot_suite(config)


def trained_here(folder, k, seed, train="all"):
    """Top-1 after the same training in this process, judged by scikit-learn."""
    learnt, test = examples(folder, "train"), examples(folder, "test")
    torch.manual_seed(0)
    weights = create_model(MODEL, 3).state_dict()
    torch.set_num_threads(1)
    chosen = few_shot_subset(learnt.labels, k, seed)
    rule = hyperrule(
        10 * k, (32, 32), random_flip=False, resize=36, crop=32, num_steps=6, warmup_steps=0, boundaries=(),
        batch_size=16, base_lr=0.01,
    )  # fmt: skip
    plan = transfer_plan(
        rule, model=MODEL, num_classes=10, manifest_digest=read_manifest(folder / "train").digest, init="any",
        init_digest="any", seed=seed, train=train,
    )  # fmt: skip
    model = fit(plan, learnt.subset(chosen), weights)
    views = [eval_view(i, resize_mode="square", resize_size=0, crop_size=32) for i in test.images]
    with torch.inference_mode():
        x = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2) / 127.5 - 1
        predicted = model(x).argmax(1).numpy()
    return accuracy_score(test.labels, predicted)


# An image whose two best classes are as good as equal may fall either way in another batch.
ONE_IMAGE = 0.011


def test_every_score_is_that_of_a_training_in_this_process(folder, done):
    _, report = done
    for k in (1, 2):
        row = next(row for row in report.rows if (row.series, row.k) == (PRE_TRAINED, k))
        for seed in range(2):
            assert row.values[seed] == pytest.approx(trained_here(folder, k, seed), abs=ONE_IMAGE)


def test_given_index_files_are_used_and_a_part_of_the_network_is_trained_but_all_of_it_from_scratch(folder, done):
    config, report = done
    given = replace(
        config, name="given", subsets=f"{config.storage}/suite/subsets", shots=(2,), train="head", scratch_lrs=(0.03,)
    )
    head, scratch = fewshot_suite(given).rows
    for seed in range(2):
        assert head.values[seed] == pytest.approx(trained_here(folder, 2, seed, "head"), abs=ONE_IMAGE)
    assert head.values != next(row.values for row in report.rows if (row.series, row.k) == (PRE_TRAINED, 2))
    # The same trainings from scratch were part of the study that trains all of the network, on the same images.
    files = [f"{config.storage}/suite/scores/from-scratch-2-per-class-seed-{seed}-lr-0.03.json" for seed in range(2)]
    assert scratch.values == tuple(json.loads(Path(file).read_text())["top_1"] for file in files)
    assert not Path(config.storage, "given", "subsets").exists()
    with pytest.raises(DataError, match=r"^subsets: .*/5-per-class-seed-0.json is missing; "):
        fewshot_suite(replace(given, shots=(5,)))


def test_the_study_leaves_index_files_a_table_and_a_picture(done):
    config, report = done
    assert len(report.rows) == 4
    for row in report.rows:
        assert len(row.values) == 2
        assert report.median(row.series, row.k) == statistics.median(row.values)
    assert set(report.scratch_lr) == {1, 2}
    client = MlflowClient(tracking_uri=config.tracking.uri)
    runs = client.search_runs([client.get_experiment_by_name(config.tracking.experiment).experiment_id])
    [run] = [run for run in runs if run.data.tags["bit_ray.kind"] == "fewshot" and run.info.run_name == "suite"]
    below = [child for child in runs if child.data.tags.get("mlflow.parentRunId") == run.info.run_id]
    assert len(below) == 2 * 2 * 3
    ours = {c.data.params["seed"]: c.data.metrics for c in below if c.info.run_name.startswith("pre-trained-1-")}
    assert [ours[str(seed)]["top_1"] for seed in range(2)] == list(report.rows[0].values)
    history = {m.step: m.value for m in client.get_metric_history(run.info.run_id, "few_shot/pre_trained")}
    assert history == {k: report.median(PRE_TRAINED, k) for k in (1, 2)}
    artifacts = Path(run.info.artifact_uri.removeprefix("file://"))
    table = json.loads((artifacts / "few_shot.json").read_text())
    assert [tuple(row["values"]) for row in table] == [row.values for row in report.rows]
    assert (artifacts / "few_shot.png").stat().st_size > 10_000


def test_the_same_name_continues_from_its_scores(done):
    config, report = done
    file = Path(config.storage, "suite", "scores", "pre-trained-1-per-class-seed-0-lr-0.01.json")
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, "top_1": 0.123}))
    assert fewshot_suite(config).rows[0].values == (0.123, report.rows[0].values[1])
    # A score of other settings or other examples is none.
    file.write_text(json.dumps({**record, "identity": "another", "top_1": 0.123}))
    assert fewshot_suite(config) == report


def test_the_rate_from_scratch_is_the_best_on_images_that_are_neither_learned_nor_tested(done):
    config, report = done
    [row] = [row for row in report.rows if (row.series, row.k) == (FROM_SCRATCH, 2)]
    files = {
        rate: [
            Path(config.storage, "suite", "scores", f"from-scratch-2-per-class-seed-{seed}-lr-{rate}.json")
            for seed in (0, 1)
        ]
        for rate in config.scratch_lrs
    }
    kept = {rate: [file.read_text() for file in found] for rate, found in files.items()}
    best = report.scratch_lr[2]
    [other] = set(config.scratch_lrs) - {best}
    for file in files[best]:  # perfect on the test set, which must not matter
        file.write_text(json.dumps({**json.loads(file.read_text()), "validation_top_1": 0.2, "top_1": 1.0}))
    for file in files[other]:
        file.write_text(json.dumps({**json.loads(file.read_text()), "validation_top_1": 0.3, "top_1": 0.0}))
    again = fewshot_suite(config)
    assert again.scratch_lr[2] == other
    assert next(row.values for row in again.rows if (row.series, row.k) == (FROM_SCRATCH, 2)) == (0.0, 0.0)
    for rate, texts in kept.items():
        for file, text in zip(files[rate], texts, strict=True):
            file.write_text(text)
    assert fewshot_suite(config) == report
    assert len(row.values) == 2


def test_a_rate_cannot_be_chosen_where_the_draw_leaves_nothing(folder, tmp_path):
    data = DigitsSource("test")
    few = list(data.part(np.arange(100)))
    first = [next(example for example in few if example.labels[0] == label) for label in range(10)]
    write_shards(iter(first), tmp_path / "ten", name="ten", class_names=data.class_names)
    config = suite(folder, tmp_path / "runs", shards=str(tmp_path / "ten"), shots=(1,), scratch_lrs=(0.01, 0.03))
    with pytest.raises(
        ConfigError, match=r"^scratch_lrs: 2 rates, but 10 examples are all of .*; accepted: fewer shots"
    ):
        fewshot_suite(config)


def test_the_command_line_prints_medians_and_spread(by_command, done):
    config, shown = by_command
    _, report = done
    for row in report.rows:
        assert re.search(rf"{row.k} .*{row.series} .*{report.median(row.series, row.k):.2%}", shown), shown
    assert f"Index files: {config.storage}/suite/subsets" in shown


def test_a_class_with_too_few_examples_is_one_line_before_any_run_is_opened(folder, tmp_path, capfd):
    write_config(suite(folder, tmp_path / "runs", shots=(500,)), tmp_path / "config.json")
    assert main(["fewshot", "--config", str(tmp_path / "config.json")]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: --shots: 500; accepted: at most 48, the number of examples of class 0 ")
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()
