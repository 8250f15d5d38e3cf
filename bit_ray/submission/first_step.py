"""One real batch through one real step on one worker, with the code that trains: stream, decoder, learner."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch

from bit_ray.data.images.decode import ImageError
from bit_ray.data.images.decode_view import decode_train_view
from bit_ray.data.images.views import example_keys, uniforms
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.shards.read import read_rows
from bit_ray.data.stream.batches import StreamSpec, batches
from bit_ray.data.stream.settings import CacheConfig
from bit_ray.errors import ConfigError, DataError, root_cause
from bit_ray.training.config import Runtime
from bit_ray.training.device import worker_threads
from bit_ray.training.learner import Learner
from bit_ray.training.plan import TrainPlan
from bit_ray.training.shares import plan_slots, share_out

_SECONDS = 300.0
_MOST_ON_CPU = 16
_DECODED = 32


@dataclass(frozen=True, kw_only=True)
class FirstStep:
    """What came out."""

    num_images: int
    read_s: float
    """Seconds until the batch was there, the start of the readers included."""
    images_per_s: float
    """Images that the worker trains on per second, from a second step on the same images."""
    decoded_per_s: float
    """Images that one core decodes per second."""
    loss: float
    """Mean loss of the images."""
    device: str


def first_step(
    plan: TrainPlan, runtime: Runtime, shards: str, *, num_workers: int, use_gpu: bool, init_weights: Any = None
) -> FirstStep:
    """Take the step, as the first of so many workers.

    Args:
        plan: What is to be learned.
        runtime: How.
        shards: URI of the shard set.
        num_workers: Of the run; the first one's share is taken, at most a micro-batch of it.
        use_gpu: Whether on a GPU.
        init_weights: Ray object reference to initial tensors, or None.

    Raises:
        BitRayError: The step is not possible, or there is no free slot for it.
    """
    remote = ray.remote(num_cpus=1, num_gpus=1 if use_gpu else 0, max_retries=0)(_take)
    ref = remote.remote(plan, runtime, shards, num_workers, use_gpu, [init_weights])
    try:
        found: FirstStep = ray.get(ref, timeout=_SECONDS)
        return found
    except ray.exceptions.GetTimeoutError:
        ray.cancel(ref, force=True)
        raise ConfigError(
            f"no step within {_SECONDS:.0f} s: no {'GPU' if use_gpu else 'CPU'} is free, or the worker is too slow; "
            "wait for what else runs on the cluster, or submit with --no-preflight"
        ) from None
    except ray.exceptions.RayError as error:
        if (cause := root_cause(error)) is not None:
            raise cause from None
        last = (str(error).strip().splitlines() or ["no reason"])[-1]
        raise ConfigError(f"{last[:300]}; look at the worker's log") from None


def _take(
    plan: TrainPlan, runtime: Runtime, shards: str, num_workers: int, use_gpu: bool, init_weights: list[Any]
) -> FirstStep:
    device = torch.device("cuda" if use_gpu else "cpu")
    micro = share_out(plan, runtime, num_workers)[1]
    slots = plan_slots(plan, num_workers)[0]
    most = micro if use_gpu or plan.batch_of_statistics else min(micro, _MOST_ON_CPU)
    spec = StreamSpec(
        shards=shards,
        manifest_digest=plan.manifest_digest,
        global_batch_size=plan.global_batch_size,
        slots=range(slots.start, slots.start + min(len(slots), most)),
        start_step=0,
        stop_step=1,
        seed=plan.seed,
        shuffle=plan.shuffle,
        view=plan.view,
        cache=CacheConfig(directory=runtime.cache.directory, max_gb=0),  # nothing is left on the node
    )
    with worker_threads(device.type):
        began = time.perf_counter()
        [batch] = list(batches(spec, num_readers=runtime.num_readers, pin_memory=use_gpu))
        read_s = time.perf_counter() - began
        weights = ray.get(init_weights[0]) if init_weights[0] is not None else None
        learner = Learner(
            plan,
            device,
            precision=runtime.precision,
            init_weights=weights,
            micro_batch_size=runtime.micro_batch_size,
            num_workers=num_workers,
        )
        targets = learner.targets(batch.rows)
        try:
            loss, _ = learner.step(0, batch.images, targets)
            learner.check()  # waits for the device
            began = time.perf_counter()
            learner.step(1, batch.images, targets)
            learner.check()
        except torch.OutOfMemoryError:
            given = f"{micro} images of {plan.view.crop_size} pixels do not fit into the memory of this GPU"
            remedy = "lower it: the results stay the same"
            if runtime.sharding != "none":
                remedy += ", or submit with --no-preflight, as this step is not in shards"
            raise ConfigError.of("runtime.micro_batch_size", given, remedy=remedy) from None
        step_s = time.perf_counter() - began
    num_images = len(batch.images)
    return FirstStep(
        num_images=num_images,
        read_s=read_s,
        images_per_s=num_images / step_s,
        decoded_per_s=_decoded_per_s(plan, shards),
        loss=loss.item() * plan.global_batch_size / num_images,
        device=torch.cuda.get_device_name() if use_gpu else "one CPU thread",
    )


def _decoded_per_s(plan: TrainPlan, shards: str) -> float:
    """Images of the first row group that one core decodes per second."""
    manifest = read_manifest(shards)
    table = read_rows(shards, manifest, 0, [0], ("id", "image")).slice(0, _DECODED)
    ids = table["id"].to_pylist()
    draws = uniforms(plan.seed, np.zeros(len(ids), np.int64), example_keys(ids))
    size = plan.view.crop_size
    out, num_decoded = np.empty((size, size, 3), np.uint8), 0
    began = time.perf_counter()
    for data, draw in zip(table["image"].to_pylist(), draws, strict=True):
        try:
            decode_train_view(data, plan.view, draw, out, convert=manifest.convert_images)
            num_decoded += 1
        except ImageError:
            pass
    if not num_decoded:
        raise DataError(f"{shards}: no image of its first row group can be read; run bit-ray shards verify {shards}")
    return num_decoded / (time.perf_counter() - began)
