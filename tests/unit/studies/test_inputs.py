"""Sets, draws from them and weights, as studies read them."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.base import Example
from bit_ray.data.sources.embedded.digits import DigitsSource
from bit_ray.errors import ConfigError, DataError
from bit_ray.recipes.embedded import EMBEDDED_INIT
from bit_ray.recipes.hyperrule import RuleOverrides
from bit_ray.recipes.upstream import UpstreamRecipe
from bit_ray.studies import inputs as module
from bit_ray.studies.cells import Part
from bit_ray.studies.inputs import Inputs
from bit_ray.tracking.config import TrackingConfig
from bit_ray.training.config import FinetuneConfig, PretrainConfig
from bit_ray.training.initial_weights import InitialWeights

# Examples of each digit.
COUNTS = (2, 3, 4, 5, 7, 11, 16, 23, 25, 30)
MODEL = "R1-1-1-1x0.5"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Digits in very different numbers."""
    source, left, examples = DigitsSource("test"), list(COUNTS), []
    for example in source.part(np.arange(len(source))):
        [label] = example.labels
        if left[label]:
            left[label] -= 1
            examples.append(example)
    folder = tmp_path_factory.mktemp("sets") / "digits"
    write_shards(iter(examples), folder, name="digits", class_names=source.class_names, row_group_size=16)
    return str(folder)


@pytest.fixture
def inputs(tmp_path):
    return Inputs(str(tmp_path / "runs"), TrackingConfig())


def rows(part):
    return list(part.rows)


def counts(inputs, part):
    return Counter(inputs.labels(part)[rows(part)].tolist())


@pytest.mark.parametrize("share", [0.01, 0.1, 0.2, 1 / 3, 0.5])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_split_holds_out_the_same_share_of_each_class(inputs, shards, share, seed):
    whole = inputs.part(shards)
    fit, val = inputs.split(whole, share, seed)
    assert sorted(rows(fit) + rows(val)) == list(range(sum(COUNTS)))
    for part in (fit, val):
        assert rows(part) == sorted(rows(part))
        assert (part.shards, part.digest) == (whole.shards, whole.digest)
    learnt, held = counts(inputs, fit), counts(inputs, val)
    for label, count in enumerate(COUNTS):
        assert learnt[label] >= 1
        assert held[label] == max(1, round(share * count))
        assert abs(held[label] - share * count) <= 1


def test_a_split_is_decided_by_its_seed(inputs, shards, tmp_path):
    whole = inputs.part(shards)
    again = Inputs(str(tmp_path / "other"), TrackingConfig())
    assert again.split(again.part(shards), 0.2, 0) == inputs.split(whole, 0.2, 0)
    assert inputs.split(whole, 0.2, 1) != inputs.split(whole, 0.2, 0)
    # A larger share holds out what a smaller one does, and more.
    assert set(rows(inputs.split(whole, 0.1, 0)[1])) < set(rows(inputs.split(whole, 0.4, 0)[1]))


def test_a_part_of_a_set_is_split_within_itself(inputs, shards):
    drawn = inputs.draw(inputs.part(shards), 2, 3)
    fit, val = inputs.split(drawn, 0.2, 0)
    assert sorted(rows(fit) + rows(val)) == rows(drawn)
    assert counts(inputs, fit) == counts(inputs, val) == dict.fromkeys(range(10), 1)
    without_a_class = replace(drawn, rows=tuple(r for r in rows(drawn) if inputs.labels(drawn)[r] != 4))
    assert 4 not in counts(inputs, inputs.split(without_a_class, 0.2, 0)[1])


def test_a_class_of_one_example_cannot_be_split(inputs, shards):
    whole = inputs.part(shards)
    [first, *_] = np.flatnonzero(inputs.labels(whole) == 7)
    part = replace(whole, rows=tuple(np.flatnonzero(inputs.labels(whole) != 7).tolist()) + (int(first),))
    part = replace(part, rows=tuple(sorted(rows(part))))
    with pytest.raises(ConfigError) as caught:
        inputs.split(part, 0.2, 0)
    assert str(caught.value) == (
        f"val_share: class '7' of {whole.shards} has one example, so none can be held out to select on; accepted: at "
        "least 2 of each class; add examples, or name a set by val_shards"
    )


def test_halves_are_two_random_parts_of_all(inputs, shards):
    whole = inputs.part(shards)
    _, val = inputs.split(whole, 0.3, 0)
    for part, everything in ((whole, range(sum(COUNTS))), (val, rows(val))):
        first, second = inputs.halves(part, 0)
        assert sorted(rows(first) + rows(second)) == list(everything)
        assert len(rows(second)) - len(rows(first)) in (0, 1)
        assert rows(first) == sorted(rows(first))
        assert rows(first) != list(everything)[: len(rows(first))]
        assert inputs.halves(part, 0) == (first, second)
        assert inputs.halves(part, 1) != (first, second)
    with pytest.raises(
        ConfigError, match=r"^val_shards: .* has 1 example; accepted: at least 2 to select on; add examples$"
    ):
        inputs.halves(replace(whole, rows=(5,)), 0)


