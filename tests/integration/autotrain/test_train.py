"""``bit-ray train``: from a folder of images to a registered model that predicts, in one command."""

import contextlib
import functools
import io
import json
import shutil

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

import bit_ray
from bit_ray import store
from bit_ray.autotrain import choice, finetune
from bit_ray.autotrain import train as way
from bit_ray.autotrain.starts import invert
from bit_ray.cli.main import main
from bit_ray.config import to_dict
from bit_ray.errors import ConfigError
from bit_ray.evaluation.config import EvaluateConfig
from bit_ray.evaluation.linear_head import LinearHead
from bit_ray.inference.classifier import load_model
from bit_ray.models.zoo import create_model
from bit_ray.run_folder import RunFolder
from bit_ray.run_records import RunRecord
from bit_ray.training.config import Runtime

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

MODEL = "R1-1-1-1x0.5"


@pytest.fixture(scope="module")
def by_command(photos, start, tmp_path_factory):
    """Storage of a run that had no time for more than a linear head, and what the command has printed of it."""
    storage = tmp_path_factory.mktemp("runs")
    command = ["train", str(photos), "--name", "digits", "--init", start, "--storage", str(storage)]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main([*command, "--minutes", "0.01"]) == 0
    return storage, printed.getvalue()


@pytest.fixture(scope="module")
def trained(by_command, photos, start):
    """Storage and result of the same run."""
    storage, _ = by_command
    return storage, bit_ray.train(photos, **settings(start, storage))


def settings(start, storage):
    return {"name": "digits", "init": start, "minutes": 0.01, "storage": str(storage)}


def test_a_folder_becomes_a_registered_model_that_takes_the_images_as_they_are(trained, photos):
    storage, result = trained
    assert result.metrics["num_examples"] == 18
    assert result.metrics["top_1"] > 0.7  # chance is a third
    assert any("left out of train: n° 0/cut.png" in choice for choice in result.choices) or any(
        "n° 0/cut.png" in choice for choice in result.choices
    )
    assert any(choice.startswith("chosen: linear head") for choice in result.choices)
    assert any(choice.startswith("calibration: logits divided by") for choice in result.choices)
    model = load_model("models:/digits@champion", tracking_uri=f"sqlite:///{storage}/mlflow.db")
    assert model.spec.class_names == ("n° 0", "n° 1", "n° 2")
    paths = sorted(photos.glob("*/[0-9]*.png"))
    found = [prediction[0][0] for prediction in model.predict(paths)]
    assert np.mean([name == path.parent.name for name, path in zip(found, paths, strict=True)]) > 0.7
    # An image that is stored sideways gets the prediction of the same image stored upright.
    sideways = photos / "n° 1/2.png"
    file = io.BytesIO()
    Image.open(sideways).transpose(Image.Transpose.ROTATE_270).save(file, "PNG", exif=b"")
    [first], [second] = model.predict(sideways), model.predict(file.getvalue())
    assert first == second


def test_the_run_is_recorded_with_its_choices_and_pictures(trained):
    storage, result = trained
    client = MlflowClient(tracking_uri=f"sqlite:///{storage}/mlflow.db")
    run = client.get_run(result.run_id)
    assert run.data.metrics["test/top_1"] == result.metrics["top_1"]
    assert {"val/top_1_linear_head", "val/ece_before", "val/ece"} <= run.data.metrics.keys()
    found = {each.tags[0].value: each.dataset.name for each in run.inputs.dataset_inputs}
    assert found == {"training": "digits train", "test": "digits test"}
    names = {file.path for file in client.list_artifacts(result.run_id, "evaluation")}
    assert {"evaluation/confusion.png", "evaluation/reliability.png"} <= names
    card = client.get_model_version("digits", "1").description
    assert "start: " in card
    assert "calibration: " in card


def test_a_page_about_the_model_is_beside_it_and_in_its_run(trained, tmp_path, monkeypatch, capsys):
    storage, result = trained
    page = (storage / "digits" / "report.html").read_text()
    assert result.report == str(storage / "digits" / "report.html")
    assert "n° 2" in page
    assert f"{result.metrics['top_1']:.1%} of 18 images of digits test" in page
    assert "before calibration" in page
    assert "Not here" not in page
    client = MlflowClient(tracking_uri=f"sqlite:///{storage}/mlflow.db")
    assert "report.html" in {file.path for file in client.list_artifacts(result.run_id)}
    # By its name, from anywhere, it is written again, from what was recorded.
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "models:/digits@champion", f"{storage}/digits"):
        assert main(["report", name, "--storage", str(storage), "--output", "again.html"]) == 0
        assert (tmp_path / "again.html").read_text() == page
    assert "scoring 18 images of digits test" in capsys.readouterr().out


