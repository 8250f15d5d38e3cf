"""The studies at the size of a test: every training can be planned, under a name of its own."""

import re
from collections import Counter

import pytest

from bit_ray.errors import ConfigError
from bit_ray.recipes.upstream import UpstreamRecipe
from bit_ray.studies.catalog import STUDIES
from bit_ray.studies.grid import grid_jobs, key_of
from bit_ray.studies.inputs import Inputs
from bit_ray.studies.study_config import GridConfig
from bit_ray.tracking.config import TrackingConfig
from bit_ray.training.checks import check_settings
from bit_ray.training.config import PretrainConfig, Runtime

# The sets of the tests have a tenth of the images, or less.
SHORT = ("recipe.warmup-steps=1",)
COUNTS = {"weight-decay": 8, "schedule": 12, "normalisers": 6, "size-data": 4, "recipe": 16}


def jobs(storage, init, name, seeds=2, **changes):
    short = (f"init={init}",) if name == "recipe" else SHORT
    config = GridConfig(study=name, seeds=seeds, storage=storage, **{"set": short} | changes)
    return grid_jobs(STUDIES[name], config, Inputs(storage, TrackingConfig()))


@pytest.mark.parametrize("name", STUDIES)
def test_every_training_of_a_study_can_be_planned(storage, init, name):
    made = jobs(storage, init, name)
    assert len(made) == 2 * COUNTS[name]
    keys = [job.key for job in made]
    assert len(set(keys)) == len(keys)
    assert all(re.fullmatch(r"[A-Za-z0-9._+-]{1,150}", key) for key in keys)
    identities = Counter(job.cell.identity for job in made)
    assert set(identities.values()) == {1}  # nothing is trained twice
    for job in made:
        check_settings(job.cell.plan, Runtime())
        assert job.cell.plan.seed == job.params["seed"]
        assert set(job.params) == {*STUDIES[name].axes, "seed"}
        assert set(job.cell.parts) == {"val"}
        assert job.cell.parts["val"].shards != job.cell.train.shards
        assert job.cell.test is None
        assert all(0 < step < job.cell.plan.schedule.num_steps for step in job.cell.at_steps)
    if name == "recipe":  # what it measures on are test images: once, at the end
        assert all(job.cell.at_steps == () for job in made)
    probes = {job.cell.probe for job in made}
    assert (probes == {None}) == (STUDIES[name].probe is None)


@pytest.mark.parametrize("name", [name for name, study in STUDIES.items() if isinstance(study.base, PretrainConfig)])
def test_no_rate_falls_before_its_warm_up_ends(name):
    recipe = STUDIES[name].base.recipe
    assert isinstance(recipe, UpstreamRecipe)
    schedule = recipe.schedule(3000)  # the images of glyphs:s
    assert schedule.warmup_steps < schedule.boundaries[0] < schedule.boundaries[-1] < schedule.num_steps


def plan_of(made, **params):
    [job] = [job for job in made if job.params == {**params, "seed": 0}]
    return job.cell.plan


def test_schedules_of_one_length_have_as_many_images_on_every_set(storage, init):
    made = jobs(
        storage, init, "schedule", 1, set=("recipe.warmup-steps=1", "recipe.epochs=16", "recipe.decay-epochs=[8,12]")
    )
    for length in (1, 3, 10):
        for shards in ("glyphs:s", "glyphs:m"):
            usual = plan_of(made, length=length, shards=shards, decays="usual").schedule
            early = plan_of(made, length=length, shards=shards, decays="early").schedule
            assert usual.num_steps == early.num_steps == 100 * length  # 16 x 200 images in batches of 32
            assert usual.boundaries == (50 * length, 75 * length)
            assert early.boundaries == (30 * length, 50 * length)


