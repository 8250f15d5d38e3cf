from dataclasses import replace

import pytest

import bit_ray
from bit_ray.config import from_dict, to_dict
from bit_ray.errors import ConfigError
from bit_ray.recipes.hyperrule import HyperRule, RuleOverrides, hyperrule


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
@pytest.mark.parametrize(
    ("profile", "batch_size", "base_lr"), [("code", 512, 0.003), ("paper", 512, 0.003), ("cheap", 128, 0.001)]
)
def test_number_of_examples_decides_the_regime(
    profile, batch_size, base_lr, num_examples, regime, num_steps, mixup_alpha
):
    rule = hyperrule(num_examples, (224, 224), profile=profile)
    assert (rule.regime, rule.num_steps, rule.mixup_alpha) == (regime, num_steps, mixup_alpha)
    assert (rule.batch_size, rule.base_lr, rule.momentum, rule.weight_decay) == (batch_size, base_lr, 0.9, 0.0)
    assert (rule.random_crop, rule.random_flip, rule.overrides) == (True, True, ())


@pytest.mark.parametrize(("profile", "base_lr"), [("code", 0.003), ("cheap", 0.001)])
@pytest.mark.parametrize("num_examples", [19_999, 20_000, 499_999, 500_000])
def test_code_and_cheap_profiles_have_the_reference_rate_at_every_step(profile, base_lr, num_examples):
    rule = hyperrule(num_examples, (32, 32), profile)
    schedule = rule.schedule
    assert [schedule.lr_at(step) for step in range(rule.num_steps)] == [
        reference_lr(step, num_examples, base_lr) for step in range(rule.num_steps)
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
    ("num_examples", "num_steps", "boundaries"),
    [
        (19_999, 500, (150, 300, 450)),
        (20_000, 10_000, (3000, 6000, 9000)),
        (499_999, 10_000, (3000, 6000, 9000)),
        (500_000, 20_000, (6000, 12_000, 18_000)),
    ],
)
def test_paper_profile_decays_at_30_60_90_percent_without_warmup(num_examples, num_steps, boundaries):
    rule = hyperrule(num_examples, (32, 32), profile="paper")
    assert (rule.num_steps, rule.warmup_steps, rule.boundaries) == (num_steps, 0, boundaries)
    schedule = rule.schedule
    for step in range(num_steps):
        tenths = 10 * step / num_steps
        stairs = (tenths >= 3) + (tenths >= 6) + (tenths >= 9)
        assert schedule.lr_at(step) == pytest.approx(0.003 * 0.1**stairs, rel=1e-12)


@pytest.mark.parametrize(
    ("profile", "model", "image_size", "sizes"),
    [
        ("code", None, (8, 8), (160, 128)),
        ("code", None, (95, 96), (160, 128)),
        ("code", None, (96, 96), (512, 480)),
        ("code", None, (9215, 1), (160, 128)),
        ("code", "R50x1", (224, 224), (512, 480)),
        ("code", "R152x4", (224, 224), (512, 480)),
        ("code", "R50x1", (96, 95), (160, 128)),
        ("cheap", "R50x1", (95, 96), (160, 128)),
        ("cheap", "R50x1", (96, 96), (512, 480)),
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


def test_a_changed_number_of_steps_scales_warmup_and_boundaries():
    rule = hyperrule(50, (8, 8), num_steps=250, batch_size=64, base_lr=0.01, resize=40, crop=32)
    assert (rule.num_steps, rule.warmup_steps, rule.boundaries) == (250, 50, (100, 150, 200))
    assert (rule.batch_size, rule.base_lr, rule.resize, rule.crop, rule.mixup_alpha) == (64, 0.01, 40, 32, 0.0)
    assert rule.lr_at(100) == 0.01
    assert rule.lr_at(101) == pytest.approx(0.001)
    paper = hyperrule(50, (8, 8), "paper", num_steps=50)
    assert (paper.warmup_steps, paper.boundaries) == (0, (15, 30, 45))


def test_what_is_given_is_taken_and_does_not_scale():
    rule = hyperrule(50, (8, 8), num_steps=90, warmup_steps=0, boundaries=[30, 60], mixup_alpha=0.2)
    assert (rule.warmup_steps, rule.boundaries, rule.mixup_alpha) == (0, (30, 60), 0.2)
    assert hyperrule(50_000, (8, 8), mixup_alpha=0.0).mixup_alpha == 0.0


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7])
def test_very_short_runs_are_possible(num_steps):
    rule = hyperrule(50, (8, 8), num_steps=num_steps)
    assert len([rule.lr_at(step) for step in range(num_steps)]) == num_steps