def test_a_draw_has_so_many_of_each_class(inputs, shards):
    drawn = inputs.draw(inputs.part(shards), 2, 0)
    assert counts(inputs, drawn) == dict.fromkeys(range(10), 2)
    with pytest.raises(DataError, match=r"^shots: 3; accepted: at most 2, the number of examples of class 0 \('0'\); "):
        inputs.draw(inputs.part(shards), 3, 0)


def test_embedded_data_are_written_into_the_storage_once(inputs, tmp_path, shards):
    part = inputs.part("digits:test")
    assert part.shards == str(tmp_path / "runs" / "shards" / "digits-test")
    assert inputs.num_examples("digits:test") == 800
    manifest = tmp_path / "runs" / "shards" / "digits-test" / "manifest.json"
    before = manifest.stat().st_mtime_ns
    assert Inputs(str(tmp_path / "runs"), TrackingConfig()).part("digits:test") == part
    assert manifest.stat().st_mtime_ns == before
    inputs.check_classes(inputs.part(shards), part, "val_shards")
    with pytest.raises(DataError, match=r"^digits:tset: no such embedded data set; .*did you mean digits:test\?$"):
        inputs.part("digits:tset")


def test_a_set_of_other_classes_or_of_several_labels_is_refused(inputs, shards, tmp_path):
    source = DigitsSource("test")
    images = [example.image for example in source.part(np.arange(2))]
    write_shards(iter([Example("a", images[0], (0,))]), tmp_path / "one", name="one", class_names=("0",))
    two = [Example("a", images[0], (0, 1)), Example("b", images[1], (1,))]
    write_shards(iter(two), tmp_path / "two", name="two", class_names=("0", "1"), multi_label=True)
    with pytest.raises(
        ConfigError, match=r"^val_shards: .*/one has 1 classes that are not those of the training shards"
    ):
        inputs.check_classes(inputs.part(shards), inputs.part(str(tmp_path / "one")), "val_shards")
    with pytest.raises(ConfigError, match=r"^shards: .*/two has several labels per image; "):
        inputs.part(str(tmp_path / "two"))
    with pytest.raises(DataError, match="none: no such path"):
        inputs.part(str(tmp_path / "none"))


def test_the_plan_of_a_training_counts_the_examples_it_has(inputs, shards):
    recipe = UpstreamRecipe(
        name="r", epochs=2, decay_epochs=(1,), global_batch_size=9, warmup_steps=0, crop_size=32, random_flip=False
    )
    config = PretrainConfig(name="a", shards=shards, model=MODEL, recipe=recipe)
    plan, part = inputs.training(config)
    assert (part, plan.num_examples, plan.schedule.num_steps) == (inputs.part(shards), 126, 28)
    plan, part = inputs.training(config, [1, 5, 9, 12])
    assert (part.rows, plan.num_examples, plan.schedule.num_steps) == ((1, 5, 9, 12), 4, 1)


def test_a_transfer_has_its_weights_and_its_draw(inputs, shards, init):
    rule = RuleOverrides(resize=36, crop=32, num_steps=5, batch_size=8)
    config = FinetuneConfig(name="a", shards=shards, init=init, rule=rule, shots=2, subset_seed=3)
    plan, part = inputs.training(config)
    assert part == inputs.draw(inputs.part(shards), 2, 3)
    assert (plan.model, plan.num_examples, plan.num_classes) == (MODEL, 20, 10)
    assert set(inputs.tensors()) == {plan.init_digest}
    assert "root.weight" in inputs.tensors()[plan.init_digest]
    plan, part = inputs.training(config, [1, 2, 3])
    assert (part.rows, plan.num_examples) == ((1, 2, 3), 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "R50x1"}, r"^model: R50x1, but .* R1-1-1-1x0.5; leave it out$"),
        ({"init": ""}, "^init: empty, and model is empty"),
        ({"init": "", "model": MODEL, "train": "head"}, "^train: head, but init is empty"),
    ],
)
def test_weights_that_do_not_fit_are_refused_as_by_finetune(inputs, shards, init, changes, message):
    with pytest.raises(ConfigError, match=message):
        inputs.training(replace(FinetuneConfig(name="a", shards=shards, init=init), **changes))


def test_the_embedded_network_is_trained_only_on_demand_and_completed_where_it_is(tmp_path, monkeypatch):
    made = []
    weights = InitialWeights("R50x1", {}, "1" * 64, EMBEDDED_INIT)
    monkeypatch.setattr(module, "pretrain", made.append)
    monkeypatch.setattr(module, "read_init", lambda uri, tracking_uri: weights)
    monkeypatch.setattr(Inputs, "part", lambda self, name: Part(name, ""))
    new = Inputs(str(tmp_path), TrackingConfig())
    assert new.init(EMBEDDED_INIT).digest == "0" * 64
    assert (made, new.before) == ([], "before them glyphs-m is pre-trained, as in the main job")
    assert new.tensors() == {}
    assert [new.pretrained(), new.pretrained()] == [True, False]
    assert new.init(EMBEDDED_INIT) is weights
    assert [config.name for config in made] == ["glyphs-m"]
    # Its result may be there without a registered version: pretrain finds out what is left.
    (tmp_path / "glyphs-m").mkdir()
    (tmp_path / "glyphs-m" / "result.json").write_text("{}")
    other = Inputs(str(tmp_path), TrackingConfig())
    assert other.init(EMBEDDED_INIT) is weights
    assert (other.before, len(made)) == ("", 2)
