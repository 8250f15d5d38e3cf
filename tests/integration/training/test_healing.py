"""Runs on a cluster that leave out a batch: one of wrong labels, and one after which the weights are broken."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from glyph_runs import assert_identical, history, trained_here, weights
from mlflow import MlflowClient

from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.embedded.glyphs import GlyphSource
from bit_ray.data.stream.history import StreamPlan, uses_in_step
from bit_ray.errors import ModelError
from bit_ray.recipes.hyperrule import RuleOverrides
from bit_ray.run_folder import RunFolder
from bit_ray.run_records import LeftOut
from bit_ray.training.config import FinetuneConfig, ReplayConfig, Runtime
from bit_ray.training.finetune import finetune, finetune_plan
from bit_ray.training.replay import replay

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600), pytest.mark.usefixtures("ray_local")]
CLASSES, BATCH, BAD_STEP, NUM_STEPS = 6, 8, 46, 56


class FewGlyphs(GlyphSource):
    """Six classes, in which some images have the label of another one."""

    def __init__(self, wrong=()):
        super().__init__("s", examples_per_class=NUM_STEPS * BATCH // CLASSES + 1)
        self.wrong = frozenset(wrong)
        self.characters = self.characters[:CLASSES]
        self.class_names = self.class_names[:CLASSES]

    def part(self, indices):
        return [
            replace(example, labels=((example.labels[0] + 1) % CLASSES,)) if example.id in self.wrong else example
            for example in super().part(indices)
        ]


def run_config(folder, name, shards, **runtime):
    return FinetuneConfig(
        name=name,
        model="R1-1-1-1x0.5",
        shards=str(shards),
        rule=RuleOverrides(
            resize=32, crop=32, num_steps=NUM_STEPS, warmup_steps=0, boundaries=(), batch_size=BATCH, base_lr=0.003,
            mixup_alpha=0.0,
        ),
        random_crop=False,
        random_flip=False,
        storage=str(folder),
        runtime=Runtime(**{"num_workers": 1, "log_every_steps": 1, "checkpoint_every_steps": 47} | runtime),
    )  # fmt: skip


def ids_of(shards, step):
    stream = StreamPlan(seed=0, global_batch_size=BATCH, view={})
    return tuple(use.id for use in uses_in_step(shards, read_manifest(shards), stream, step))


def test_a_batch_of_wrong_labels_is_left_out_recorded_and_replayed_so(folder, tmp_path, capsys):
    write_shards(FewGlyphs(), tmp_path / "clean", name="glyphs", row_group_size=16)
    blamed = ids_of(tmp_path / "clean", BAD_STEP)
    write_shards(FewGlyphs(blamed), tmp_path / "poisoned", name="glyphs", row_group_size=16)
    result = finetune(run_config(folder, "healed", tmp_path / "poisoned", heal=3)).result
    [batch] = RunFolder(str(folder / "healed")).left_out()
    assert (batch.step, batch.images, batch.went_back) == (BAD_STEP, blamed, False)
    shown = capsys.readouterr().out.replace("\n", " ")
    assert f"healed: step {BAD_STEP} is left out: the loss was " in shown
    assert f"--step {BAD_STEP}" in shown
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    recorded = client.download_artifacts(result.run_id, "left_out.json", str(tmp_path))
    with open(recorded) as file:
        assert tuple(json.load(file)["batches"][0]["images"]) == blamed
    assert client.get_run(result.run_id).data.tags["bit_ray.left_out"] == str(BAD_STEP)
    losses = dict(history(folder, result.run_id))
    assert losses.keys() == set(range(1, NUM_STEPS + 1)) - {BAD_STEP + 1}
    # The checkpoint due after that step waits for one that is applied.
    assert RunFolder(str(folder / "healed")).checkpoints("training.json") == [BAD_STEP + 2, NUM_STEPS]

    # The same, bit for bit, as a training that never sees this batch.
    config = run_config(folder, "by-hand", tmp_path / "poisoned")
    manifest = read_manifest(config.shards)
    plan = finetune_plan(config, manifest, None, manifest.num_examples)
    by_hand, found = trained_here(plan, config.shards, left_out=[LeftOut(step=BAD_STEP, why="by hand")])[::-1]
    assert_identical(by_hand, weights(result.package_uri))
    assert found == losses

    again = replay(ReplayConfig(run=str(folder / "healed"), step=NUM_STEPS - 1))
    assert again.replayed == pytest.approx(again.recorded, rel=1e-6)


def test_a_run_whose_weights_break_goes_back_and_ends_with_one_line_after_so_many_times(folder, tmp_path, capsys):
    write_shards(FewGlyphs(), tmp_path / "shards", name="glyphs", row_group_size=16)
    config = run_config(folder, "breaks", tmp_path / "shards", heal=2)
    with pytest.raises(ModelError) as caught:
        finetune(replace(config, rule=replace(config.rule, base_lr=1e20)))
    text = str(caught.value)
    assert re.match(
        r"step \d+: the \w+ was not finite; steps .* would have to be left out, but runtime.heal is 2; ", text
    )
    assert "\n" not in text
    [batch] = RunFolder(str(folder / "breaks")).left_out()  # the first step already breaks the weights
    assert (batch.step, batch.images, batch.went_back) == (0, ids_of(tmp_path / "shards", 0), True)
    assert "breaks: step 0 is left out: after it, the " in capsys.readouterr().out
    _, attempt = json.loads((folder / "breaks" / "attempts.json").read_text())["attempts"]
    assert (attempt["why"], attempt["first_step"]) == ("going back to leave out step 0", 0)
    step = int(re.match(r"step (\d+)", text)[1])
    assert all(np.isfinite(loss) for _, loss in history(folder, run_of(folder, "breaks")))
    assert (folder / "breaks" / f"nonfinite-step-{step:08d}" / "training.json").exists()


def run_of(folder, name):
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("bit_ray").experiment_id
    [run] = client.search_runs([experiment], f"tags.`bit_ray.run_name` = '{name}'")
    return run.info.run_id
