import contextlib
import io
import re

import pytest
import torch

from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.embedded.glyphs import GlyphSource
from bit_ray.recipes.upstream import UpstreamRecipe
from bit_ray.studies.config import DiagnoseConfig
from bit_ray.studies.diagnose import diagnose
from bit_ray.training.config import PretrainConfig, ReplayConfig, Runtime
from bit_ray.training.pretrain import pretrain
from bit_ray.training.replay import replay

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
NUM_STEPS = 40


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    uri = tmp_path_factory.mktemp("glyphs") / "shards"
    write_shards(GlyphSource("s", examples_per_class=8), uri, name="glyphs", row_group_size=16, shard_examples=128)
    return uri


def run_config(folder, name, shards, **runtime):
    recipe = UpstreamRecipe(
        name="small",
        epochs=NUM_STEPS * 64 / 400,
        decay_epochs=(),
        global_batch_size=64,
        base_lr_per_256=0.4,
        warmup_steps=0,
        crop_size=32,
    )
    return PretrainConfig(
        name=name,
        shards=str(shards),
        model="R1-1-1-1x0.5",
        storage=str(folder),
        recipe=recipe,
        runtime=Runtime(**{"num_workers": 1, "log_every_steps": 1, "checkpoint_every_steps": 10} | runtime),
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, shards, ray_local):
    """The folder of a run, and what it printed."""
    folder = tmp_path_factory.mktemp("runs")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        pretrain(run_config(folder, "undisturbed", shards))
    return folder, printed.getvalue()


def test_a_step_replayed_from_its_checkpoint_gives_the_recorded_loss(undisturbed):
    folder, _ = undisturbed
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    result = replay(ReplayConfig(run=str(folder / "undisturbed"), step=34))
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)
    assert result.start_step == 30
    assert (result.first_step, result.last_step) == (34, 34)
    assert sorted(result.losses) == [30, 31, 32, 33, 34]
    assert result.replayed == pytest.approx(result.recorded, rel=1e-6)
    assert result.losses[33] != pytest.approx(result.recorded, rel=1e-6)


def test_a_recorded_run_is_diagnosed_as_its_last_checkpoint_was(undisturbed):
    folder, printed = undisturbed
    found = diagnose(DiagnoseConfig(run="undisturbed", storage=str(folder)))
    assert (found.step, found.num_steps) == (NUM_STEPS, NUM_STEPS)
    loss, norm = found.curves
    assert (loss.name, norm.name) == ("train/loss", "train/weight_norm")
    assert loss.trend.first_step == norm.trend.first_step == NUM_STEPS // 2
    assert norm.trend.slope is not None
    # Only the last of the four checkpoints has 16 values in its last doubling.
    [line] = re.findall(r"^undisturbed: step (\d+): loss [\d.]+, (.*)$", printed, re.MULTILINE)
    change, low, high = (
        f"{100 * x:+.1f}" for x in (loss.trend.slope.estimate, loss.trend.slope.low, loss.trend.slope.high)
    )
    assert line == (str(NUM_STEPS), f"{loss.answer} ({change} % per doubling, 90 % interval {low} to {high})")
