import pytest

import bit_ray
from bit_ray.config import from_dict, to_dict
from bit_ray.errors import ConfigError
from bit_ray.recipes.hyperrule import HyperRule, hyperrule


def reference_lr(step, num_examples, base_lr=0.003):
    """What big_transfer:bit_hyperrule.py computes, from its table (warm-up, decays, end)."""
    if num_examples < 20_000:
        warmup, *decays, end = 100, 200, 300, 400, 500
    elif num_examples < 500_000:
        warmup, *decays, end = 500, 3000, 6000, 9000, 10_000
    else:
        warmup, *decays, end = 500, 6000, 12_000, 18_000, 20_000
    if step < warmup:
        return base_lr * step / warmup
    if step >= end:
        return None
    for boundary in decays:
        if boundary < step:
            base_lr /= 10
    return base_lr


@pytest.mark.parametrize(
    ("num_examples", "regime", "num_steps", "mixup_alpha"),
    [
        (1, "small", 500, 0.0),
        (19_999, "small", 500, 0.0),
        (20_000, "medium", 10_000, 0.1),
        (499_999, "medium", 10_000, 0.1),
        (500_000, "large", 20_000, 0.1),
        (1_281_167, "large", 20_000, 0.1),
    ],
)
@pytest.mark.parametrize("profile", ["code", "paper", "custom"])
def test_number_of_examples_decides_the_regime(profile, num_examples, regime, num_steps, mixup_alpha):
    rule = hyperrule(num_examples, (224, 224), profile=profile)
    assert (rule.regime, rule.num_steps, rule.mixup_alpha) == (regime, num_steps, mixup_alpha)
    assert (rule.batch_size, rule.base_lr, rule.momentum, rule.weight_decay) == (512, 0.003, 0.9, 0.0)
    assert (rule.random_crop, rule.random_flip) == (True, True)


@pytest.mark.parametrize("num_examples", [19_999, 20_000, 499_999, 500_000])
def test_code_profile_has_the_reference_rate_at_every_step(num_examples):
    rule = hyperrule(num_examples, (32, 32))
    schedule = rule.schedule
    assert [schedule.lr_at(step) for step in range(rule.num_steps)] == [
        reference_lr(step, num_examples) for step in range(rule.num_steps)
    ]
    assert reference_lr(rule.num_steps, num_examples) is None


@pytest.mark.parametrize(
    ("num_examples", "warmup", "boundaries"),
    [(50, 100, (200, 300, 400)), (50_000, 500, (3000, 6000, 9000)), (500_000, 500, (6000, 12_000, 18_000))],
)
def test_code_profile_changes_the_rate_after_each_boundary(num_examples, warmup, boundaries):
    rule = hyperrule(num_examples, (32, 32))
    assert (rule.warmup_steps, rule.boundaries) == (warmup, boundaries)
    assert rule.lr_at(0) == 0
    assert rule.lr_at(warmup - 1) == pytest.approx(0.003 * (1 - 1 / warmup))
    assert rule.lr_at(warmup) == 0.003
    for stairs, boundary in enumerate(boundaries):
        assert rule.lr_at(boundary) == pytest.approx(0.003 / 10**stairs)
        assert rule.lr_at(boundary + 1) == pytest.approx(0.003 / 10 ** (stairs + 1))


@pytest.mark.parametrize(
    ("num_examples", "boundaries"),
    [(50, (150, 300, 450)), (50_000, (3000, 6000, 9000)), (500_000, (6000, 12_000, 18_000))],
)
def test_paper_profile_decays_at_30_60_90_percent_without_warmup(num_examples, boundaries):
    rule = hyperrule(num_examples, (32, 32), profile="paper")
    assert (rule.warmup_steps, rule.boundaries) == (0, boundaries)
    assert rule.lr_at(0) == 0.003
    for stairs, boundary in enumerate(boundaries):
        assert rule.lr_at(boundary - 1) == pytest.approx(0.003 / 10**stairs)
        assert rule.lr_at(boundary) == pytest.approx(0.003 / 10 ** (stairs + 1))


@pytest.mark.parametrize(
    ("profile", "model", "image_size", "sizes"),
    [
        ("code", None, (8, 8), (160, 128)),
        ("code", None, (95, 96), (160, 128)),
        ("code", None, (96, 96), (512, 480)),
        ("code", None, (9215, 1), (160, 128)),
        ("code", "R50x1", (224, 224), (512, 480)),
        ("code", "R152x4", (224, 224), (512, 480)),
        ("custom", "R50x1", (224, 224), (512, 480)),
        ("paper", None, (95, 96), (160, 128)),
        ("paper", "R152x4", (95, 96), (160, 128)),
        ("paper", None, (96, 96), (448, 384)),
        ("paper", "R101x3", (224, 224), (448, 384)),
        ("paper", "R152x4", (224, 224), (512, 480)),
    ],
)
def test_image_area_decides_the_resolution(profile, model, image_size, sizes):
    rule = hyperrule(1000, image_size, profile=profile, model=model)
    assert (rule.resize, rule.crop) == sizes


