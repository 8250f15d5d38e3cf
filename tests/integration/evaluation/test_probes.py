import re
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from mlflow import MlflowClient
from sklearn.linear_model import Ridge
from sklearn.model_selection import LeaveOneOut, cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from torchvision.transforms.v2 import functional

from bit_ray.cli.main import main
from bit_ray.cluster.slots import Resources
from bit_ray.data.images.decode import decode_image
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.shards.read import read_tables, to_examples
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.base import Example
from bit_ray.data.sources.embedded.digits import DigitsSource
from bit_ray.data.sources.embedded.glyphs import GlyphSource
from bit_ray.data.stream.batches import StreamSpec, batches
from bit_ray.errors import ConfigError, DataError
from bit_ray.evaluation.config import ProbeConfig
from bit_ray.evaluation.frozen import logme, ridge_predict
from bit_ray.evaluation.rank import choose_examples, score_features
from bit_ray.evaluation.subsets import few_shot_subset
from bit_ray.inference.classifier import load_model
from bit_ray.inference.features import CentreCrop, FeatureSet, cluster_features, image_features, read_features
from bit_ray.models.zoo import create_model
from bit_ray.recipes.upstream import UpstreamRecipe
from bit_ray.training.checkpoint.probes import CheckpointProbes
from bit_ray.training.config import PretrainConfig, Runtime
from bit_ray.training.device import worker_threads
from bit_ray.training.learner import Learner
from bit_ray.training.pretrain import pretrain
from bit_ray.training.run import recorded_plan
from bit_ray.weights.package import ModelSpec, save_package

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600), pytest.mark.usefixtures("ray_local")]
MODEL = "R1-1-1-1x0.5"


def save(directory, class_names, seed=0, **changes):
    """A network with random kernels, whose features tell digits apart better than chance."""
    torch.manual_seed(seed)
    settings = {
        "model": MODEL,
        "num_classes": len(class_names),
        "class_names": tuple(class_names),
        "multi_label": False,
        "resize_mode": "shorter_side",
        "resize_size": 36,
        "crop_size": 32,
    }
    save_package(directory, create_model(MODEL, len(class_names)), ModelSpec(**settings | changes))
    return str(directory)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """All training digits in shards and row groups that no batch divides, and 200 test digits."""
    folder = tmp_path_factory.mktemp("digits")
    write_shards("digits:train", folder / "train", name="train", row_group_size=23, shard_examples=230)
    test = DigitsSource("test")
    write_shards(
        iter(test.part(np.arange(200))), folder / "test", name="test", class_names=test.class_names, row_group_size=64
    )
    return str(folder / "train"), str(folder / "test"), save(folder / "model", "abc")


def whole(shards):
    """Images and labels of a set, in its order."""
    examples = [e for table in read_tables(shards, read_manifest(shards)) for e in to_examples(table)]
    return [decode_image(e.image) for e in examples], np.array([e.labels[0] for e in examples])


