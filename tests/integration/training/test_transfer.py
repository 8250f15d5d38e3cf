"""Fine-tuning a part of a network on a real cluster; what the parts are is tested without one."""

import json
import re
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from glyph_runs import assert_identical, history
from mlflow import MlflowClient
from servers import kill_ray_processes

import bit_ray
from bit_ray.cluster.slots import Workers
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.embedded.glyphs import GlyphSource
from bit_ray.errors import ConfigError, ModelError
from bit_ray.models.zoo import create_model
from bit_ray.recipes.hyperrule import RuleOverrides, hyperrule
from bit_ray.tracking.address import tracking_uri
from bit_ray.tracking.registry import RegisteredModel, register
from bit_ray.training import dry_run
from bit_ray.training.config import FinetuneConfig, RegisterAs, Runtime
from bit_ray.training.driver import Trained
from bit_ray.training.finetune import finetune
from bit_ray.training.plan import transfer_plan
from bit_ray.weights.package import ModelSpec, load_package, save_package

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600), pytest.mark.usefixtures("ray_local")]
MODEL = "R1-1-1-1x0.5"
NUM_STEPS, FEW = 25, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def digits(folder: Path) -> Path:
    """Training and test shards; two row groups of the latter are evaluated in as many processes."""
    for split, row_group_size in (("train", 64), ("test", 400)):
        write_shards(
            f"digits:{split}", folder / "shards" / split, name=f"digits-{split}", row_group_size=row_group_size
        )
    return folder / "shards"


@pytest.fixture(scope="module")
def start(folder: Path) -> RegisteredModel:
    """A registered network of random weights and 50 classes."""
    torch.manual_seed(3)
    spec = ModelSpec(
        model=MODEL,
        num_classes=50,
        class_names=GlyphSource("s").class_names,
        multi_label=False,
        resize_mode="square",
        resize_size=32,
        crop_size=32,
    )
    save_package(folder / "init", create_model(MODEL, 50), spec)
    return register(str(folder / "init"), name="start", alias="champion", tracking_uri=tracking_uri("", str(folder)))


@pytest.fixture(scope="module")
def config(folder: Path, digits: Path, start: RegisteredModel) -> FinetuneConfig:
    """Adapters of rank 2, learned from five images per class."""
    return FinetuneConfig(
        name="adapters",
        shards=str(digits / "train"),
        init="models:/start@champion",
        train="adapters:2",
        rule=RuleOverrides(
            resize=36, crop=32, num_steps=NUM_STEPS, warmup_steps=0, boundaries=(), batch_size=32, base_lr=0.03,
            mixup_alpha=0.1,
        ),
        random_flip=False,
        shots=5,
        subset_seed=3,
        storage=str(folder),
        runtime=Runtime(
            num_workers=1, log_every_steps=1, checkpoint_every_steps=FEW, num_checkpoints_to_keep=NUM_STEPS // FEW
        ),
    )  # fmt: skip


class Undisturbed(NamedTuple):
    config: FinetuneConfig
    trained: Trained
    weights: dict[str, torch.Tensor]


def run(config: FinetuneConfig) -> Undisturbed:
    trained = finetune(config)
    assert trained is not None
    return Undisturbed(config, trained, load_package(trained.result.package_uri)[0].state_dict())


@pytest.fixture(scope="module")
def undisturbed(config: FinetuneConfig, digits: Path) -> Undisturbed:
    """A run that is also tested, and registered under another name than its own."""
    return run(replace(config, test_shards=str(digits / "test"), register=RegisterAs(name="digits-5")))


def test_few_shot_transfer_starts_at_a_zero_head_and_is_tested_in_full(
    undisturbed: Undisturbed, start: RegisteredModel, folder: Path
) -> None:
    config, trained, _ = undisturbed
    losses = [loss for _, loss in history(folder, trained.result.run_id)]
    assert len(losses) == NUM_STEPS
    assert losses[0] == pytest.approx(np.log(10), rel=1e-6)
    assert np.mean(losses[-5:]) < 0.8 * losses[0]

    subset = json.loads((folder / "adapters" / "few-shot" / "subset.json").read_text())
    assert len(set(subset["ids"])) == 50
    manifest = read_manifest(folder / "adapters" / "few-shot" / "shards")
    assert manifest.num_examples == 50
    assert trained.result.metrics["test/num_examples"] == 800
    assert trained.result.metrics["test/top_1"] > 0.2
    classifier = bit_ray.load_model("models:/digits-5@champion", tracking_uri=tracking_uri("", str(folder)))
    assert classifier.spec.provenance["parent"] == "models:/start@champion"
    assert classifier.spec.provenance["parent_digest"] == start.sha256
    assert classifier.spec.resize_mode == "square"
    assert finetune(config) == trained

    recorded = MlflowClient(tracking_uri=tracking_uri("", str(folder))).get_run(trained.result.run_id)
    assert recorded.data.metrics["test/top_1"] == trained.result.metrics["test/top_1"]
    assert "digits-test" in {each.dataset.name for each in recorded.inputs.dataset_inputs}
    with pytest.raises(
        ConfigError, match="^shots: 4 with subset_seed 3; accepted: 5 with subset_seed 3, as this run began; "
    ):
        finetune(replace(config, shots=4))