def test_a_page_without_records_says_what_is_missing(trained, photos, tmp_path, monkeypatch, capsys):
    storage, _ = trained
    monkeypatch.chdir(tmp_path)
    package = tmp_path / "copied"
    shutil.copytree(storage / "digits" / "model", package)
    assert main(["report", str(package)]) == 0
    page = (tmp_path / "digits.html").read_text()
    assert "It is not in the registry" in page or "records cannot be read" in page
    assert "No test set is recorded, so there are no scores and no pictures; give some with --images FOLDER." in page
    assert "How it was made" in page
    # Any folder of its classes will do, and of many images some are drawn.
    arguments = ["report", str(package), "--images", str(photos), "--num-images", "40", "--output", "scored.html"]
    assert main(arguments) == 0, capsys.readouterr().err
    scored = (tmp_path / "scored.html").read_text()
    assert f"of 40 images drawn from the 90 of {photos.name}" in scored
    assert scored.count("<img ") >= 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["absent"],
            "absent: no such directory; accepted: a saved model, models:/NAME@ALIAS, or a name that bit-ray models "
            "known lists; check the path",
        ),
        (["models:/absent@champion", "--storage", "{storage}"], "no model of that name; accepted: digits"),
        (["{storage}/digits", "--output", "page.pdf"], "--output: page.pdf; accepted: a file ending in .html"),
        (["{storage}/digits", "--output", "absent/page.html"], "--output: absent/page.html: its folder does not exist"),
        (["{storage}/digits", "--images", "absent"], "absent: neither a path nor a set by name; accepted: "),
        (["{storage}/digits", "--images", "{photos}/n° 1"], "images lie directly in it, such as '"),
        (["{storage}/digits", "--num-images", "0"], "--num-images: 0; accepted: 1 or more; raise it"),
    ],
)
def test_a_page_that_cannot_be_made_is_one_line(trained, photos, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    status = main(["report", *(argument.format(photos=photos, storage=trained[0]) for argument in arguments)])
    printed = capsys.readouterr()
    assert status == 2
    assert message in printed.err
    assert len(printed.err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_score_is_what_evaluate_says_of_the_same_images(trained, ray_local):
    storage, result = trained
    again = bit_ray.evaluate(
        EvaluateConfig(model="models:/digits@champion", shards=f"{storage}/digits/data/test", storage=str(storage))
    )
    assert again.metrics == pytest.approx(result.metrics, rel=1e-5)


def test_started_again_it_is_finished_and_other_settings_are_refused(trained, photos, start):
    storage, result = trained
    same = settings(start, storage)
    assert bit_ray.train(photos, **same) == result
    with pytest.raises(ConfigError, match="digits was begun with seed 0, here it is 1; accepted: the images and sett"):
        bit_ray.train(photos, **same, seed=1)
    assert len(MlflowClient(f"sqlite:///{storage}/mlflow.db").search_model_versions("name = 'digits'")) == 1


def test_fine_tuning_and_the_head_are_compared_on_the_validation_images(
    photos, start, tmp_path, ray_local, monkeypatch, capsys
):
    for name, value in {"_LEAST_STEPS": 2, "_MOST_STEPS": 6, "_BATCHES": (32,), "_LEAST_PASSES": 1}.items():
        monkeypatch.setattr(finetune, name, value)
    monkeypatch.setattr(finetune, "Runtime", functools.partial(Runtime, num_workers=1))  # not half of the CPUs by name
    status = main(["train", str(photos), "--init", start, "--storage", str(tmp_path), "--crop-size", "32"])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert "fine-tuning: 6 steps of 32 images" in printed.out
    assert "chosen: " in printed.out
    record = json.loads((tmp_path / photos.name / "result.json").read_text())
    [chosen] = [choice for choice in record["choices"] if choice.startswith("chosen: ")]
    assert "linear head" in chosen
    assert "fine-tuning" in chosen
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("bit_ray").experiment_id
    [below] = client.search_runs([experiment], f'tags.`mlflow.parentRunId` = "{record["run_id"]}"')
    assert below.info.run_name == f"{photos.name} fine-tuning"
    assert f"models:/{photos.name}@champion" in printed.out
    assert "calibration: " in client.get_model_version(photos.name, "1").description


def test_a_fine_tuned_network_is_calibrated_on_the_validation_images_alone_and_only_for_a_sure_gain():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (600, 4)).astype(np.float32)
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(1)  # as its probabilities say
    temperature, before, after, said = choice._calibrated(3 * logits, labels, None)
    assert temperature == pytest.approx(3, rel=0.15)
    assert said == (
        f"calibration: logits divided by {temperature:.3g}; the error of the probabilities (ECE) of 600 validation "
        f"images was {before:.1%} and is {after:.1%}"
    )
    assert before > after + 0.05
    # Twenty images of a network that is calibrated: whatever minimises their cross-entropy is chance.
    temperature, before, after, said = choice._calibrated(logits[:20], labels[:20], None)
    assert (temperature, before) == (1, after)
    assert said.startswith("calibration: none, as its gain is below its standard error; the error of the probabilities")
    head = LinearHead(
        kernel=logits, bias=logits[0], inverse_strength=1, right=labels == 0, held_out=3 * logits, labels=labels
    )
    temperature, _, _, said = choice._calibrated(logits[:20], labels[:20], head)
    assert temperature > 2
    assert "(ECE) of 20 validation images and 600 cross-validated ones was" in said


def test_an_interrupted_run_goes_on_with_what_it_had_chosen(photos, start, tmp_path, monkeypatch):
    """Whatever time is left now, which decided the steps."""
    plans = []

    def interrupted(config, plan, shards, *arguments, **options):
        plans.append(plan)
        folder = RunFolder.of(config.storage, config.name)
        store.write_json(folder.plan, to_dict(RunRecord(digest=plan.digest, shards=shards, plan=to_dict(plan))))
        raise KeyboardInterrupt

    monkeypatch.setattr(way.driver, "train", interrupted)
    for most, minutes in ((6, 10), (3, 10)):
        monkeypatch.setattr(finetune, "_LEAST_STEPS", 2)
        monkeypatch.setattr(finetune, "_MOST_STEPS", most)
        monkeypatch.setattr(finetune, "_LEAST_PASSES", 1)
        with pytest.raises(KeyboardInterrupt):
            bit_ray.train(photos, name="digits", init=start, storage=str(tmp_path), minutes=minutes)
    first, second = plans
    assert first.schedule.num_steps == 6
    assert second == first


def test_without_the_time_for_fine_tuning_it_says_what_it_would_take(by_command):
    _, printed = by_command
    assert "no fine-tuning: " in printed
    assert "are needed for the shortest on this machine" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "absent: no such folder; accepted: "),
        (["{photos}/n° 0"], "31 images lie directly in it"),
        (
            ["{photos}", "--init", "absent"],
            "absent: no such directory; accepted: a saved model, models:/NAME@ALIAS, or a name that bit-ray models "
            "known lists; check the path",
        ),
        (["{photos}", "--minutes", "0"], "--minutes: 0.0; accepted: more than 0 and less than 10,000"),
        (["{photos}", "--crop-size", "8"], "--crop-size: 8; accepted: 0, or 32 to 1024 pixels"),
        (["{photos}", "--val-share", "0.9"], "--val-share: 0.9; accepted: more than 0 and less than 0.5"),
        (["{photos}", "--method", "svm"], "--method: "),
        (["{photos}", "--name", "a/b"], "--name: given 'a/b'; accepted: text that can name a folder"),
        (["{photos}", "--register.alias", "v1"], "--register.alias: 'v1'; accepted: "),
    ],
)
def test_bad_input_is_one_line(photos, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    status = main(["train", *(argument.format(photos=photos) for argument in arguments)])
    printed = capsys.readouterr()
    assert status == 2
    assert message in printed.err
    assert len(printed.err.strip().splitlines()) == 1
    assert not (tmp_path / "bit_ray_runs" / photos.name / "model").exists()


def test_a_dry_run_writes_nothing(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(photos), "--dry-run"]) == 0
    assert "30 stored sideways: turned upright" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_an_inverted_network_sees_the_negative():
    torch.manual_seed(0)
    network = create_model(MODEL, 3).eval()
    images = torch.rand(2, 3, 40, 40) * 2 - 1
    assert torch.equal(invert(network).forward_features(images), network.forward_features(-images))
