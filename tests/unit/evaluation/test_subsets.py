import json
import statistics

import numpy as np
import pytest

from bit_ray.data.shards import read as shards
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.shards.scan import read_labels
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.embedded.digits import DigitsSource
from bit_ray.errors import ConfigError, DataError
from bit_ray.evaluation.subsets import (
    Subset,
    draw_subsets,
    few_shot_subset,
    load_subset,
    save_subset,
    subset_file,
    summarize,
)

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), [30, 40, 50, 60, 70, 30, 40, 50, 60, 70]))


@pytest.mark.parametrize("k", [1, 5, 30])
def test_every_class_has_exactly_k_examples(k):
    chosen = few_shot_subset(LABELS, k, seed=0)
    assert chosen.dtype == np.int64
    assert np.all(np.diff(chosen) > 0)
    np.testing.assert_array_equal(np.bincount(LABELS[chosen], minlength=10), np.full(10, k))


def test_same_seed_same_subset_and_other_seed_another():
    np.testing.assert_array_equal(few_shot_subset(LABELS, 5, seed=3), few_shot_subset(LABELS.tolist(), 5, seed=3))
    draws = {tuple(few_shot_subset(LABELS, 5, seed=seed)) for seed in range(5)}
    assert len(draws) == 5


def test_draw_is_fixed_for_good():
    # PCG64 and SeedSequence never change between NumPy versions, so neither may these.
    labels = np.arange(40) % 4
    assert few_shot_subset(labels, 2, seed=0).tolist() == [2, 8, 12, 17, 18, 29, 35, 39]
    assert few_shot_subset(labels, 2, seed=1).tolist() == [3, 8, 21, 22, 23, 25, 26, 36]


def test_smaller_subset_lies_inside_the_larger_one():
    assert set(few_shot_subset(LABELS, 1, seed=7)) < set(few_shot_subset(LABELS, 5, seed=7))


def test_a_class_is_drawn_independently_of_the_others():
    changed = np.where(LABELS >= 8, 17 - LABELS, LABELS)  # classes 8 and 9 exchanged
    before, after = few_shot_subset(LABELS, 5, seed=0), few_shot_subset(changed, 5, seed=0)
    np.testing.assert_array_equal(before[LABELS[before] < 8], after[changed[after] < 8])


def test_every_example_of_a_class_is_equally_likely():
    labels = np.zeros(20, np.int64)
    counts = sum(np.bincount(few_shot_subset(labels, 5, seed=seed), minlength=20) for seed in range(800))
    # 800 draws of 5 out of 20: mean 200, standard deviation sqrt(800 * 1/4 * 3/4) = 12.2.
    assert np.all(np.abs(counts - 200) < 4.5 * 12.2)


def test_a_class_with_too_few_examples_is_named():
    labels = [0, 0, 1, 2, 2]
    with pytest.raises(DataError, match=r"k: 2; accepted: at most 1, .*class 1 \('ibis'\); lower it"):
        few_shot_subset(labels, 2, seed=0, class_names=("crane", "ibis", "stork"))
    with pytest.raises(DataError, match="class 1; lower it"):
        few_shot_subset(labels, 2, seed=0)


def test_a_class_without_examples_is_named():
    with pytest.raises(DataError, match=r"at most 0, .*class 2 \('stork'\)"):
        few_shot_subset([0, 1], 1, seed=0, class_names=("crane", "ibis", "stork"))


@pytest.mark.parametrize(("labels", "wrong"), [([0, 1, 2], "2"), ([-1, 0, 1], "-1")])
def test_labels_outside_the_classes_are_refused(labels, wrong):
    with pytest.raises(DataError, match=f"labels: {wrong}; accepted: 0 to 1"):
        few_shot_subset(labels, 1, seed=0, class_names=("a", "b"))


@pytest.mark.parametrize("labels", [[], [[0, 1], [1, 0]], [0.0, 1.0]])
def test_labels_of_another_kind_are_refused(labels):
    with pytest.raises(DataError, match="one label per example"):
        few_shot_subset(np.array(labels), 1, seed=0)


def test_k_and_seed_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="k: 0"):
        few_shot_subset(LABELS, 0, seed=0)
    with pytest.raises(ConfigError, match="seed: -1"):
        few_shot_subset(LABELS, 1, seed=-1)


SUBSET = Subset(manifest_digest="a" * 64, k=2, seed=3, ids=("x/1", "x/2", "y/é", "y/4"))


def test_index_file_round_trip(tmp_path):
    save_subset(SUBSET, tmp_path / "subset.json")
    assert load_subset(tmp_path / "subset.json", "a" * 64) == SUBSET
    assert [path.name for path in tmp_path.iterdir()] == ["subset.json"]


def test_index_file_of_another_data_set_is_refused(tmp_path):
    save_subset(SUBSET, tmp_path / "subset.json")
    with pytest.raises(
        DataError, match="drawn from the data set aaaaaaaaaaaa; accepted: one of this set, bbbbbbbbbbbb"
    ):
        load_subset(tmp_path / "subset.json", "b" * 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "format: given 2"),
        ({"ids": ["x/1", "x/1"]}, "ids: 2 entries; accepted: k .2. different ids"),
        ({"ids": ["x/1", "x/2", "y/3"]}, "ids: 3 entries"),
        ({"ids": []}, "ids: 0 entries"),
        ({"ids": [1, 2]}, "ids"),
        ({"ids": "x"}, "ids: given 'x'"),
        ({"k": "2"}, "k: given '2'"),
        ({"k": 0}, "ids: 4 entries; accepted: k .0."),
        ({"seed": None}, "seed: given None"),
    ],
)
def test_damaged_index_file_is_refused(tmp_path, changes, message):
    save_subset(SUBSET, tmp_path / "subset.json")
    data = json.loads((tmp_path / "subset.json").read_text())
    (tmp_path / "subset.json").write_text(json.dumps({**data, **changes}))
    with pytest.raises(DataError, match=message) as caught:
        load_subset(tmp_path / "subset.json", "a" * 64)
    assert "\n" not in str(caught.value)


