"""What studies and sweeps refuse, each in one line with the field, what was given, and what to do."""

import shlex
from dataclasses import replace

import pytest

from bit_ray.cli.flags import parse
from bit_ray.errors import ConfigError
from bit_ray.recipes.embedded import EMBEDDED_INIT
from bit_ray.recipes.hyperrule import RuleOverrides
from bit_ray.studies import inputs as inputs_module
from bit_ray.studies.catalog import STUDIES, find_study
from bit_ray.studies.compare import compare_hyperrule
from bit_ray.studies.grid import grid_jobs
from bit_ray.studies.inputs import Inputs
from bit_ray.studies.run import run_study
from bit_ray.studies.study_config import CompareConfig, GridConfig, SweepConfig, command, read_settings, swept
from bit_ray.studies.sweep import run_sweep
from bit_ray.tracking.config import TrackingConfig

SPACE = ("rule.base-lr=log:1e-4:1e-1",)
OWN = "accepted: another setting: a study sets this one in each training; leave it out"
SAME = "accepted: another setting: all trials have the same examples; leave it out"
SHORT = ("recipe.warmup-steps=1",)


def grid(**changes):
    return GridConfig(**{"study": "recipe"} | changes)


def sweep(**changes):
    return SweepConfig(**{"command": "finetune", "name": "a", "space": SPACE} | changes)


def compare(**changes):
    return CompareConfig(**changes)


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (grid, {"side_by_side": -1}, "side_by_side: -1; accepted: 0 (as many as fit) or more; raise it"),
        (grid, {"price": -0.5}, "price: -0.5; accepted: 0 or more; correct it"),
        (sweep, {"price": float("nan")}, "price: nan; accepted: 0 or more; correct it"),
        (compare, {"price": float("inf")}, "price: inf; accepted: 0 or more; correct it"),
        (grid, {"seeds": -1}, "seeds: -1; accepted: 0 (the study's) or more; raise it"),
        (grid, {"name": "a/b"}, "name: given 'a/b'; accepted: text that can name a folder"),
        (grid, {"set": ("recipe.epochs",)}, "set: 'recipe.epochs'; accepted: SETTING=VALUE, such as recipe.epochs"),
        (grid, {"set": ("=90",)}, "set: '=90'; accepted: SETTING=VALUE"),
        (grid, {"set": ("a=1", "a=2")}, "set: a is given twice; accepted: each setting once; remove one"),
        (grid, {"set": ("a={b: 1}",)}, "set: '{b: 1}'; accepted: values between commas"),
        (grid, {"set": ("seed=3",)}, f"set: seed; {OWN}"),
        (grid, {"set": ("tracking.uri=http://x",)}, f"set: tracking.uri; {OWN}"),
        (grid, {"axes": ("seed=1,2",)}, f"axes: seed; {OWN}"),
        (grid, {"axes": ("a",)}, "axes: 'a'; accepted: SETTING=VALUES with log:LOW:HIGH"),
        (grid, {"axes": ("a=1,2", "a=3,4")}, "axes: a is given twice; accepted: each setting once; remove one"),
        (sweep, {"name": ""}, "name: given ''; accepted: text that can name a folder"),
        (sweep, {"space": ()}, "space: empty; accepted: at least one setting, such as rule.base-lr=log:1e-4:1e-1"),
        (sweep, {"space": ("rule.base-lr=log:0:1",)}, "space: rule.base_lr from 0 to 1; accepted: above 0 on"),
        (sweep, {"space": ("shards=a,b",)}, f"space: shards; {SAME}"),
        (sweep, {"space": ("subset-seed=1,2",)}, f"space: subset_seed; {SAME}"),
        (sweep, {"space": ("seed=1,2",)}, f"space: seed; {OWN}"),
        (sweep, {"set": ("test_shards=a",)}, f"set: test_shards; {OWN}"),
        (sweep, {"trials": 0}, "trials: 0; accepted: at least 1; the paper has 40"),
        (sweep, {"search_seed": -1}, "search_seed: -1; accepted: 0 or more; raise it"),
        (sweep, {"val_share": 0.0}, "val_share: 0.0; accepted: above 0, at most 0.5; the paper has 0.2"),
        (sweep, {"val_share": 0.6}, "val_share: 0.6; accepted: above 0, at most 0.5; the paper has 0.2"),
        (sweep, {"val_share": float("nan")}, "val_share: nan; accepted: above 0, at most 0.5; the paper has 0.2"),
        (sweep, {"fewer": "always", "search": "tpe"},
         "fewer: always, but the trials of search tpe are not independent; accepted: always with search random"),
        (sweep, {"fewer": "always", "stop_early": True}, "fewer: always, but stop_early ends trials before they can"),
        (sweep, {"where": "cluster", "stop_early": True}, "stop_early: on with where cluster; accepted: on with where"),
        (compare, {"seeds": 1}, "seeds: 1; accepted: at least 2 for an interval, better 5; raise it"),
        (compare, {"val_share": 1.0}, "val_share: 1.0; accepted: above 0, at most 0.5"),
        (compare, {"where": "cluster"}, "where: cluster; accepted: memory, because the sweep learns from a part "),
        (compare, {"search": "tpe"}, "search: tpe; accepted: random or sobol, because all trials are known before "),
        (compare, {"search": "gp"}, "search: gp; accepted: random or sobol"),
        (compare, {"tasks": ("a,b",)}, "init: empty, but tasks are given; accepted: weights to transfer; name them"),
        (compare, {"tasks": ("a",), "init": "x"}, "tasks: 'a'; accepted: TRAIN_SHARDS,TEST_SHARDS or TRAIN"),
        (compare, {"tasks": ("a,b,c",), "init": "x"}, "tasks: 'a,b,c'; accepted: TRAIN_SHARDS,TEST_SHARDS or"),
        (compare, {"tasks": ("a,,5",), "init": "x"}, "tasks: 'a,,5'; accepted: TRAIN_SHARDS,TEST_SHARDS or"),
        (compare, {"tasks": ("a,b,5,6",), "init": "x"}, "tasks: 'a,b,5,6'; accepted: TRAIN_SHARDS,TEST_SHARDS or"),
        (compare, {"tasks": ("a,b,-5",), "init": "x"}, "tasks: 'a,b,-5'; accepted: TRAIN_SHARDS,TEST_SHARDS or"),
        (compare, {"space": ("shots=1,2",)}, f"space: shots; {SAME}"),
    ],
)  # fmt: skip
def test_a_bad_setting_is_refused_in_one_line(make, changes, message):
    with pytest.raises(ConfigError) as caught:
        make(**changes)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert str(caught.value).count("; ") >= 2


