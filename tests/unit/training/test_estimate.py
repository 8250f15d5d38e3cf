import re
import statistics
import time
from dataclasses import replace

import pytest
import torch

from bit_ray.data.images.views import TrainView
from bit_ray.recipes.schedules import Schedule
from bit_ray.training import estimate
from bit_ray.training.device import peak_flops, to_channels_last
from bit_ray.training.estimate import measure_speed, multiply_adds, training_flops
from bit_ray.training.goodput import as_duration
from bit_ray.training.optimizer import build_optimizer
from bit_ray.training.parts import set_trainable
from bit_ray.training.plan import TrainPlan
from bit_ray.training.step import TrainStep


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(estimate, "_SECONDS", 0.4)


def make_plan(**changes):
    settings = {
        "kind": "finetune",
        "model": "R1-1-1-1x0.5",
        "num_classes": 10,
        "manifest_digest": "",
        "num_examples": 640,
        "view": TrainView(crop="resize", crop_size=64),
        "resize_mode": "square",
        "resize_size": 64,
        "loss": "softmax",
        "schedule": Schedule(base_lr=0.003, num_steps=10),
        "global_batch_size": 64,
    }
    return TrainPlan(**settings | changes)


@pytest.mark.parametrize(
    ("model", "crop", "giga"),
    [("R26x1", 224, 2.34), ("R50x1", 224, 4.09), ("R101x1", 224, 7.80), ("R50x1", 480, 18.8), ("R152x4", 224, 182.78)],
)
def test_multiply_adds_are_those_of_the_published_networks(model, crop, giga):
    assert multiply_adds(model, crop) / 1e9 == pytest.approx(giga, rel=0.005)


def test_a_training_step_counts_three_forward_passes_and_one_of_a_part_is_not_known():
    plan = make_plan(model="R50x1", view=TrainView(crop="resize", crop_size=224))
    assert training_flops(plan) / 1e9 == pytest.approx(3 * 2 * 4.09, rel=0.005)
    assert training_flops(replace(plan, train="head")) == 0


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756.4),
        ("NVIDIA A100-SXM4-40GB", torch.float32, 156.0),
        ("NVIDIA A10G", torch.bfloat16, 70.0),
        ("NVIDIA A10", torch.bfloat16, 125.0),
        ("Tesla V100-SXM2-16GB", torch.float32, 15.7),
        ("Tesla T4", torch.bfloat16, 0.0),
        ("GPU of tomorrow", torch.bfloat16, 0.0),
    ],
)
def test_the_peak_of_a_gpu_is_known_by_its_name(monkeypatch, name, dtype, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)  # there is no GPU here
    assert peak_flops(torch.device("cuda"), dtype, 0.0) == tflops * 1e12
    assert peak_flops(torch.device("cuda"), dtype, 3.5) == 3.5e12
    assert peak_flops(torch.device("cpu"), dtype, 0.0) == 0.0


@pytest.mark.parametrize("changes", [{}, {"train": "head"}, {"mixup_alpha": 0.1, "loss": "sigmoid"}])
def test_the_speed_is_that_of_the_steps_of_the_plan(changes):
    plan = make_plan(**changes)
    torch.manual_seed(4)
    expected, threads = torch.rand(1), torch.get_num_threads()
    torch.manual_seed(4)
    speed = measure_speed(plan, "auto", "cpu", 8)
    assert torch.equal(torch.rand(1), expected)
    assert torch.get_num_threads() == threads
    assert re.fullmatch("measured with [2468] images a pass on one CPU thread", speed.how)

    torch.set_num_threads(1)
    try:
        model = estimate.create_model(plan.model, plan.num_classes)
        set_trainable(model, plan.train)
        to_channels_last(model)
        step = TrainStep(model, build_optimizer(model, plan), plan)
        targets = torch.zeros(8, 10) if plan.loss == "sigmoid" else torch.zeros(8, dtype=torch.int64)
        batch = torch.zeros(8, 64, 64, 3, dtype=torch.uint8), targets
        taken = []
        for _ in range(6):
            before = time.perf_counter()
            step(0, [batch], 1)
            step.check()
            taken.append(time.perf_counter() - before)
    finally:
        torch.set_num_threads(threads)
    # Other work on the machine comes and goes; a factor of the batch or of the threads would still show.
    assert 0.15 < speed.images_per_s / (8 / statistics.median(taken)) < 7


def test_a_network_too_large_for_a_cpu_is_judged_by_a_smaller_one(monkeypatch):
    monkeypatch.setattr(estimate, "_STAND_IN", "R1-1-1-1x0.5")
    monkeypatch.setattr(estimate, "_STAND_IN_CROP", 64)
    plan = make_plan(model="R50x3", view=TrainView(crop="resize", crop_size=480), global_batch_size=512)
    started = time.perf_counter()
    large, small = measure_speed(plan, "auto", "cpu", 64), measure_speed(make_plan(), "auto", "cpu", 64)
    assert time.perf_counter() - started < 60
    assert large.how.endswith("by R1-1-1-1x0.5 at 64 pixels and the ratio of multiply-adds")
    ratio = multiply_adds("R50x3", 480) / multiply_adds("R1-1-1-1x0.5", 64)
    assert 0.15 < small.images_per_s / large.images_per_s / ratio < 7


def test_every_size_of_micro_batch_can_be_measured():
    for size, alpha in ((1, 0.0), (2, 0.0), (2, 0.1)):
        plan = replace(make_plan(), mixup_alpha=alpha, view=TrainView(crop="resize", crop_size=32))
        assert f"with {size} images" in measure_speed(plan, "fp32", "cpu", size).how


def test_other_work_on_the_machine_makes_no_pass_smaller(monkeypatch):
    clock = time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: 100 * clock())  # as if the CPU were shared by a hundred
    plan = replace(make_plan(), view=TrainView(crop="resize", crop_size=32))
    assert "with 64 images" in measure_speed(plan, "fp32", "cpu", 64).how


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (89, "89 s"), (120, "2 min"), (5340, "89 min"), (5460, "1 h 31 min"), (90_000, "25 h 0 min")]
    + [(172_800, "2.0 days"), (1e6, "11.6 days")],
)
def test_durations_are_said_in_the_units_of_people(seconds, text):
    assert as_duration(seconds) == text
