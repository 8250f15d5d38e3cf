from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from forked import run_ranks
from small_training import BATCH, EVEN, MODEL, pretrain_plan, train_shares

from bit_ray.errors import ConfigError
from bit_ray.training.config import Runtime
from bit_ray.training.shares import micro_batch, share_out, worker_slots


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize(("batch", "workers"), [(64, 1), (64, 3), (64, 5), (4096, 3), (10, 5), (512, 7)])
def test_shares_are_consecutive_as_equal_as_can_be_and_keep_pairs(batch, workers, pairs):
    shares = worker_slots(batch, workers, pairs=pairs)
    assert [slot for share in shares for slot in share] == list(range(batch))
    unit = 2 if pairs else 1
    assert all(share.start % unit == 0 for share in shares)
    sizes = [len(share) for share in shares]
    assert min(sizes) > 0
    assert max(sizes) - min(sizes) <= unit


@pytest.mark.parametrize(
    ("batch", "workers", "pairs", "message"),
    [
        (
            2,
            3,
            False,
            "runtime.num_workers: 3; accepted: at most 2, the images in a global batch; lower it, or raise the ",
        ),
        (
            4,
            3,
            True,
            "runtime.num_workers: 3; accepted: at most 2, the pairs of images that MixUp mixes in a global ",
        ),
    ],
)
def test_more_workers_than_shares_are_refused(batch, workers, pairs, message):
    with pytest.raises(ConfigError) as caught:
        worker_slots(batch, workers, pairs=pairs)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("share", "asked", "pairs", "expected"),
    [
        (32, 0, False, 32),
        (32, 8, False, 8),
        (32, 7, False, 7),
        (32, 100, False, 32),
        (22, 0, True, 22),
        (22, 4, True, 4),
    ],
)
def test_a_micro_batch_is_what_was_asked_for_and_at_most_the_share(share, asked, pairs, expected):
    assert micro_batch(share, asked, pairs=pairs) == expected


def test_an_odd_micro_batch_would_cut_mixups_pairs():
    with pytest.raises(ConfigError, match="^micro_batch_size: 9; accepted: an even number, because MixUp mixes pairs"):
        micro_batch(18, 9, pairs=True)


def test_the_plan_and_the_runtime_are_shared_out():
    shares, micro = share_out(pretrain_plan(mixup_alpha=0.1), Runtime(micro_batch_size=2), 3)
    assert (shares, micro) == ([range(0, 2), range(2, 4), range(4, 8)], 2)
    assert BATCH == 8


def test_any_number_of_workers_trains_as_one_does(tmp_path):
    plain = pretrain_plan(global_batch_size=EVEN, num_examples=640)
    plans = [
        plain,
        replace(plain, mixup_alpha=0.1),
        replace(plain, dropout=0.5, decay_to_init=True, weight_decay=1e-2, clip_norm=1.0),
        replace(plain, model=f"{MODEL}-bn-nows", norm_batch=16, mixup_alpha=0.1),
        replace(plain, model=f"{MODEL}-syncbn"),
    ]
    several = [(3, 8, 0), (2, 0, 1), (3, 4, 1), (5, 0, 1), (3, 7, 2), (3, 0, 3), (2, 16, 3), (3, 0, 4)]
    # In shards: with an uneven number of passes (21 or 22 images, 7 at a time), and rows of the head that do not reach.
    several += [(2, 0, 1, True), (3, 7, 2, True), (5, 4, 1, True)]
    cases = [(plan, 1, 0) for plan in plans] + [(plans[i], n, micro, *shards) for n, micro, i, *shards in several]
    run_ranks(train_shares, (cases, tmp_path), 5)
    results = [torch.load(tmp_path / f"{number}.pt") for number in range(len(cases))]
    for one, other in pairwise(losses for losses, _ in results[: len(plans)]):
        assert one[2] != pytest.approx(other[2], rel=1e-3)  # each of them does something
    for (_, _, i, *_), (losses, weights) in zip(several, results[len(plans) :], strict=True):
        expected, expected_weights = results[i]
        for loss, one in zip(losses, expected, strict=True):
            assert loss == pytest.approx(one, rel=1e-5)
        for name, tensor in expected_weights.items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("suffix", "changes", "num_workers", "micro", "message"),
    [
        ("-bn", {"norm_batch": 4}, 3, 0, "runtime.num_workers: 3; accepted: at most 2, the groups of 4 images over "),
        ("-bn", {"norm_batch": 4}, 1, 2, "micro_batch_size: 2, but R1-1-1-1x0.5-bn computes its statistics over 4 "),
        ("-syncbn", {}, 1, 4, "micro_batch_size: 4, but R1-1-1-1x0.5-syncbn computes its statistics over 8 images"),
    ],
)  # fmt: skip
def test_how_a_batch_is_cut_may_not_change_what_batch_norm_learns(suffix, changes, num_workers, micro, message):
    with pytest.raises(ConfigError) as caught:
        share_out(pretrain_plan(model=MODEL + suffix, **changes), Runtime(micro_batch_size=micro), num_workers)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": f"{MODEL}-bn"},
            f"model: {MODEL}-bn, but runtime.sharding is fsdp; accepted: a network with GroupNo",
        ),
        ({"train": "head"}, "train: head, but runtime.sharding is fsdp; accepted: all; change one of them"),
    ],
)
def test_what_cannot_be_trained_in_shards_is_refused(changes, message):
    with pytest.raises(ConfigError) as caught:
        share_out(pretrain_plan(**changes), Runtime(sharding="fsdp"), 2)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_network_in_shards_is_not_compiled():
    with pytest.raises(ConfigError, match="^sharding: fsdp, but runtime.compile is on; accepted: none with"):
        Runtime(sharding="fsdp", compile=True)


def test_shares_of_batch_norm_are_whole_groups():
    plan = pretrain_plan(model=f"{MODEL}-bn", norm_batch=2)
    assert share_out(plan, Runtime(), 3) == ([range(0, 2), range(2, 4), range(4, 8)], 2)