@pytest.mark.parametrize("profile", ["code", "paper", "cheap"])
@pytest.mark.parametrize(
    "override",
    [
        {"warmup_steps": 3},
        {"boundaries": (201,)},
        {"batch_size": 256},
        {"base_lr": 0.01},
        {"momentum": 0.8},
        {"weight_decay": 1e-5},
        {"mixup_alpha": 0.2},
        {"random_crop": False},
        {"random_flip": False},
    ],
)
def test_every_profile_takes_every_override_and_names_it(profile, override):
    plain, changed = (hyperrule(1000, (32, 32), profile, **changes) for changes in ({}, override))
    [(name, value)] = override.items()
    assert getattr(changed, name) == value
    assert changed.overrides == (name,)
    assert replace(changed, **{name: getattr(plain, name)}, overrides=()) == plain


def test_an_override_that_changes_nothing_is_none():
    assert hyperrule(1000, (32, 32), base_lr=0.003, num_steps=500, regime="small") == hyperrule(1000, (32, 32))


def test_the_boundary_rule_can_be_changed_in_every_profile():
    code = hyperrule(1000, (32, 32), boundary_rule="upstream")
    assert (code.lr_at(200), code.overrides) == (pytest.approx(0.0003), ("boundary_rule",))
    paper = hyperrule(1000, (32, 32), "paper", boundary_rule="hyperrule")
    assert (paper.lr_at(150), paper.lr_at(151)) == (0.003, pytest.approx(0.0003))


def test_a_regime_given_brings_its_steps_decays_and_mixup():
    rule = hyperrule(1000, (32, 32), regime="medium")
    medium = hyperrule(20_000, (32, 32))
    assert rule.overrides == ("regime",)
    assert replace(rule, num_examples=20_000, overrides=()) == medium


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((0, (32, 32)), {}, "num_examples: 0; accepted: at least 1"),
        ((-5, (32, 32)), {}, "num_examples: -5"),
        ((10, (0, 32)), {}, "image_size: .*at least 1 pixel"),
        ((10, (32, -1)), {}, "image_size"),
        ((10, (32, 32, 3)), {}, "image_size: .*height, width"),
        ((10, 32), {}, "image_size: 32; .*height, width"),
        ((10, (32, 32)), {"profile": "papers"}, "profile: 'papers'; accepted: code, paper, cheap"),
        ((10, (32, 32)), {"resize": 160, "crop": 200}, "resize: 160; accepted: at least crop"),
        ((10, (32, 32)), {"crop": 16}, "crop: 16; accepted: at least 32"),
        ((10, (32, 32)), {"batch_size": 0}, "batch_size: 0"),
        ((10, (32, 32)), {"base_lr": -0.1}, "base_lr: -0.1"),
        ((10, (32, 32)), {"mixup_alpha": -0.1}, "mixup_alpha: -0.1"),
        ((10, (32, 32)), {"momentum": 1.0}, "momentum: 1.0; accepted: 0 to below 1"),
        ((10, (32, 32)), {"weight_decay": -1.0}, "weight_decay: -1.0"),
        ((10, (32, 32)), {"regime": "tiny"}, "regime: 'tiny'; accepted: small, medium, large"),
        ((10, (32, 32)), {"boundary_rule": "mine"}, "boundary_rule: 'mine'; accepted: upstream, hyperrule"),
        ((10, (32, 32)), {"num_steps": 0}, "num_steps: 0"),
        ((10, (32, 32)), {"warmup_steps": 500}, "warmup_steps: 500; accepted: 0 to 499"),
        ((10, (32, 32)), {"boundaries": (501,)}, "boundaries: .*0 to 500"),
    ],
)
def test_bad_settings_are_refused_in_one_line(arguments, settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        hyperrule(*arguments, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop": 16}, "crop: 16; accepted: at least 32 pixels"),
        ({"momentum": 1.0}, "momentum: 1.0; accepted: 0 to below 1"),
        ({"base_lr": 0.0}, "base_lr: 0.0; accepted: a number above 0"),
        ({"num_steps": 0}, "num_steps: 0; accepted: at least 1"),
    ],
)
def test_what_no_data_can_make_right_is_refused_before_any_data_is_read(settings, message):
    with pytest.raises(ConfigError, match=message):
        RuleOverrides(**settings)
    assert RuleOverrides(warmup_steps=500, resize=40, crop=200).crop == 200  # with other data it may fit


def test_config_round_trip():
    rule = hyperrule(20_000, (32, 48), "paper", num_steps=100)
    assert from_dict(HyperRule, to_dict(rule)) == rule


def test_package_gives_the_same_function():
    assert bit_ray.hyperrule(1000, image_size=(32, 32), profile="code") == hyperrule(1000, (32, 32))


@pytest.mark.parametrize(
    ("image_size", "given", "sizes"),
    [
        ((32, 32), {"crop": 32}, (40, 32)),
        ((32, 32), {"resize": 40}, (40, 32)),
        ((300, 300), {"crop": 240}, (256, 240)),
        ((300, 300), {"resize": 256}, (256, 240)),
        ((300, 300), {"resize": 33}, (33, 32)),
    ],
)
def test_a_side_that_is_given_alone_scales_the_other(image_size, given, sizes):
    rule = hyperrule(50, image_size, **given)
    assert (rule.resize, rule.crop) == sizes
