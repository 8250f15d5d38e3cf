import dataclasses
import json
import math

import pytest

from bit_ray.config import from_dict, replace, to_dict
from bit_ray.data.images.views import TrainView
from bit_ray.data.stream.settings import Shuffle
from bit_ray.errors import ConfigError
from bit_ray.recipes.schedules import Schedule
from bit_ray.training.config import Runtime
from bit_ray.training.plan import TrainPlan

PLAN = TrainPlan(
    kind="pretrain",
    model="R1-1-1-1x0.5",
    num_classes=50,
    manifest_digest="a" * 64,
    num_examples=3000,
    view=TrainView(crop="inception", crop_size=32),
    resize_mode="shorter_side",
    resize_size=37,
    loss="softmax",
    schedule=Schedule(base_lr=0.12, num_steps=100, warmup_steps=5, boundaries=(50, 75)),
    global_batch_size=128,
    shuffle=Shuffle(num_lanes=8, lane_window=512, full_up_to=4096),
    recipe={"name": "small", "decay_epochs": [1.0, 2.5]},
)
# Another value for every field that decides the weights, nested ones included.
CHANGES = {
    "kind": "finetune",
    "model": "R1-1-1-1x1",
    "num_classes": 51,
    "init": "models:/upstream@champion",
    "init_digest": "b" * 64,
    "manifest_digest": "b" * 64,
    "num_examples": 3001,
    "train": "stages:2",
    "view.crop": "resize",
    "view.crop_size": 64,
    "view.resize_size": 80,
    "view.area_range": (0.08, 1.0),
    "view.aspect_range": (0.5, 2.0),
    "view.random_flip": False,
    "resize_mode": "square",
    "resize_size": 40,
    "loss": "sigmoid",
    "schedule.base_lr": 0.13,
    "schedule.num_steps": 101,
    "schedule.warmup_steps": 6,
    "schedule.boundaries": (50, 76),
    "schedule.decay": 0.2,
    "schedule.kind": "cosine",
    "schedule.boundary_rule": "hyperrule",
    "global_batch_size": 256,
    "momentum": 0.8,
    "weight_decay": 1e-4,
    "dropout": 0.2,
    "mixup_alpha": 0.1,
    "clip_norm": 1.0,
    "head_bias": -10.0,
    "seed": 1,
    "shuffle.num_lanes": 4,
    "shuffle.lane_window": 256,
    "shuffle.full_up_to": 100,
}


def leaves(config, prefix=""):
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def test_every_field_of_the_plan_is_part_of_its_digest():
    assert set(leaves(PLAN)) == {*CHANGES, "recipe", "decay_to_init", "norm_batch"}  # these two have tests of their own
    digests = {replace(PLAN, {name: value}).digest for name, value in CHANGES.items()}
    digests.add(dataclasses.replace(PLAN, recipe={"name": "other"}).digest)
    assert len(digests - {PLAN.digest}) == len(CHANGES) + 1


def test_the_digest_is_stable_over_processes_and_versions():
    assert PLAN.digest == dataclasses.replace(PLAN).digest
    assert PLAN.digest == "2eac7e19fb068fda856589f1b8d2214ff681d61ad8635ad46dbd045b10f46beb"


def test_decay_to_the_initial_weights_is_part_of_the_digest():
    decayed = dataclasses.replace(PLAN, weight_decay=1e-4)
    assert dataclasses.replace(decayed, decay_to_init=True).digest != decayed.digest


def test_the_batch_of_statistics_is_part_of_the_digest_of_batch_norm_alone():
    plain, grouped = PLAN, dataclasses.replace(PLAN, model="R1-1-1-1x0.5-bn")
    assert (plain.batch_of_statistics, grouped.batch_of_statistics) == (0, 32)
    assert dataclasses.replace(grouped, norm_batch=32).digest == grouped.digest
    assert dataclasses.replace(grouped, norm_batch=64).digest != grouped.digest
    assert dataclasses.replace(grouped, global_batch_size=50).batch_of_statistics == 50
    assert dataclasses.replace(PLAN, model="R1-1-1-1x0.5-syncbn").batch_of_statistics == 128


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (
            "R1-1-1-1x0.5",
            {"norm_batch": 32},
            "norm_batch: 32, but R1-1-1-1x0.5 has no BatchNorm; accepted: 0; leave it out",
        ),
        (
            "R1-1-1-1x0.5-syncbn",
            {"norm_batch": 32},
            "norm_batch: 32, but R1-1-1-1x0.5-syncbn has its statistics over the whole batch; accepted: 0; leave "
            "it out",
        ),
        (
            "R1-1-1-1x0.5-bn",
            {"norm_batch": 48},
            "norm_batch: 48; accepted: at least 2, and a divisor of the batch size (128); change one",
        ),
        (
            "R1-1-1-1x0.5-bn",
            {"norm_batch": 1},
            "norm_batch: 1; accepted: at least 2, and a divisor of the batch size (128); change one",
        ),
        (
            "R1-1-1-1x0.5-bn",
            {"norm_batch": 3, "global_batch_size": 126, "mixup_alpha": 0.1},
            "norm_batch: 3; accepted: an even number, because MixUp mixes pairs; change it",
        ),
    ],
)
def test_a_batch_of_statistics_that_cannot_be_is_refused(model, changes, message):
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(PLAN, model=model, **changes)
    assert str(caught.value) == message


