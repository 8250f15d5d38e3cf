from dataclasses import replace

import pytest

from bit_ray.config import from_dict, to_dict
from bit_ray.errors import ConfigError
from bit_ray.recipes.upstream import UpstreamRecipe, bit_l, bit_m, bit_s


@pytest.mark.parametrize("recipe", [bit_s(), bit_m(), bit_l()])
def test_recipes_share_the_paper_settings(recipe):
    assert recipe.global_batch_size == 4096
    assert recipe.base_lr == 0.48
    assert (recipe.momentum, recipe.weight_decay, recipe.warmup_steps) == (0.9, 1e-4, 5000)
    assert (recipe.crop_size, recipe.area_range, recipe.aspect_range) == (224, (0.05, 1.0), (3 / 4, 4 / 3))
    assert recipe.schedule_kind == "staircase"


@pytest.mark.parametrize(
    ("recipe", "num_examples", "num_classes", "num_steps", "boundaries"),
    [
        (bit_s(), 1_281_167, 1000, 28_151, (9_384, 18_767, 25_023)),
        (bit_m(), 14_200_000, 21_843, 312_012, (104_004, 208_008, 277_344)),
        (bit_l(), 300_000_000, 18_291, 2_929_688, (732_422, 1_684_570, 2_197_266, 2_709_961)),
    ],
)
def test_published_data_sets_give_the_published_durations(recipe, num_examples, num_classes, num_steps, boundaries):
    assert (recipe.reference_num_examples, recipe.reference_num_classes) == (num_examples, num_classes)
    schedule = recipe.schedule(num_examples)
    assert recipe.num_steps(num_examples) == schedule.num_steps == num_steps
    assert schedule.boundaries == boundaries
    for stairs, boundary in enumerate(boundaries):
        assert schedule.lr_at(boundary - 1) == pytest.approx(0.48 / 10**stairs)
        assert schedule.lr_at(boundary) == pytest.approx(0.48 / 10 ** (stairs + 1))
    assert schedule.lr_at(0) == 0
    assert schedule.lr_at(2500) == pytest.approx(0.24)
    assert schedule.lr_at(4999) == pytest.approx(0.48 * 4999 / 5000)
    assert schedule.lr_at(5000) == 0.48


def test_epochs():
    assert (bit_s().epochs, bit_s().decay_epochs) == (90, (30, 60, 80))
    assert (bit_m().epochs, bit_m().decay_epochs) == (90, (30, 60, 80))
    assert (bit_l().epochs, bit_l().decay_epochs) == (40, (10, 23, 30, 37))


def test_rate_follows_the_batch():
    assert replace(bit_s(), global_batch_size=256).base_lr == pytest.approx(0.03)
    assert replace(bit_s(), global_batch_size=128).base_lr == pytest.approx(0.015)


def test_scaled_down_recipe_keeps_its_shape():
    recipe = replace(bit_m(), epochs=9, decay_epochs=(3, 6, 8), global_batch_size=128, warmup_steps=50)
    schedule = recipe.schedule(30_000)
    assert (schedule.num_steps, schedule.boundaries) == (2109, (703, 1406, 1875))
    assert recipe.num_steps(30_000) == round(9 * 30_000 / 128)


def test_a_run_shorter_than_its_warmup_names_the_remedy():
    with pytest.raises(
        ConfigError,
        match=r"warmup_steps: 5000; accepted: 0 to 658, because .*659 steps.*lower warmup_steps or raise epochs",
    ):
        bit_s().schedule(30_000)
    assert replace(bit_s(), warmup_steps=658).schedule(30_000).warmup_steps == 658


def test_loss_follows_the_labels():
    assert [bit_m().loss_for(multi_label=flag) for flag in (False, True)] == ["softmax", "sigmoid"]
    assert [bit_l().loss_for(multi_label=flag) for flag in (False, True)] == ["softmax", "sigmoid"]
    assert replace(bit_m(), loss="sigmoid").loss_for(multi_label=False) == "sigmoid"
    assert bit_s().loss_for(multi_label=False) == "softmax"
    with pytest.raises(ConfigError, match="loss: softmax with several labels.*set loss to auto"):
        bit_s().loss_for(multi_label=True)


def test_cosine_is_an_option():
    schedule = replace(bit_s(), schedule_kind="cosine").schedule(1_281_167)
    assert schedule.lr_at(5000) == pytest.approx(0.48)
    assert schedule.lr_at(28_150) < 1e-8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs: 0; accepted: above 0"),
        ({"epochs": 20}, r"decay_epochs: \(30, 60, 80\); .*below epochs \(20\)"),
        ({"decay_epochs": (60, 30)}, "decay_epochs: .*ascending"),
        ({"decay_epochs": (0, 30)}, "decay_epochs: .*above 0"),
        ({"global_batch_size": 0}, "global_batch_size: 0"),
        ({"base_lr_per_256": -1.0}, "base_lr_per_256: -1.0"),
        ({"crop_size": 0}, "crop_size: 0"),
        ({"warmup_steps": -1}, "warmup_steps: -1"),
        ({"weight_decay": -1e-4}, "weight_decay: -0.0001"),
        ({"momentum": 1.0}, "momentum: 1.0"),
    ],
)
def test_bad_settings_are_refused_in_one_line(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        replace(bit_s(), **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_examples", [0, 20])
def test_data_that_make_no_step_are_refused(num_examples):
    with pytest.raises(ConfigError, match="at least"):
        bit_s().num_steps(num_examples)


def test_config_round_trip():
    assert from_dict(UpstreamRecipe, to_dict(bit_l())) == bit_l()
