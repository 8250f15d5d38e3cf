"""How fast a plan will be trained, from a few real steps of it on this device. PyTorch only."""

import statistics
import time
from dataclasses import dataclass, replace

import torch

from bit_ray.errors import ConfigError
from bit_ray.models.zoo import create_model, model_config
from bit_ray.training.config import Precision
from bit_ray.training.device import worker_threads
from bit_ray.training.learner import Learner
from bit_ray.training.plan import TrainPlan

# What a CPU core trains in about two seconds per image; the speed of larger networks is estimated from a smaller one.
_MOST_MACS_ON_CPU = 25e9
_STAND_IN, _STAND_IN_CROP = "R50x1", 224
_SECONDS, _MOST_STEPS = 2.0, 100


@dataclass(frozen=True)
class Speed:
    """How fast one worker trains."""

    images_per_s: float
    """Images per second of forward pass, backward pass and update."""
    how: str
    """How it was found."""
    slowest: float
    """Images per second of the slowest step that was measured."""
    fastest: float
    """Images per second of the fastest one."""
    busy: float
    """Share of the time in which the CPU did other work; 0 on a GPU, where that is not known."""


def multiply_adds(model: str, crop_size: int) -> float:
    """Multiply-adds of one image's forward pass."""
    from torch.utils.flop_counter import FlopCounterMode  # with Triton, which few processes need

    counter = FlopCounterMode(display=False)
    with torch.device("meta"), torch.no_grad(), counter:
        create_model(model, 1).eval()(torch.zeros(1, 3, crop_size, crop_size))
    return counter.get_total_flops() / 2


def training_flops(plan: TrainPlan) -> float:
    """Floating-point operations that training on one image takes by the model: forward, and twice that backward.

    The head is not counted. What is computed again to save memory does not count either: this is what MFU is a share of
    (Chowdhery et al. 2022, appendix B). A plan that trains a part of the network needs fewer: 0, as they are not known.
    """
    return 6 * multiply_adds(plan.model, plan.view.crop_size) if plan.train == "all" else 0.0


def measure_speed(
    plan: TrainPlan, precision: Precision, device: str, micro_batch_size: int, *, seconds: float = _SECONDS
) -> Speed:
    """Train on random images with the plan's network, view and optimizer for some seconds.

    On a CPU one thread is used, as in a training worker. The speed of a network too large for it is estimated from a
    smaller one, in proportion to their multiply-adds.

    Args:
        plan: What is to be trained.
        precision: The run's setting.
        device: ``cpu`` or ``cuda``.
        micro_batch_size: Images per forward and backward pass; fewer if they take more than a second or two.
        seconds: About how long.

    Raises:
        ConfigError: The micro-batch does not fit into the GPU's memory.
    """
    model, crop = plan.model, plan.view.crop_size
    macs = multiply_adds(model, crop)
    norm_batch, scale, how = plan.norm_batch, 1.0, ""
    if device == "cpu" and macs > _MOST_MACS_ON_CPU:
        model, norm_batch = _STAND_IN, 0
        crop = max(model_config(model, 1).min_image_size, min(crop, _STAND_IN_CROP))
        scale = multiply_adds(model, crop) / macs
        how = f", by {model} at {crop} pixels and the ratio of multiply-adds"
    state = torch.get_rng_state()
    try:
        with worker_threads(device):
            smaller = replace(plan, model=model, norm_batch=norm_batch)
            taken, cpu, count = _measure(smaller, crop, precision, device, micro_batch_size, seconds)
    except torch.OutOfMemoryError:
        given = f"{micro_batch_size} images of {crop} pixels do not fit into the memory of this GPU"
        remedy = "lower it: the results stay the same"
        raise ConfigError.of("runtime.micro_batch_size", given, remedy=remedy) from None
    finally:
        torch.set_rng_state(state)
    where = "one CPU thread" if device == "cpu" else torch.cuda.get_device_name()
    # The mean: what holds a step up now and then does so later, too.
    mean, slowest, fastest = (count / s * scale for s in (statistics.fmean(taken), max(taken), min(taken)))
    busy = max(0.0, 1 - cpu / sum(taken)) if device == "cpu" else 0.0
    return Speed(mean, f"measured with {count} images a pass on {where}{how}", slowest, fastest, busy)


def _measure(
    plan: TrainPlan, crop: int, precision: Precision, device: str, most: int, seconds: float
) -> tuple[list[float], float, int]:
    """Seconds of some steps, those that the CPU worked on them, and the number of images per step, all in one pass."""
    learner = Learner(plan, torch.device(device), precision=precision)

    def step(count: int) -> tuple[float, float]:
        images = torch.randint(256, (count, crop, crop, 3), dtype=torch.uint8)
        shape = (count,) if plan.loss == "softmax" else (count, plan.num_classes)
        targets = torch.zeros(shape, dtype=torch.int64)
        started, cpu = time.perf_counter(), time.thread_time()
        learner.step(0, images, targets)
        learner.check()  # waits for the device
        return time.perf_counter() - started, time.thread_time() - cpu

    count = min(2, most)  # two, because MixUp mixes pairs
    step(count)
    if device == "cuda":
        count = most
        step(count)
    else:
        # By the CPU's seconds: beside other work a pass would take longer, and a smaller one is slower for each image.
        once = step(count)[1]
        # Again and again: for a small network a pass of few images takes nearly as long as one of many. The first pass
        # of a size takes longer than others.
        while count < most and (grown := count * _SECONDS / 2 / once) >= 1.5 * count:
            count = min(most, int(grown) // 2 * 2)
            once = min(step(count)[1], step(count)[1])
    taken: list[float] = []
    cpu = 0.0
    while not taken or (sum(taken) < seconds and len(taken) < _MOST_STEPS):
        step_s, cpu_s = step(count)
        taken.append(step_s)
        cpu += cpu_s
    return taken, cpu, count
