"""What fine-tuning refuses before it writes anything; the trainings themselves are integration tests."""

from pathlib import Path

import pytest

from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.shards.write import write_shards
from bit_ray.errors import BitRayError
from bit_ray.recipes.hyperrule import RuleOverrides
from bit_ray.training.config import FinetuneConfig, Runtime
from bit_ray.training.finetune import finetune, write_few_shot


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "shards"
    write_shards("digits:test", folder, name="digits")
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": RuleOverrides(crop=64, resize=32)}, "resize"),
        ({"rule": RuleOverrides(batch_size=7, mixup_alpha=0.1)}, "batch_size: 7"),
        ({"model": "R51x1"}, "model: unknown name"),
        ({"runtime": Runtime(num_workers=65), "rule": RuleOverrides(batch_size=64)}, "num_workers: 65"),
    ],
)
def test_a_refused_setting_leaves_no_few_shot_set_behind(
    shards: Path, tmp_path: Path, changes: dict[str, object], message: str
):
    settings: dict[str, object] = {
        "name": "few", "model": "R1-1-1-1x0.5", "shards": str(shards), "shots": 2, "storage": str(tmp_path),
    }  # fmt: skip
    with pytest.raises(BitRayError, match=message):
        finetune(FinetuneConfig(**{**settings, **changes}))  # type: ignore[arg-type]
    assert not (tmp_path / "few" / "few-shot").exists()


def test_a_draw_that_cannot_be_had_leaves_nothing_behind(shards: Path, tmp_path: Path):
    config = FinetuneConfig(name="few", model="R1-1-1-1x0.5", shards=str(shards), shots=5000, storage=str(tmp_path))
    with pytest.raises(BitRayError, match="shots: 5000; accepted: at most"):
        finetune(config)
    assert not (tmp_path / "few" / "few-shot").exists()


@pytest.mark.parametrize("upright", [False, True])
def test_a_draw_says_as_its_set_does_whether_images_were_turned(tmp_path: Path, upright: bool):
    whole = str(tmp_path / "whole")
    write_shards("digits:test", whole, name="digits", upright=upright)
    write_few_shot(whole, read_manifest(whole), 1, 0, str(tmp_path / "draw"))
    assert read_manifest(str(tmp_path / "draw" / "shards")).upright == upright