def test_transfer_settings_that_cannot_work_are_refused(config: FinetuneConfig, folder: Path, tmp_path: Path) -> None:
    write_shards(GlyphSource("s", examples_per_class=1), tmp_path / "glyphs", name="glyphs")
    config = replace(config, name="refused", init=str(folder / "init"), shots=0)
    for changes, message in (
        ({"init": "", "train": "all"}, "^init: empty, and model is empty; "),
        (
            {"model": "R50x1"},
            f"^model: R50x1, but the weights in {folder / 'init'} are of {MODEL}; leave it out$",
        ),
        (
            {"test_shards": str(tmp_path / "glyphs")},
            "^test_shards: .* has 50 classes that are not those of the training shards",
        ),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            finetune(replace(config, **changes))
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="^models:/strat@champion: no model of that name; .*start") as missing:
        finetune(replace(config, init="models:/strat@champion"))
    assert "\n" not in str(missing.value)
    assert not (folder / "refused").exists()


def test_adapters_leave_an_ordinary_model_with_the_norms_it_began_with(undisturbed: Undisturbed, folder: Path) -> None:
    begin = load_package(folder / "init")[0].state_dict()
    _, spec = load_package(folder / "adapters" / f"step-{NUM_STEPS:08d}")
    assert (spec.recipe["train"], spec.recipe["profile"], spec.recipe["base_lr"]) == ("adapters:2", "code", 0.03)
    assert undisturbed.weights.keys() == begin.keys()
    for name, tensor in undisturbed.weights.items():
        unchanged = tensor.shape == begin[name].shape and torch.equal(tensor, begin[name])
        assert unchanged is (".gn" in name or name.startswith("gn.")), name


@pytest.mark.usefixtures("undisturbed")
def test_adapters_are_the_same_on_two_workers(config: FinetuneConfig, folder: Path) -> None:
    begin = load_package(folder / "init")[0].state_dict()
    # Few steps, before rounding grows; at a constant rate they are the first of the longer run.
    one = load_package(folder / "adapters" / f"step-{FEW:08d}")[0].state_dict()
    few = replace(config, rule=replace(config.rule, num_steps=FEW))
    two = run(replace(few, name="workers-2", runtime=replace(config.runtime, num_workers=2))).weights
    for name, tensor in two.items():
        moved = one[name] - (0 if name.startswith("head.") else begin[name])  # the head is new, and began at zero
        assert (tensor - one[name]).norm() <= 0.01 * moved.norm(), name


def test_adapters_outlive_their_worker(config: FinetuneConfig, undisturbed: Undisturbed, folder: Path) -> None:
    killed: list[int] = []

    def kill() -> None:
        deadline = time.monotonic() + 120
        while not (folder / "outlives" / f"step-{FEW:08d}" / "model.json").exists():
            if time.monotonic() > deadline:
                return
            time.sleep(0.01)
        killed.extend(kill_ray_processes("RayTrainWorker"))

    killer = threading.Thread(target=kill)
    killer.start()
    after = run(replace(config, name="outlives")).weights
    killer.join()
    assert len(killed) == 1
    assert_identical(after, undisturbed.weights)


def test_the_speed_of_a_cluster_is_measured_on_one_of_its_workers(
    config: FinetuneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(config.shards)
    rule = hyperrule(manifest.num_examples, (32, 32), resize=36, crop=32, batch_size=64)
    plan = transfer_plan(
        rule, model=MODEL, num_classes=50, manifest_digest=manifest.digest, init="", init_digest="", seed=0
    )
    speed = dry_run.worker_speed(plan, config.runtime, 2, False, local=False)
    assert speed is not None
    # Fewer than the 32 of a share on a machine that is slow by then.
    found = re.fullmatch(r"measured with (\d+) images a pass on one CPU thread", speed.how)
    assert found is not None
    assert 0 < int(found[1]) <= 32
    rows = dict(dry_run.describe(plan, config.runtime, manifest, Workers(2, 2, False), speed))
    assert f"at 2 workers x {speed.images_per_s:,.3g} images/s" in rows["time"]
    assert rows["images"] == "32,000 in all"

    monkeypatch.setattr(dry_run, "_SECONDS_FOR_A_PLACE", 0.5)
    assert dry_run.worker_speed(plan, config.runtime, 2, True, local=False) is None  # it has no GPU
    rows = dict(dry_run.describe(plan, config.runtime, manifest, Workers(2, 4, False), None))
    assert rows["time"] == "unknown: the cluster had no free slot for a measurement"
