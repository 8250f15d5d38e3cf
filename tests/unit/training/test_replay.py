from pathlib import Path

import pytest
import torch

from bit_ray import store
from bit_ray.cli.main import main
from bit_ray.config import to_dict
from bit_ray.data.images.views import TrainView
from bit_ray.errors import ConfigError, ModelError
from bit_ray.recipes.schedules import Schedule
from bit_ray.run_folder import RunFolder
from bit_ray.run_records import RunRecord, Start
from bit_ray.tracking.config import TrackingConfig
from bit_ray.tracking.runs import TrackedRun
from bit_ray.training.device import resolve_precision
from bit_ray.training.plan import TrainPlan
from bit_ray.training.replay import precision_of

CPU = torch.device("cpu")


def test_a_step_is_replayed_in_the_precision_of_its_start(tmp_path: Path):
    folder = RunFolder(str(tmp_path))
    assert precision_of(folder, 5, CPU) == "auto"  # a run of before it was recorded
    settings = {"device": "cuda", "num_workers": 1, "micro_batch_size": 8}
    folder.record_start(Start(first_step=0, precision="fp32", **settings))
    folder.record_start(Start(first_step=10, precision="bf16", **settings))
    assert precision_of(folder, 9, CPU) == "fp32"
    try:
        resolve_precision("bf16", CPU)
    except ConfigError:
        with pytest.raises(
            ModelError,
            match="trained in bf16 on cuda; accepted: a device that is fast in bf16, unlike this cpu device; ",
        ):
            precision_of(folder, 10, CPU)
    else:
        assert precision_of(folder, 10, CPU) == "bf16"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of 30 steps with MixUp, as far as it is recorded: no checkpoint."""
    storage = tmp_path_factory.mktemp("runs")
    plan = TrainPlan(
        kind="pretrain",
        model="R1-1-1-1x0.5",
        num_classes=3,
        manifest_digest="0" * 64,
        num_examples=96,
        view=TrainView(crop="inception", crop_size=32),
        resize_mode="shorter_side",
        resize_size=36,
        loss="softmax",
        schedule=Schedule(base_lr=0.1, num_steps=30),
        global_batch_size=8,
        mixup_alpha=0.1,
    )
    folder = RunFolder.of(str(storage), "recorded")
    with TrackedRun.open(
        TrackingConfig(), run_name="recorded", storage=str(storage), params={}, tags={}, kind="pretrain"
    ) as tracked:
        for step in (10, 20, 30):
            tracked.log_metrics({"train/loss": 1.0}, step=step)
    store.write_json(folder.plan, to_dict(RunRecord(digest=plan.digest, shards="shards", plan=to_dict(plan))))
    return folder


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--step", "30"], "--step: 30; accepted: 0 to 29, the steps with a recorded loss; correct it"),
        (["--step", "-1"], "--step: -1; accepted: 0 to 29, the steps with a recorded loss; correct it"),
        (
            ["--step", "25", "--runtime.micro-batch-size", "3"],
            "--runtime.micro-batch-size: 3; accepted: an even number, because MixUp mixes pairs of neighbours; add one",
        ),
        (
            ["--step", "25", "--tracking.experiment", " "],
            "--tracking.experiment: empty; accepted: the name of an MLflow ",
        ),
    ],
)
def test_a_setting_that_cannot_work_is_named_as_the_user_typed_it(
    flags: list[str],
    error: str,
    run: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    capfd.readouterr()
    assert main(["replay", "--run", run.uri, *flags]) == 2
    assert capfd.readouterr().err.startswith(f"error: {error}")
