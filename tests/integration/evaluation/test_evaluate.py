import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from bit_ray.cluster.session import cluster
from bit_ray.cluster.slots import Resources
from bit_ray.data.images.decode import decode_image
from bit_ray.data.images.resize import eval_view
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.shards.read import read_rows, read_tables, to_examples
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.base import Example
from bit_ray.data.sources.embedded.glyphs import GlyphSource
from bit_ray.errors import ConfigError, DataError
from bit_ray.evaluation.config import EvaluateConfig
from bit_ray.evaluation.evaluate import evaluate, evaluate_model
from bit_ray.inference.classifier import load_model
from bit_ray.models.zoo import create_model
from bit_ray.tracking.config import TrackingConfig
from bit_ray.weights.npz import save_npz
from bit_ray.weights.package import ModelSpec, save_package

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_local")]
NAME = "R1-1-1-1x0.5"


def save(directory, manifest):
    """A network with a random head, so that its predictions differ from image to image."""
    torch.manual_seed(0)
    model = create_model(NAME, manifest.num_classes)
    torch.nn.init.normal_(model.head.weight)
    spec = ModelSpec(
        model=NAME,
        num_classes=manifest.num_classes,
        class_names=manifest.class_names,
        multi_label=manifest.multi_label,
        resize_mode="shorter_side",
        resize_size=36,
        crop_size=32,
    )
    save_package(directory, model, spec)
    return directory


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory):
    """150 glyphs in shards and row groups that no batch size divides, and a model for them."""
    folder = tmp_path_factory.mktemp("evaluate")
    source = GlyphSource("s", examples_per_class=3)
    write_shards(source, folder / "shards", name="glyphs", row_group_size=11, shard_examples=44)
    manifest = read_manifest(folder / "shards")
    assert len(manifest.shards) == 4
    return folder / "shards", save(folder / "model", manifest)


def one_by_one(classifier, shards):
    """Logits and labels of every image, decoded, resized and classified alone."""
    manifest = read_manifest(shards)
    logits, labels = [], []
    for shard in range(len(manifest.shards)):
        for group in range(manifest.row_groups(shard)):
            for example in to_examples(read_rows(shards, manifest, shard, [group])):
                image = decode_image(example.image)
                pixels = eval_view(image, resize_mode="shorter_side", resize_size=36, crop_size=32)
                logits.append(classifier.logits(pixels[None])[0])
                labels.append(example.labels)
    return torch.stack(logits).double(), labels


def test_the_cluster_counts_what_a_plain_loop_counts(glyphs, tmp_path):
    shards, package = glyphs
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    config = EvaluateConfig(
        model=str(package), shards=str(shards), name="check", batch_size=4, storage=str(tmp_path), tracking=tracking
    )
    evaluation = evaluate(config)

    classifier = load_model(package)
    logits, labels = one_by_one(classifier, shards)
    truth = torch.tensor([names[0] for names in labels])
    ranked = logits.argsort(1, descending=True)
    confusion = np.zeros((50, 50), np.int64)
    for true, predicted in zip(truth, ranked[:, 0], strict=True):
        confusion[true, predicted] += 1
    assert np.count_nonzero(confusion.sum(0)) > 5
    np.testing.assert_array_equal(evaluation.confusion, confusion)
    assert evaluation.confusion.sum() == 150
    assert evaluation.metrics.pop("cross_entropy") == pytest.approx(
        -logits.log_softmax(1)[torch.arange(150), truth].mean().item(), rel=1e-5
    )
    confidence, predicted = logits.softmax(1).max(1)
    from torchmetrics.classification import MulticlassCalibrationError  # seconds of collection in each process

    reference = MulticlassCalibrationError(50, n_bins=15)(logits.softmax(1), truth).item()
    assert evaluation.metrics.pop("ece") == pytest.approx(reference, abs=1e-5)
    assert evaluation.metrics == pytest.approx(
        {
            "top_1": (ranked[:, 0] == truth).double().mean().item(),
            "top_5": (ranked[:, :5] == truth[:, None]).any(1).double().mean().item(),
            "mean_per_class": np.mean(confusion.diagonal() / confusion.sum(1)),
            "num_examples": 150.0,
        },
        rel=1e-12,
    )

    wrong = [i for i in confidence.argsort(descending=True).tolist() if predicted[i] != truth[i]]
    assert [item.confidence for item in evaluation.worst] == pytest.approx(confidence[wrong[:24]].tolist(), rel=1e-5)
    ids = [name for table in read_tables(shards, read_manifest(shards), ("id",)) for name in table["id"].to_pylist()]
    for item in evaluation.worst:  # by id: rounding may exchange neighbours
        i = ids.index(item.id)
        assert (item.predicted, item.labels) == (predicted[i], (truth[i],))
        assert item.confidence == pytest.approx(confidence[i].item(), rel=1e-5)
    assert evaluation.worst[0].pixels.shape == (32, 32, 3)

    client = MlflowClient(tracking_uri=tracking.uri)
    [run] = client.search_runs([client.get_experiment_by_name("bit_ray").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_id == evaluation.run_id
    for name, (low, high) in evaluation.intervals.items():
        assert run.data.metrics[f"test/{name}_low"] == low <= run.data.metrics[f"test/{name}"] <= high
        assert run.data.metrics[f"test/{name}_high"] == high
    artifacts = {file.path for file in client.list_artifacts(run.info.run_id, "evaluation")}
    assert artifacts == {f"evaluation/{name}" for name in (
        "confusion.png", "confusion.tsv", "reliability.png", "worst.png", "worst.tsv"
    )}  # fmt: skip
    assert run.data.metrics["test/top_1"] == evaluation.metrics["top_1"]
    assert run.data.tags["bit_ray.weights_sha256"] == classifier.sha256
    assert len(classifier.sha256) == 64
    table = (run.info.artifact_uri.removeprefix("file://") + "/evaluation/confusion.tsv").replace("%20", " ")
    rows = np.loadtxt(table, dtype=str, delimiter="\t", skiprows=1, comments=None, encoding="utf-8")
    np.testing.assert_array_equal(rows[:, 1:].astype(int), confusion)


def test_weights_of_another_program_are_evaluated_on_a_set_of_their_classes(glyphs, tmp_path):
    shards, package = glyphs
    saved = load_model(package)
    weights = tmp_path / "weights.npz"
    save_npz(saved.model, weights)
    settings = {"shards": str(shards), "storage": str(tmp_path), "crop_size": 32}
    found = evaluate(EvaluateConfig(model=str(weights), labels="shards", **settings))
    expected = load_model(weights, labels=saved.spec.class_names, crop_size=32)
    with cluster() as resources:
        assert found.metrics == evaluate_model(expected, str(shards), read_manifest(shards), resources).metrics
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"class {i}" for i in range(saved.spec.num_classes)))
    with pytest.raises(ConfigError, match=r"not those of the model's head .* in this order, set labels to shards$"):
        evaluate(EvaluateConfig(model=str(weights), labels=str(names), **settings))
    with pytest.raises(ConfigError, match=r"^labels: 50 names, but .* is a saved model, which has its own"):
        evaluate(EvaluateConfig(model=str(package), labels="shards", shards=str(shards), storage=str(tmp_path)))