def jobs(storage, init, study="recipe", **changes):
    settings = {"study": study, "seeds": 1, "storage": storage} | changes
    if study == "recipe":
        settings["set"] = (f"init={init}", *changes.get("set", ()))
    return grid_jobs(STUDIES[study], GridConfig(**settings), Inputs(storage, TrackingConfig()))


@pytest.mark.parametrize(
    ("study", "changes", "message"),
    [
        (
            "recipe",
            {"set": ("rule.base-lt=0.1",)},
            r"^set: rule\.base_lt: unknown setting; .*did you mean rule\.base_lr\?$",
        ),
        (
            "recipe",
            {"axes": ("rule.bacth-size=8,16",)},
            r"^axes: rule\.bacth_size: unknown .* mean rule\.batch_size\?$",
        ),
        (
            "schedule",
            {"axes": ("recipe.wieght-decay=0,1",)},
            r"^axes: recipe\.wieght_decay: unknown .*\.weight_decay\?$",
        ),
        ("recipe", {"set": ("rule.batch-size=many",)}, r"^set: rule\.batch_size: given 'many' \(str\); accepted: "),
        ("recipe", {"axes": ("rule.dropout=0.1,a",)}, r"^axes: rule\.dropout: given 'a' \(str\); accepted: "),
        (
            "recipe",
            {"axes": ("rule.dropout=uniform:0:1",)},
            r"^axes: rule\.dropout is a range; accepted: values between commas",
        ),
        (
            "schedule",
            {"axes": ("length=a,b",)},
            "^axes: length 'a'; accepted: times the images of the base, above 0; correct it$",
        ),
        ("schedule", {"axes": ("length=0",)}, "^axes: length 0; accepted: times the images of the base"),
        ("schedule", {"axes": ("decays=late",)}, "^axes: decays 'late'; accepted: usual or early; choose one$"),
        ("schedule", {"axes": ("shards=5",)}, r"^axes: shards: given 5 \(int\); accepted: text$"),
        (
            "normalisers",
            {"axes": ("normaliser=bn,gn",)},
            "^axes: normaliser 'bn'; accepted: gn, gn-nows, bn-IMAGES or bn",
        ),
        (
            "normalisers",
            {"axes": ("normaliser=gn-8",)},
            "^axes: normaliser 'gn-8'; accepted: gn, gn-nows, bn-IMAGES or bn",
        ),
        (
            "normalisers",
            {"axes": ("normaliser=bn-7",), "set": SHORT},
            "^norm_batch: 7; accepted: at least 2, and a divisor of the batch size",
        ),
        ("recipe", {"val_shards": "glyphs:s:val"}, "^val_shards: .*glyphs-s-val has 50 classes that are not those of"),
        ("recipe", {"set": ("train=nothing",)}, "^set: train: 'nothing'; accepted: all, head"),
        (
            "recipe",
            {"set": ("model=R50x1",)},
            "^model: R50x1, but the weights in .* are of R1-1-1-1x0.5; leave it out$",
        ),
    ],
)
def test_what_a_study_cannot_train_is_refused_with_the_nearest_name(storage, init, study, changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        jobs(storage, init, study, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("run", "config", "message"),
    [
        (run_study, grid(where="cluster"), "^where: cluster, but the training is on a part of /.*/digits-train; "),
        (
            run_study,
            grid(where="cluster", axes=("shots=0",)),
            "^runtime.num_workers: 0, with where cluster; accepted: the number of workers of one training; ",
        ),
        (
            run_sweep,
            sweep(set=("shards=digits:train", f"init={EMBEDDED_INIT}"), trials=2, where="cluster"),
            "^where: cluster, but the training is on a part of /.*/digits-train; ",
        ),
        (
            compare_hyperrule,
            compare(space=("rule.warmup-steps=1000",)),
            "^warmup_steps: 1000; accepted: 0 to 99 in a run of 100 steps; ",
        ),
    ],
)
def test_nothing_is_pre_trained_for_what_is_refused(run, config, message, storage, monkeypatch):
    monkeypatch.setattr(inputs_module, "pretrain", lambda config: pytest.fail("it was pre-trained"))
    with pytest.raises(ConfigError, match=message):
        run(replace(config, storage=storage))


def test_a_set_of_ones_own_needs_a_set_to_measure_on(storage, init):
    own = (*SHORT, f"shards={storage}/shards/glyphs-s")
    with pytest.raises(
        ConfigError, match="^val_shards: empty, but shards is /.*/glyphs-s; accepted: a set with its classes; name"
    ):
        jobs(storage, init, "weight-decay", set=own)
    assert len(jobs(storage, init, "weight-decay", set=own, val_shards=f"{storage}/shards/glyphs-s-val")) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "set: without shards; accepted: the shard set to train on, --set shards=...; add it"),
        ({"set": ("shards=x",)}, "set: without init and model; accepted: weights to start from, --set init=..., or"),
        ({"set": ("shards=x", "rule.base-lt=1")}, "set: rule.base_lt: unknown setting; accepted: "),
        ({"set": ("shards=x",), "command": "pretrain", "space": ("recipe.epochs=1,2",)}, None),
        ({"set": ("shards=x", "model=R50x1", "rule.num-steps=1e3")}, "set: rule.num_steps: given 1000.0 (float);"),
    ],
)
def test_a_sweep_needs_a_set_and_weights(changes, message):
    if message is None:
        assert swept(sweep(**changes)).shards == "x"
        return
    with pytest.raises(ConfigError) as caught:
        swept(sweep(**changes))
    assert str(caught.value).startswith(message)


