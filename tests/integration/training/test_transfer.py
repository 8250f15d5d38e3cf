"""Fine-tuning a part of a network on a real cluster; what the parts are is tested without one."""

import re
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from servers import kill_ray_processes

from bit_ray.cluster.slots import Workers
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.embedded.glyphs import GlyphSource
from bit_ray.models.zoo import create_model
from bit_ray.recipes.hyperrule import RuleOverrides, hyperrule
from bit_ray.training import dry_run
from bit_ray.training.config import FinetuneConfig, Runtime
from bit_ray.training.finetune import finetune
from bit_ray.training.plan import transfer_plan
from bit_ray.weights.package import ModelSpec, load_package, save_package

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600), pytest.mark.usefixtures("ray_local")]
MODEL = "R1-1-1-1x0.5"
NUM_STEPS, FEW = 40, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def config(folder: Path) -> FinetuneConfig:
    """Adapters of rank 2 on a network of random weights."""
    write_shards(GlyphSource("s", examples_per_class=4), folder / "shards", name="glyphs", row_group_size=16)
    names = read_manifest(folder / "shards").class_names
    torch.manual_seed(3)
    spec = ModelSpec(
        model=MODEL,
        num_classes=50,
        class_names=names,
        multi_label=False,
        resize_mode="square",
        resize_size=32,
        crop_size=32,
    )
    save_package(folder / "init", create_model(MODEL, 50), spec)
    return FinetuneConfig(
        name="adapters",
        shards=str(folder / "shards"),
        init=str(folder / "init"),
        train="adapters:2",
        rule=RuleOverrides(
            resize=36, crop=32, num_steps=NUM_STEPS, warmup_steps=0, boundaries=(), batch_size=32, base_lr=0.03,
            mixup_alpha=0.1,
        ),
        random_flip=False,
        storage=str(folder),
        runtime=Runtime(
            num_workers=1, log_every_steps=1, checkpoint_every_steps=FEW, num_checkpoints_to_keep=NUM_STEPS // FEW
        ),
    )  # fmt: skip


def weights(config: FinetuneConfig) -> dict[str, torch.Tensor]:
    trained = finetune(config)
    assert trained is not None
    return load_package(trained.result.package_uri)[0].state_dict()


@pytest.fixture(scope="module")
def undisturbed(config: FinetuneConfig) -> dict[str, torch.Tensor]:
    return weights(config)


def test_adapters_leave_an_ordinary_model_with_the_norms_it_began_with(
    undisturbed: dict[str, torch.Tensor], folder: Path
) -> None:
    begin = load_package(folder / "init")[0].state_dict()
    _, spec = load_package(folder / "adapters" / f"step-{NUM_STEPS:08d}")
    assert (spec.recipe["train"], spec.recipe["profile"], spec.recipe["base_lr"]) == ("adapters:2", "code", 0.03)
    assert undisturbed.keys() == begin.keys()
    for name, tensor in undisturbed.items():
        assert torch.equal(tensor, begin[name]) is (".gn" in name or name.startswith("gn.")), name


@pytest.mark.usefixtures("undisturbed")
def test_adapters_are_the_same_on_two_workers(config: FinetuneConfig, folder: Path) -> None:
    begin = load_package(folder / "init")[0].state_dict()
    # Few steps, before rounding grows; at a constant rate they are the first of the longer run.
    one = load_package(folder / "adapters" / f"step-{FEW:08d}")[0].state_dict()
    few = replace(config, rule=replace(config.rule, num_steps=FEW))
    two = weights(replace(few, name="workers-2", runtime=replace(config.runtime, num_workers=2)))
    for name, tensor in two.items():
        assert (tensor - one[name]).norm() <= 0.01 * (one[name] - begin[name]).norm(), name


def test_adapters_outlive_their_worker(
    config: FinetuneConfig, undisturbed: dict[str, torch.Tensor], folder: Path
) -> None:
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
    after = weights(replace(config, name="outlives"))
    killer.join()
    assert len(killed) == 1
    assert all(torch.equal(tensor, undisturbed[name]) for name, tensor in after.items())


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