@pytest.mark.parametrize(("num_slots", "batch_size"), [(1, 7), (3, 64)])
def test_the_cluster_finds_the_features_of_every_image_in_order(digits, num_slots, batch_size, monkeypatch):
    shards, _, package = digits
    classifier, manifest = load_model(package), read_manifest(shards)
    images, labels = whole(shards)
    monkeypatch.setattr(Resources, "slots_for", lambda self, num_parts: num_slots)
    found = cluster_features(classifier, shards, manifest, Resources(1, 6, 0, True), batch_size=batch_size)
    np.testing.assert_array_equal(found.labels, labels)
    views = np.stack([classifier.view(image) for image in images])
    with torch.inference_mode():
        x = torch.from_numpy(views).permute(0, 3, 1, 2) / 127.5 - 1
        expected = torch.cat([classifier.model.forward_features(part) for part in x.split(100)]).numpy()
    np.testing.assert_allclose(found.features, expected, rtol=1e-3, atol=1e-4)
    assert found.features.std(0).max() > 0.01

    rows = np.array([0, 22, 23, 229, 230, 700, 996])
    some = cluster_features(classifier, shards, manifest, Resources(1, 6, 0, True), rows)
    np.testing.assert_array_equal(some.labels, labels[rows])
    np.testing.assert_allclose(some.features, expected[rows], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(image_features(classifier, images[:70]), expected[:70], rtol=1e-3, atol=1e-4)


def test_the_centre_of_a_square_is_torchvisions(digits):
    shards, _, package = digits
    image = np.random.default_rng(0).integers(0, 256, (61, 90, 3), np.uint8)
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    expected = functional.center_crop(functional.resize(tensor, [48, 48], antialias=True), [40, 40])
    classifier = CentreCrop(load_model(package), 48, 40)
    np.testing.assert_array_equal(classifier.view(image), expected.permute(1, 2, 0).numpy())
    # It travels to the cluster as it is.
    manifest, rows = read_manifest(shards), np.arange(30)
    here = read_features(classifier, shards, manifest, rows)
    there = cluster_features(classifier, shards, manifest, Resources(1, 6, 0, True), rows)
    np.testing.assert_allclose(there.features, here.features, rtol=1e-3, atol=1e-4)
    assert not np.allclose(here.features, read_features(load_model(package), shards, manifest, rows).features)


def test_probe_prints_what_ridge_regression_on_the_features_gives(digits, tmp_path, monkeypatch, capsys):
    shards, test_shards, package = digits
    monkeypatch.chdir(tmp_path)
    assert main(["probe", package, shards, test_shards, "--shots", "1", "5"]) == 0
    shown = capsys.readouterr().out
    classifier = load_model(package)
    (train, labels), (test, truth) = whole(shards), whole(test_shards)
    x, z = image_features(classifier, train), image_features(classifier, test)
    for k in (1, 5):
        scores = []
        for seed in range(3):
            chosen = few_shot_subset(labels, k, seed)
            scores.append(np.mean(ridge_predict(x[chosen], labels[chosen], z, 10) == truth))
        assert f"{statistics.median(scores):.2%}" in shown
    assert statistics.median(scores) > 0.3  # chance is 0.1


def test_episodes_are_printed_with_their_interval(digits, tmp_path, monkeypatch, capsys):
    _, test_shards, package = digits
    monkeypatch.chdir(tmp_path)
    assert main(["episodes", package, test_shards, "--queries", "5", "--num-episodes", "50"]) == 0
    shown = capsys.readouterr().out
    assert "5-way 1-shot" in shown
    assert "5-way 5-shot" in shown
    assert shown.count("±") == 2


def test_rank_puts_the_network_that_has_learnt_first_and_names_the_broken_one(tmp_path, monkeypatch, capsys):
    """A folder of images in, and no registry needed for models given by place."""
    monkeypatch.chdir(tmp_path)
    source = DigitsSource("train")
    for example in source.part(np.arange(400)):
        place = tmp_path / "photos" / source.class_names[example.labels[0]] / f"{example.id.replace('/', '-')}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(example.image)
    random = save("random", "abc")
    # A network that sees no more than a spot in the middle of a stroke has little to tell.
    blind = save("blind", "abc", resize_size=400)
    (tmp_path / "broken").mkdir()
    models = [blind, random, "broken"]
    assert main(["models", "rank", "photos", "--models", *models, "--per-class", "20"]) == 0
    shown = capsys.readouterr().out
    assert shown.index("random") < shown.index("blind")
    assert "left out: broken: " in shown
    [written] = (tmp_path / "bit_ray_runs" / "ranked").iterdir()
    assert read_manifest(written).num_examples == 400
    # Again, from the shard set that is there now.
    assert main(["models", "rank", "photos", "--models", random, "--by", "logme"]) == 0


def test_the_scores_of_a_ranking_are_those_of_scikit_learn():
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), [8, 9, 10, 30])
    x = (generator.normal(size=(4, 6))[labels] + generator.normal(size=(57, 6))).astype(np.float32)
    names = ("a", "b", "c", "d")
    places = choose_examples(labels, names, shots=5, per_class=10)
    assert np.bincount(labels[places]).tolist() == [8, 9, 10, 10]
    assert np.all(np.diff(places) > 0)
    found = FeatureSet(x[places], labels[places])
    ridge, knn, evidence = score_features(found, names, shots=5)
    voters = KNeighborsClassifier(7, metric="cosine")  # one fewer than the smallest class has
    assert knn == pytest.approx(cross_val_score(voters, found.features, found.labels, cv=LeaveOneOut()).mean())
    accuracies = []
    for seed in range(3):
        chosen = few_shot_subset(found.labels, 5, seed)
        rest = np.setdiff1d(np.arange(37), chosen)
        mean, std = found.features[chosen].mean(0), found.features[chosen].std(0) + 1e-5
        train, test = ((found.features[part] - mean) / std for part in (chosen, rest))
        model = Ridge(1024, fit_intercept=False).fit(
            np.c_[train, np.full(len(train), 100)], 2 * np.eye(4)[found.labels[chosen]] - 1
        )
        predicted = model.predict(np.c_[test, np.full(len(test), 100)]).argmax(1)
        accuracies.append(np.mean(predicted == found.labels[rest]))
    assert ridge == pytest.approx(np.mean(accuracies))
    assert evidence == logme(found.features, found.labels, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["probe", "MODEL", "TRAIN", "GLYPHS"],
            "TEST_SHARDS: GLYPHS has 50 classes that are not those of the training shards (10); ",
        ),
        (
            ["probe", "MODEL", "SEVERAL", "TEST"],
            "SHARDS: SEVERAL has several labels per image; accepted: one label per ",
        ),
        (
            ["probe", "MODEL", "GLYPHS", "GLYPHS"],
            "--shots: 5; accepted: at most 3, the number of examples of class 0 (",
        ),
        (
            ["probe", "MODEL", "TRAIN", "TEST", "--crop", "224"],
            "--crop: 224 with resize 0; accepted: both 0, or a crop of at most ",
        ),
        (
            ["probe", "MODEL", "TRAIN", "TEST", "--shots", "0"],
            "--shots: (0,); accepted: different whole numbers of at least 1; ",
        ),
        (["episodes", "MODEL", "TEST", "--shots", "40"], "--shots: 40 with 15 queries; accepted: together at most "),
        (["models", "rank", "GLYPHS", "--models", "MODEL"], "--shots: 5; accepted: at most 2, because class 0 ("),
        (
            ["models", "rank", "SEVERAL", "--models", "MODEL"],
            "shards: SEVERAL has several labels per image; accepted: ",
        ),
        (
            ["models", "rank", "TRAIN", "--models", "MODEL", "--per-class", "5"],
            "--per-class: 5; accepted: more than shots (5)",
        ),
        (
            ["models", "rank", "TRAIN", "--tracking.uri", "sqlite:///none.db"],
            "--tracking.uri: sqlite:///",
        ),
        (["models", "rank", "NOTHING", "--models", "MODEL"], "NOTHING: neither a path nor a set by name"),
    ],
)
def test_bad_input_is_one_line(digits, tmp_path, monkeypatch, capfd, arguments, message):
    monkeypatch.chdir(tmp_path)
    places = dict(zip(("TRAIN", "TEST", "MODEL"), digits, strict=True))
    if "GLYPHS" in arguments:
        write_shards(GlyphSource("s", examples_per_class=3), "glyphs", name="glyphs")
        places["GLYPHS"] = "glyphs"
    if "SEVERAL" in arguments:
        source = DigitsSource("test")
        examples = [Example(e.id, e.image, (0, 1)) for e in source.part(np.arange(20))]
        write_shards(iter(examples), "several", name="several", class_names=source.class_names, multi_label=True)
        places["SEVERAL"] = "several"
    assert main([places.get(argument, argument) for argument in arguments]) == 2
    error = capfd.readouterr().err
    for name, place in places.items():
        message = re.sub(rf"\b{name}\b", place, message)  # not the TEST of TEST_SHARDS
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def run_config(folder, name, shards, num_steps, probe, **runtime):
    recipe = UpstreamRecipe(
        name="small",
        epochs=num_steps * 64 / 400,
        decay_epochs=(),
        global_batch_size=64,
        base_lr_per_256=0.4,
        warmup_steps=0,
        crop_size=32,
    )
    return PretrainConfig(
        name=name,
        shards=shards,
        model=MODEL,
        storage=str(folder),
        recipe=recipe,
        probe=probe,
        runtime=Runtime(**{"num_workers": 1, "log_every_steps": 1, **runtime}),
    )


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory):
    uri = tmp_path_factory.mktemp("glyphs") / "shards"
    write_shards(GlyphSource("s", examples_per_class=8), uri, name="glyphs", row_group_size=16, shard_examples=128)
    return str(uri)