def test_custom_scales_warmup_and_boundaries_with_the_number_of_steps():
    rule = hyperrule(50, (8, 8), profile="custom", num_steps=250, batch_size=64, base_lr=0.01, resize=40, crop=32)
    assert (rule.num_steps, rule.warmup_steps, rule.boundaries) == (250, 50, (100, 150, 200))
    assert (rule.batch_size, rule.base_lr, rule.resize, rule.crop, rule.mixup_alpha) == (64, 0.01, 40, 32, 0.0)
    assert rule.lr_at(100) == 0.01
    assert rule.lr_at(101) == pytest.approx(0.001)


def test_custom_takes_what_is_given():
    rule = hyperrule(50, (8, 8), profile="custom", num_steps=90, warmup_steps=0, boundaries=[30, 60], mixup_alpha=0.2)
    assert (rule.warmup_steps, rule.boundaries, rule.mixup_alpha) == (0, (30, 60), 0.2)
    assert hyperrule(50_000, (8, 8), profile="custom", mixup_alpha=0.0).mixup_alpha == 0.0


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7])
def test_custom_allows_very_short_runs(num_steps):
    rule = hyperrule(50, (8, 8), profile="custom", num_steps=num_steps)
    assert len([rule.lr_at(step) for step in range(num_steps)]) == num_steps


@pytest.mark.parametrize("profile", ["code", "paper"])
@pytest.mark.parametrize(
    "override",
    [
        {"resize": 512},
        {"crop": 480},
        {"num_steps": 500},
        {"warmup_steps": 0},
        {"boundaries": (200,)},
        {"batch_size": 128},
        {"base_lr": 0.001},
        {"mixup_alpha": 0.0},
    ],
)
def test_fixed_profiles_refuse_overrides(profile, override):
    with pytest.raises(ConfigError, match=f"{next(iter(override))}: given.*use profile 'custom'"):
        hyperrule(1000, (32, 32), profile=profile, **override)


def test_crop_and_flip_can_be_turned_off_in_every_profile():
    for profile in ("code", "paper", "custom"):
        rule = hyperrule(1000, (64, 64), profile=profile, random_crop=False, random_flip=False)
        assert (rule.random_crop, rule.random_flip) == (False, False)


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((0, (32, 32)), {}, "num_examples: 0; at least 1"),
        ((-5, (32, 32)), {}, "num_examples: -5"),
        ((10, (0, 32)), {}, "image_size: .*at least 1 pixel"),
        ((10, (32, -1)), {}, "image_size"),
        ((10, (32, 32, 3)), {}, "image_size: .*height, width"),
        ((10, 32), {}, "image_size: 32; .*height, width"),
        ((10, (32, 32)), {"profile": "papers"}, "profile: 'papers'; one of code, paper, custom"),
        ((10, (32, 32)), {"profile": "custom", "crop": 200}, "resize: 160; at least crop"),
        ((10, (32, 32)), {"profile": "custom", "crop": 16}, "crop: 16; at least 32"),
        ((10, (32, 32)), {"profile": "custom", "batch_size": 0}, "batch_size: 0"),
        ((10, (32, 32)), {"profile": "custom", "base_lr": -0.1}, "base_lr: -0.1"),
        ((10, (32, 32)), {"profile": "custom", "mixup_alpha": -0.1}, "mixup_alpha: -0.1"),
        ((10, (32, 32)), {"profile": "custom", "num_steps": 0}, "num_steps: 0"),
        ((10, (32, 32)), {"profile": "custom", "warmup_steps": 500}, "warmup_steps: 500; 0 to 499"),
        ((10, (32, 32)), {"profile": "custom", "boundaries": (501,)}, "boundaries: .*0 to 500"),
    ],
)
def test_bad_settings_are_refused_in_one_line(arguments, settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        hyperrule(*arguments, **settings)
    assert "\n" not in str(caught.value)


def test_config_round_trip():
    rule = hyperrule(20_000, (32, 48), profile="custom", num_steps=100)
    assert from_dict(HyperRule, to_dict(rule)) == rule


def test_package_gives_the_same_function():
    assert bit_ray.hyperrule(1000, image_size=(32, 32), profile="code") == hyperrule(1000, (32, 32))