def test_how_a_plan_is_carried_out_is_no_part_of_it():
    runtime_fields = {field.name for field in dataclasses.fields(Runtime)}
    assert not runtime_fields & {field.name for field in dataclasses.fields(TrainPlan)}


def test_a_plan_survives_json():
    plan = dataclasses.replace(PLAN, shuffle=Shuffle(num_lanes=3, lane_window=99), head_bias=-10.0, mixup_alpha=0.1)
    back = from_dict(TrainPlan, json.loads(json.dumps(to_dict(plan))))
    assert back == plan
    assert back.digest == plan.digest


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("global_batch_size", 0, "^global_batch_size: 0; accepted: a whole number of at least 1"),
        ("num_examples", 0, "^num_examples: 0; accepted: a whole number of at least 1"),
        ("seed", -1, "^seed: -1; accepted: a whole number of at least 0"),
        ("mixup_alpha", -0.1, r"^mixup_alpha: -0\.1; accepted: 0 \(off\) or more"),
        ("clip_norm", -1.0, r"^clip_norm: -1\.0; accepted: 0 \(off\) or more"),
        ("weight_decay", math.nan, r"^weight_decay: nan; accepted: 0 \(off\) or more"),
        ("momentum", 1.0, r"^momentum: 1\.0; accepted: 0 to below 1"),
        ("dropout", 1.0, r"^dropout: 1\.0; accepted: 0 \(off\) to below 1"),
        ("decay_to_init", True, "^decay_to_init: on, but weight_decay is 0; accepted: a weight_decay above 0"),
    ],
)
def test_a_plan_that_cannot_work_is_refused_by_field(name, value, message):
    with pytest.raises(ConfigError, match=message) as caught:
        dataclasses.replace(PLAN, **{name: value})
    assert "\n" not in str(caught.value)


def test_mixup_needs_an_even_batch():
    with pytest.raises(
        ConfigError, match="^global_batch_size: 127; accepted: an even number, because MixUp mixes pairs"
    ):
        replace(PLAN, {"mixup_alpha": 0.1, "global_batch_size": 127})
    assert replace(PLAN, {"global_batch_size": 127}).global_batch_size == 127


@pytest.mark.parametrize(
    ("name", "value"),
    [("micro_batch_size", -1), ("num_readers", 0), ("log_every_steps", 0), ("max_failures", -1)],
)
def test_a_runtime_that_cannot_work_is_refused_by_field(name, value):
    with pytest.raises(
        ConfigError, match=f"^{name}: {value}; accepted: a whole number of at least {value + 1}; raise it$"
    ):
        Runtime(**{name: value})


@pytest.mark.parametrize("workers", [-1, "4:2", "0:4", "a few", "1:", ":3", "1:2:3", "-1:2"])
def test_numbers_of_workers_that_make_no_sense_are_refused(workers):
    with pytest.raises(ConfigError) as caught:
        Runtime(num_workers=workers)
    assert str(caught.value) == (
        f"num_workers: {workers}; accepted: a whole number, or MIN:MAX such as 2:8 with MIN at least 1 and at most "
        "MAX; correct it"
    )


def test_numbers_of_workers():
    for given, workers in ((0, (0, 0)), (3, (3, 3)), ("3", (3, 3)), ("2:8", (2, 8)), ("4:4", (4, 4))):
        assert Runtime(num_workers=given).workers == workers


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpoint_every_s": -1.0}, "checkpoint_every_s: -1.0; accepted: at least 0 seconds; correct it"),
        ({"checkpoint_every_steps": 0}, "checkpoint_every_steps: 0; accepted: a whole number of at least 1; raise it"),
        ({"grow_after_s": -0.5}, "grow_after_s: -0.5; accepted: at least 0 seconds; correct it"),
        ({"stalled_after_s": 0.0}, "stalled_after_s: 0.0; accepted: more than 0, and at most give_up_after_s, 600; "),
        ({"give_up_after_s": 60.0}, "stalled_after_s: 120.0; accepted: more than 0, and at most give_up_after_s, 60; "),
    ],
)
def test_times_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ConfigError) as caught:
        Runtime(**settings)
    assert str(caught.value).startswith(message)