@pytest.fixture(scope="module")
def expected(glyphs):
    """The result of two parts and batches of 7."""
    shards, package = glyphs
    return evaluate_model(
        load_model(package), str(shards), read_manifest(shards), Resources(1, 6, 0, False), batch_size=7
    )


@pytest.mark.parametrize(("num_parts", "batch_size"), [(3, 1), (1, 11), (1, 64)])
def test_neither_batches_nor_parts_change_the_result(glyphs, expected, num_parts, batch_size, monkeypatch):
    shards, package = glyphs
    classifier, manifest = load_model(package), read_manifest(shards)
    monkeypatch.setattr(Resources, "slots_for", lambda self, num_items: num_parts)
    found = evaluate_model(classifier, str(shards), manifest, Resources(1, 6, 0, False), batch_size=batch_size)
    np.testing.assert_array_equal(found.confusion, expected.confusion)
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-6)
    assert [item.id for item in found.worst] == [item.id for item in expected.worst]
    for name, interval in expected.intervals.items():
        assert found.intervals[name] == pytest.approx(interval, rel=1e-6)


def test_several_labels_per_image_are_evaluated(tmp_path):
    source = GlyphSource("s", examples_per_class=1)
    examples = [
        Example(example.id, example.image, tuple(range(i % 4)))
        for i, example in enumerate(source.part(np.arange(len(source))))
    ]
    write_shards(
        iter(examples), tmp_path / "shards", name="several", class_names=list("abcdef"), multi_label=True,
        row_group_size=16,
    )  # fmt: skip
    manifest = read_manifest(tmp_path / "shards")
    classifier = load_model(save(tmp_path / "model", manifest))
    with cluster() as resources:
        evaluation = evaluate_model(classifier, str(tmp_path / "shards"), manifest, resources)
    logits, labels = one_by_one(classifier, tmp_path / "shards")
    targets = torch.tensor([[float(c in names) for c in range(6)] for names in labels])
    best = logits.argmax(1)
    losses = -(
        targets * torch.nn.functional.logsigmoid(logits) + (1 - targets) * torch.nn.functional.logsigmoid(-logits)
    )
    assert evaluation.confusion is None
    assert evaluation.metrics["num_examples"] == 50
    assert evaluation.metrics["top_1"] == sum(int(b) in names for b, names in zip(best, labels, strict=True)) / 50
    assert evaluation.metrics["cross_entropy"] == pytest.approx(losses.sum(1).mean().item(), rel=1e-5)


def test_a_set_with_other_classes_is_refused_before_anything_is_recorded(glyphs, tmp_path):
    _, package = glyphs
    write_shards("digits:test", tmp_path / "digits", name="digits")
    config = EvaluateConfig(model=str(package), shards=str(tmp_path / "digits"), storage=str(tmp_path / "runs"))
    with pytest.raises(ConfigError) as caught:
        evaluate(config)
    assert str(caught.value).startswith(
        f"shards: {tmp_path / 'digits'} has 10 classes that are not those of the model's head (50); "
    )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_a_damaged_shard_is_one_line_and_a_failed_run(tmp_path):
    write_shards(GlyphSource("s", examples_per_class=2), tmp_path / "shards", name="glyphs", shard_examples=64)
    package = save(tmp_path / "model", read_manifest(tmp_path / "shards"))
    shard = tmp_path / "shards" / "shard-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-100])
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    config = EvaluateConfig(
        model=str(package), shards=str(tmp_path / "shards"), storage=str(tmp_path), tracking=tracking
    )
    with pytest.raises(DataError, match=f"^{shard}: .* bytes; accepted: ") as caught:
        evaluate(config)
    assert "\n" not in str(caught.value)
    client = MlflowClient(tracking_uri=tracking.uri)
    [run] = client.search_runs([client.get_experiment_by_name("bit_ray").experiment_id])
    assert run.info.status == "FAILED"