def test_a_normaliser_is_a_network_and_its_statistics(storage, init):
    made = jobs(storage, init, "normalisers", 1)
    found = {job.params["normaliser"]: (job.cell.plan.model, job.cell.plan.batch_of_statistics) for job in made}
    assert found == {
        "gn": ("R1-1-1-1x0.5", 0),
        "gn-nows": ("R1-1-1-1x0.5-nows", 0),
        "bn-32": ("R1-1-1-1x0.5-bn", 32),
        "bn-nows-32": ("R1-1-1-1x0.5-bn-nows", 32),
        "bn-8": ("R1-1-1-1x0.5-bn", 8),
        "bn-nows-8": ("R1-1-1-1x0.5-bn-nows", 8),
    }
    made = jobs(storage, init, "normalisers", 1, set=(*SHORT, "model=R1-1-1-1x1"), axes=("normaliser=gn,bn-16",))
    assert [(job.cell.plan.model, job.cell.plan.batch_of_statistics) for job in made] == [
        ("R1-1-1-1x1", 0), ("R1-1-1-1x1-bn", 16)
    ]  # fmt: skip


def test_axes_of_ones_own_replace_those_of_the_study_or_come_beside_them(storage, init):
    axes = ("length=1", "shards=glyphs:s,glyphs:m", "decays=usual", "recipe.weight-decay=0,1e-3", "model=R1-1-1-1x0.5")
    made = jobs(storage, init, "schedule", 1, axes=axes)
    assert [(job.cell.plan.weight_decay, job.params["shards"]) for job in made] == [
        (0.0, "glyphs:s"), (1e-3, "glyphs:s"), (0.0, "glyphs:m"), (1e-3, "glyphs:m"),
    ]  # fmt: skip
    assert made[1].params == {
        "length": 1, "shards": "glyphs:s", "decays": "usual", "recipe.weight_decay": 1e-3, "model": "R1-1-1-1x0.5",
        "seed": 0,
    }  # fmt: skip
    assert len({job.key for job in made}) == 4


def test_the_base_counts_where_an_axis_does_not(storage, init):
    made = jobs(storage, init, "recipe", 1, set=(f"init={init}", "rule.base-lr=0.5", "rule.num-steps=7"))
    assert {(job.cell.plan.schedule.base_lr, job.cell.plan.schedule.num_steps) for job in made} == {(0.5, 7)}
    assert {(job.cell.plan.num_examples, job.params["shots"]) for job in made} == {(50, 5), (500, 50)}


def test_values_that_read_alike_have_keys_of_their_own(storage, init):
    close = ("rule.weight-decay=0.001,0.00100000001", "rule.dropout=0.1", "rule.mixup-alpha=0.1", "shots=5")
    made = jobs(storage, init, "recipe", 2, axes=close)
    keys = [job.key for job in made]
    assert len(set(keys)) == len(keys) == 4
    # More seeds join what was begun.
    assert set(keys) < {job.key for job in jobs(storage, init, "recipe", 3, axes=close)}


@pytest.mark.parametrize(
    ("point", "key"),
    [
        ({"recipe.weight_decay": 1e-4, "shots": 5}, "weight_decay-0.0001-shots-5"),
        ({"shards": "s3://bucket/a b", "flip": True}, "shards-s3---bucket-a-b-flip-True"),
        ({"sizes": [30, 60]}, "sizes-30--60"),
        ({"shards": "ü/" * 100 + "x" * 60}, "shards-" + "x" * 40),
    ],
)
def test_a_key_can_name_a_file(point, key):
    assert key_of(point) == key


def test_what_a_study_measures_on_is_named_by_the_training_set(storage, init):
    made = jobs(storage, init, "size-data", 1)
    for job in made:
        assert job.cell.parts["val"].shards.endswith(job.params["shards"].replace(":", "-") + "-val")
    made = jobs(storage, init, "size-data", 1, axes=("shards=glyphs:s",), val_shards="glyphs:s")
    assert {job.cell.parts["val"].shards for job in made} == {made[0].cell.train.shards}
    with pytest.raises(ConfigError, match="^val_shards: "):
        jobs(storage, init, "size-data", 1, val_shards="glyphs:s:val")  # not the classes of glyphs:m