def test_truncated_or_missing_index_file_is_refused(tmp_path):
    path = tmp_path / "subset.json"
    with pytest.raises(DataError, match=r"subset\.json"):
        load_subset(path, "a" * 64)
    save_subset(SUBSET, path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"subset\.json"):
        load_subset(path, "a" * 64)


def test_summary_has_median_and_spread():
    values = [0.85, 0.91, 0.88, 0.79, 0.90]
    summary = summarize(values)
    assert (summary.median, summary.lowest, summary.highest) == (0.88, 0.79, 0.91)
    assert summary.std == pytest.approx(np.std(values, ddof=1))
    assert summary.values == tuple(values)
    assert summarize([0.5, 0.7]).median == statistics.median([0.5, 0.7])
    assert summarize([0.5]).std == 0.0


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    place = tmp_path_factory.mktemp("digits")
    write_shards("digits:train", place, name="digits", row_group_size=50, shard_examples=250)
    return str(place), read_manifest(place)


def test_a_draw_reads_ids_and_labels_but_no_image(digits, monkeypatch):
    uri, manifest = digits
    asked = []
    read = shards.fetch_columns
    monkeypatch.setattr(shards, "fetch_columns", lambda *args: (asked.append(args[-1]), read(*args))[1])
    ids, labels = read_labels(uri, manifest)
    truth = {e.id: e.labels[0] for e in DigitsSource("train").part(np.arange(997))}
    assert dict(zip(ids, labels.tolist(), strict=True)) == truth
    assert draw_subsets(uri, manifest, (5,), 1).keys() == {(5, 0)}
    assert {tuple(columns) for columns in asked} == {("id", "labels")}


def test_subsets_are_saved_and_taken_from_their_files_from_then_on(digits, tmp_path):
    uri, manifest = digits
    ids, labels = read_labels(uri, manifest)
    drawn = draw_subsets(uri, manifest, (1, 5), 2, saved=tmp_path)
    assert drawn.keys() == {(1, 0), (1, 1), (5, 0), (5, 1)}
    for (k, seed), chosen in drawn.items():
        np.testing.assert_array_equal(chosen, few_shot_subset(labels, k, seed))
        assert json.loads((tmp_path / f"{k}-per-class-seed-{seed}.json").read_text())["ids"] == [ids[i] for i in chosen]

    # Somebody's own choice, in any order, in place of a draw.
    own = [int(np.flatnonzero(labels == c)[7]) for c in reversed(range(10))]
    subset = Subset(manifest_digest=manifest.digest, k=1, seed=0, ids=tuple(ids[i] for i in own))
    save_subset(subset, subset_file(tmp_path, 1, 0))
    for again in ({"saved": tmp_path}, {"given": tmp_path}):
        found = draw_subsets(uri, manifest, (1, 5), 2, **again)
        np.testing.assert_array_equal(found[1, 0], sorted(own))
        np.testing.assert_array_equal(found[5, 1], drawn[5, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": ("digits/train/99999", "nobody", *[f"digits/train/{i:05d}" for i in range(8)])}, "ids: "),
        ({"k": 2, "ids": tuple(f"digits/train/{i:05d}" for i in range(4))}, "k: 2; accepted: 1, as in its name; "),
        (None, "subsets: FILE is missing; accepted: a file for each k and seed; draw it, or leave subsets out"),
    ],
    ids=["absent", "another k", "missing"],
)
def test_index_files_that_do_not_fit_are_one_line(digits, tmp_path, change, message):
    uri, manifest = digits
    file = subset_file(tmp_path, 1, 0)
    if change is not None:
        save_subset(Subset(**{"manifest_digest": manifest.digest, "k": 1, "seed": 0, **change}), file)
    with pytest.raises(DataError) as caught:
        draw_subsets(uri, manifest, (1,), 1, given=tmp_path)
    text = str(caught.value)
    assert text.removeprefix(f"{file}: ").startswith(message.replace("FILE", file))
    assert "\n" not in text
    if "ids" in message:
        assert " more not in the set; " in text


def test_an_index_file_that_is_not_balanced_is_one_line(digits, tmp_path):
    uri, manifest = digits
    ids, labels = read_labels(uri, manifest)
    chosen = few_shot_subset(labels, 1, 0)
    twos = np.flatnonzero(labels == 2)
    chosen[labels[chosen] == 5] = twos[~np.isin(twos, chosen)][0]
    subset = Subset(manifest_digest=manifest.digest, k=1, seed=0, ids=tuple(ids[i] for i in chosen))
    save_subset(subset, subset_file(tmp_path, 1, 0))
    with pytest.raises(
        DataError, match=r": 2 examples of class 2 \('2'\); accepted: 1 of every class; draw the subset again$"
    ):
        draw_subsets(uri, manifest, (1,), 1, given=tmp_path)
