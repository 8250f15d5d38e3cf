"""What holds on a GPU. These tests run wherever CUDA is there; elsewhere they are left out without a word."""

import numpy as np
import pytest
import torch
from small_training import BATCH, MODEL, NUM_CLASSES, NUM_STEPS, numbers, pretrain_plan

from bit_ray.models.zoo import create_model
from bit_ray.training import learner
from bit_ray.training.device import resolve_precision
from bit_ray.training.learner import Learner
from bit_ray.training.memory import gpu_micro_batch

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")


def losses(device: torch.device, micro_batch_size: int = BATCH, precision: str = "fp32") -> list[float]:
    trained = Learner(pretrain_plan(), device, micro_batch_size=micro_batch_size, precision=precision)
    found = []
    for step in range(NUM_STEPS):
        images = torch.from_numpy(numbers(BATCH, 32, 32, 3, seed=step).astype(np.uint8))
        targets = torch.from_numpy(numbers(BATCH, high=NUM_CLASSES, seed=100 + step))
        found.append(trained.step(step, images, targets)[0].item())
    trained.check()
    return found


@pytest.mark.parametrize("micro_batch_size", [2, BATCH])
def test_it_trains_as_a_cpu_does(micro_batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    expected = losses(torch.device("cpu"))
    found = losses(DEVICE, micro_batch_size)
    assert found[:5] == pytest.approx(expected[:5], rel=1e-4)
    assert found == pytest.approx(expected, rel=2e-2)


def test_a_batch_is_split_where_a_gpu_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner, "free_gpu_memory", lambda device: 0)
    assert Learner(pretrain_plan(), DEVICE).micro_batch_size == 2
    assert losses(DEVICE, 0)[:5] == pytest.approx(losses(DEVICE, 2)[:5], rel=1e-5)


def test_no_more_memory_is_taken_than_was_told() -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    plan = pretrain_plan(model="R26x1", global_batch_size=4096)
    before = torch.cuda.memory_allocated()
    free = 4e9
    micro = gpu_micro_batch(plan, free)
    trained = Learner(plan, DEVICE, micro_batch_size=micro, precision="fp32")
    weights = torch.cuda.memory_allocated() - before
    images = torch.zeros(2 * micro, plan.view.crop_size, plan.view.crop_size, 3, dtype=torch.uint8)
    trained.step(0, images, torch.zeros(2 * micro, dtype=torch.int64))
    trained.check()
    assert torch.cuda.max_memory_allocated() - before - weights < free


def test_bfloat16_is_chosen_where_there_are_tensor_cores_for_it_and_trains_as_float32_does() -> None:
    fast = torch.cuda.get_device_capability() >= (8, 0)
    assert (resolve_precision("auto", DEVICE) is torch.bfloat16) == fast
    if fast:
        assert losses(DEVICE, precision="bf16")[:5] == pytest.approx(losses(torch.device("cpu"))[:5], rel=0.05)


def test_a_network_computes_there_what_it_computes_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    network = create_model(MODEL, NUM_CLASSES).eval()
    images = torch.randn(4, 3, 64, 64)
    with torch.inference_mode():
        expected = network(images)
        found = network.to(DEVICE)(images.to(DEVICE)).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