def test_checkpoints_are_probed_while_training_goes_on(digits, glyphs, tmp_path, caplog):
    """One is saved after every step and two are kept: those that are deleted before their probe do no harm."""
    (shards, test_shards, _), num_steps = digits, 16
    probe = ProbeConfig(shards=shards, test_shards=test_shards, shots=(5,), num_subsets=2)
    config = run_config(
        tmp_path, "probed", glyphs, num_steps, probe, checkpoint_every_steps=1, num_checkpoints_to_keep=2
    )
    result = pretrain(replace(config, keep_best="ridge_5_shot")).result
    assert "failed" not in caplog.text
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    found = {m.step: m.value for m in client.get_metric_history(result.run_id, "probe/ridge_5_shot")}
    assert max(found) == num_steps  # the last one always
    run = client.get_run(result.run_id)
    best = max(sorted(found), key=found.get)
    assert run.data.tags["bit_ray.best_checkpoint"] == str(tmp_path / "probed" / f"step-{best:08d}")
    assert run.data.params["probe.shots"] == "[5]"
    assert run.data.metrics["probe/seconds"] > 0
    # The same scores from the checkpoints that are kept.
    kept = {step for step in found if (tmp_path / "probed" / f"step-{step:08d}").exists()}
    assert {best, num_steps} <= kept
    (train, labels), (test, truth) = whole(shards), whole(test_shards)
    for step in kept:
        classifier = load_model(tmp_path / "probed" / f"step-{step:08d}")
        x, z = image_features(classifier, train), image_features(classifier, test)
        scores = []
        for seed in range(2):
            chosen = few_shot_subset(labels, 5, seed)
            scores.append(np.mean(ridge_predict(x[chosen], labels[chosen], z, 10) == truth))
        assert found[step] == pytest.approx(statistics.median(scores), abs=0.011)  # one image of 200, for the last bits
    # What is learnt is the same without probes: by the same steps in this process.
    plan, _ = recorded_plan(str(tmp_path / "probed"))
    learner = Learner(plan, torch.device("cpu"))
    spec = StreamSpec(
        shards=glyphs,
        manifest_digest=plan.manifest_digest,
        global_batch_size=plan.global_batch_size,
        slots=learner.slots,
        start_step=0,
        stop_step=num_steps,
        seed=plan.seed,
        shuffle=plan.shuffle,
        view=plan.view,
    )
    with worker_threads("cpu"):
        for batch in batches(spec):
            learner.step(batch.step, batch.images, learner.targets(batch.rows))
    saved = load_model(result.package_uri).model.state_dict()
    for name, tensor in learner.model.state_dict().items():
        assert torch.equal(tensor, saved[name]), name


