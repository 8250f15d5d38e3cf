"""Memory of a plan, and micro-batches that fit into it."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from bit_ray.cluster.slots import Workers
from bit_ray.recipes.hyperrule import hyperrule
from bit_ray.training import memory
from bit_ray.training.config import Runtime
from bit_ray.training.memory import bytes_per_image, gpu_micro_batch, total_memory, with_room, worker_memory
from bit_ray.training.parts import count_parameters
from bit_ray.training.plan import transfer_plan

CPU = Workers(2, 2, use_gpu=False)


def plan(model="R1-1-1-1x0.5", **rule):
    settings = hyperrule(300, (160, 185), **rule)
    return transfer_plan(settings, model=model, num_classes=6, manifest_digest="x", init="", init_digest="", seed=0)


def test_the_memory_of_an_image_is_that_of_the_activations_of_its_network():
    small, large = bytes_per_image("R1-1-1-1x0.5", 128), bytes_per_image("R1-1-1-1x0.5", 256)
    assert large == pytest.approx(4 * small, rel=0.05)  # four times the pixels
    assert bytes_per_image("R50x1", 128) > 4 * small
    # R1-1-1-1x0.5 at 480 pixels took 110 MB more for each image.
    assert bytes_per_image("R1-1-1-1x0.5", 480) == pytest.approx(110e6, rel=0.05)


@pytest.mark.parametrize(("gigabytes", "expected"), [(1000, 0), (24, 44), (8, 8), (1, 2)])
def test_a_batch_is_split_where_it_has_no_room(monkeypatch, gigabytes, expected):
    """HyperRule's 512 images of 480 pixels on two workers, which take 56 GB in one pass each."""
    monkeypatch.setattr(memory, "total_memory", lambda: int(gigabytes * 1e9))
    found = with_room(plan(), Runtime(), CPU, local=True)
    assert found.micro_batch_size == expected
    assert replace(found, micro_batch_size=0) == Runtime()
    if expected > 2:
        told, more = (worker_memory(plan(), Runtime(), 2, number) for number in (expected, expected + 2))
        assert told <= gigabytes * 1e9 / 4 < more


def test_a_worker_with_a_shard_has_its_share_and_what_is_gathered():
    large, sharded = plan("R50x1"), Runtime(sharding="fsdp")
    weights = 4 * 23_512_646  # of R50x1 with 6 classes
    unit = 4 * (2048 * 512 + 9 * 512 * 512 + 1024 * 512 + 2048 * 1024 + 2 * (1024 + 512 + 512))  # with a projection
    whole = worker_memory(large, Runtime(), 4, 8)
    assert whole - worker_memory(large, sharded, 4, 8) == pytest.approx(3 * weights * 3 / 4 - 6 * unit, abs=10)
    assert worker_memory(large, sharded, 1, 8) == worker_memory(large, Runtime(), 1, 8)  # one worker has everything


@pytest.mark.parametrize(
    ("model", "gigabytes", "expected"),
    [("R1-1-1-1x0.5", 80, 508), ("R1-1-1-1x0.5", 16, 100), ("R50x1", 80, 96), ("R50x1", 16, 18), ("R50x1", 1, 2)],
)
def test_a_gpu_takes_as_many_images_as_it_has_room_for(model, gigabytes, expected):
    """Of 480 pixels: an even number, for MixUp's pairs, that fits in float32 into 0.7 of what is free."""
    fitting = gpu_micro_batch(plan(model), gigabytes * 1e9)
    assert fitting == expected
    for images, fits in ((fitting, expected > 2), (fitting + 2, False)):
        taken = 3 * 4 * count_parameters(model, 6, "all")[1] + images * bytes_per_image(model, 480)
        assert (taken <= 0.7 * gigabytes * 1e9) == fits


@pytest.mark.parametrize(
    ("runtime", "workers", "local", "model"),
    [
        (Runtime(micro_batch_size=200), CPU, True, "R1-1-1-1x0.5"),  # set by the user
        (Runtime(), Workers(1, 1, use_gpu=True), True, "R1-1-1-1x0.5"),
        (Runtime(), CPU, False, "R1-1-1-1x0.5"),  # memory of other machines is not known
        (Runtime(), CPU, True, "R1-1-1-1x0.5-bn"),  # whose statistics are over a pass
    ],
)
def test_what_is_not_known_or_not_free_is_not_changed(monkeypatch, runtime, workers, local, model):
    monkeypatch.setattr(memory, "total_memory", lambda: 10**9)
    assert with_room(plan(model), runtime, workers, local=local) == runtime


STEPS = """
import json, resource, sys
import torch
from bit_ray.recipes.hyperrule import hyperrule
from bit_ray.training import memory
from bit_ray.training.config import Runtime
from bit_ray.training.learner import Learner
from bit_ray.training.plan import transfer_plan

torch.set_num_threads(1)
imported = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
for model, crop, batch in json.loads(sys.argv[1]):
    rule = hyperrule(300, (crop, crop), resize=crop, crop=crop, batch_size=batch)
    plan = transfer_plan(rule, model=model, num_classes=6, manifest_digest="x", init="", init_digest="", seed=0)
    learner = Learner(plan, torch.device("cpu"), precision="fp32")
    for step in range(2):
        learner.step(step, torch.zeros(batch, crop, crop, 3, dtype=torch.uint8), torch.zeros(batch, dtype=torch.int64))
    del learner
    told = imported + memory.worker_memory(plan, Runtime(), 1, batch) - memory._LIBRARIES
    # Not ru_maxrss, which begins with that of the process that this one was forked from.
    peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(told, peak * 1024, flush=True)
"""


def test_the_memory_that_is_told_is_that_of_real_steps():
    """Within a tenth, one network after the other, each larger than those before: a process has one peak."""
    steps = [("R1-1-1-1x0.5", 32, 8), ("R1-1-1-1x0.5", 128, 32), ("R26x1", 64, 32)]
    done = subprocess.run(
        [sys.executable, "-c", STEPS, json.dumps(steps)], capture_output=True, text=True, check=True, timeout=300
    )
    measured = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(measured) == len(steps)
    assert [told / peak for told, peak in measured] == pytest.approx([1] * len(steps), abs=0.1)


def test_the_limit_of_a_container_counts(monkeypatch, tmp_path):
    whole = total_memory()
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "_LIMITS", (str(limit), str(tmp_path / "absent")))
    limit.write_text("max\n")
    assert total_memory() >= whole
    limit.write_text("123456789\n")
    assert total_memory() == 123456789