def test_settings_are_read_with_their_types():
    texts = ("a.b-c=90", "d=1e-4", "e=[30,60]", "f=s3://a/b,c", "g=true", "h=", "i=x=y", " j = null")
    assert read_settings("set", texts) == {
        "a.b_c": 90, "d": 1e-4, "e": [30, 60], "f": "s3://a/b,c", "g": True, "h": "", "i": "x=y", "j": None,
    }  # fmt: skip


def test_an_unknown_study_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="^study: recipes; accepted: weight-decay, .*; did you mean recipe\\?$"):
        find_study("recipes")
    with pytest.raises(ConfigError, match="^study: x; accepted: .*; choose one$"):
        find_study("x")


@pytest.mark.parametrize(
    ("verb", "config"),
    [
        ("study run", grid(name="a b", set=("shards=x", "recipe.decay-epochs=[1,2]"), axes=("shots=5,50",), seeds=2)),
        ("sweep", sweep(price=1.5, val_share=0.1, search="tpe", set=("shards=a", "init=b"), storage="s3://c/d e")),
        (
            "study compare",
            compare(
                init="x", tasks=("a,b,5", "c,d"), profile="paper", random_crop=False,
                rule=RuleOverrides(base_lr=0.01, boundaries=(1, 2), decay_to_init=True, weight_decay=0.1),
                tracking=TrackingConfig(uri="http://host:5000"),
            ),
        ),
    ],
)  # fmt: skip
def test_the_command_of_a_study_gives_its_settings_again(verb, config):
    words = shlex.split(command(verb, config))
    start = ["bit-ray", *verb.split()]
    assert words[: len(start)] == start
    assert parse(type(config), words[len(start) :], prog="bit-ray") == config