class Recorded:
    """Where a run would record."""

    def __init__(self):
        self.steps = []

    def log_metrics(self, metrics, *, step):
        self.steps.append(step)


def test_a_checkpoint_that_is_gone_is_passed_over_and_a_broken_one_is_a_warning(digits, tmp_path, caplog):
    from bit_ray.evaluation.probe import probe_task

    shards, test_shards, package = digits
    task = probe_task(ProbeConfig(shards=shards, test_shards=test_shards, shots=(1,), num_subsets=1))
    broken = Path(save(tmp_path / "broken", "abc"))
    (broken / "model.safetensors").write_bytes(b"nothing")
    recorded = Recorded()
    probes = CheckpointProbes(task, recorded, "check", Resources(1, 6, 0, True), 1)
    for step, place in enumerate([str(tmp_path / "gone"), str(broken), package], start=1):
        probes.offer(step, place)
        while probes._newest is not None or probes._running is not None:
            time.sleep(0.02)
        time.sleep(0.1)
    probes.finish()
    assert recorded.steps == [3]
    assert probes.num_passed_over == 1
    assert "probe of the checkpoint of step 2 failed: " in caplog.text
    assert [step for step, _ in probes.history] == [3]


def test_probes_that_are_cancelled_end_at_once(digits):
    from bit_ray.evaluation.probe import probe_task

    shards, test_shards, package = digits
    task = probe_task(ProbeConfig(shards=shards, test_shards=test_shards))
    probes = CheckpointProbes(task, Recorded(), "check", Resources(1, 6, 0, True), 1)
    probes.offer(1, package)
    time.sleep(0.3)
    started = time.monotonic()
    probes.cancel()
    assert time.monotonic() - started < 5
    assert not probes.is_alive()


def test_a_probe_gives_way_to_training(digits):
    import os

    from bit_ray.training.checkpoint.probes import _step_back

    @ray.remote(max_calls=1, num_cpus=1)
    def priority():
        _step_back()
        return os.sched_getscheduler(0) == os.SCHED_IDLE or os.nice(0) == 19

    assert ray.get(priority.remote())


def test_probes_that_cannot_be_are_refused_before_the_training(digits, glyphs, tmp_path):
    shards, test_shards, _ = digits
    with pytest.raises(ConfigError, match=r"^probe.test_shards: .* has 50 classes that are not those of .* \(10\); "):
        pretrain(run_config(tmp_path, "no", glyphs, 4, ProbeConfig(shards=shards, test_shards=glyphs)))
    probe = ProbeConfig(shards=shards, test_shards=test_shards, shots=(200,))
    with pytest.raises(
        DataError, match=r"^probe.shots: 200; accepted: at most \d+, the number of examples of class \d"
    ):
        pretrain(run_config(tmp_path, "no", glyphs, 4, probe))
    assert not (tmp_path / "no").exists()
    probe = ProbeConfig(shards=shards, test_shards=test_shards, num_cpus=6)
    with pytest.raises(ConfigError) as caught:
        pretrain(run_config(tmp_path, "no", glyphs, 4, probe))
    assert str(caught.value) == (
        "probe.num_cpus: 6; accepted: at most 5, the CPUs that 1 training workers leave; lower runtime.num_workers, "
        "or leave out probe.shards"
    )
    assert not (tmp_path / "no").exists()
