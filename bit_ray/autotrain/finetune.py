"""The fine-tuning that there is time for."""

from dataclasses import replace

import torch

from bit_ray import store
from bit_ray.autotrain.config import TrainConfig
from bit_ray.autotrain.starts import Start
from bit_ray.cluster.slots import num_local_cores
from bit_ray.data.shards.manifest import Manifest
from bit_ray.recipes.hyperrule import RuleOverrides
from bit_ray.run_folder import RunFolder
from bit_ray.training.config import FinetuneConfig, Runtime
from bit_ray.training.estimate import measure_speed
from bit_ray.training.finetune import finetune_plan
from bit_ray.training.goodput import as_duration
from bit_ray.training.initial_weights import InitialWeights
from bit_ray.training.plan import TrainPlan

# Share of the time that is left.
_FINETUNE = 0.7
# Ray, its workers and their imports, on two cores.
_STARTING_S = 30.0
_BATCHES = (512, 256, 128, 64, 32)
_LEAST_STEPS, _MOST_STEPS, _LEAST_PASSES = 100, 500, 5
# Of HyperRule below 20,000 images.
_RULE_STEPS, _RULE_RATE, _LARGEST_RATE = 500, 0.003, 0.01


def finetune_in_time(
    config: TrainConfig,
    shards: str,
    start: Start,
    init: InitialWeights,
    manifest: Manifest,
    device: str,
    seconds_left: float,
) -> tuple[FinetuneConfig, TrainPlan, str] | str:
    """Return settings and plan of a fine-tuning that fits into the seconds that are left, with a reason; or why not.

    The learning rate keeps HyperRule's sum over the steps, up to 0.01.
    """
    seconds = _FINETUNE * seconds_left
    settings = finetune_config(config, shards=shards, init=init.parent)
    # Images that are measured at a time: a GPU is slow with few, and the learner splits what has no room.
    num_workers, most = num_local_cores(), _BATCHES[-1]
    if device == "cuda":
        num_workers = torch.cuda.device_count()
        most = _BATCHES[0] // num_workers

    def planned(batch: int, steps: int) -> tuple[FinetuneConfig, TrainPlan]:
        rate = min(_LARGEST_RATE, _RULE_RATE * _RULE_STEPS / steps)
        rule = RuleOverrides(regime="small", crop=start.size, batch_size=batch, num_steps=steps, base_lr=rate)
        ready = replace(settings, rule=rule, runtime=Runtime(checkpoint_every_s=120))
        return ready, finetune_plan(ready, manifest, init, manifest.num_examples)

    begun = RunFolder.of(config.storage, settings.name)
    if store.exists(begun.plan):  # by an earlier start, which had another time left
        record = begun.record().plan
        ready, plan = planned(record["global_batch_size"], record["schedule"]["num_steps"])
        return ready, plan, f"as it was begun, {plan.schedule.num_steps:,} steps of {plan.global_batch_size} images"
    _, plan = planned(_BATCHES[-1], _LEAST_STEPS)
    speed = measure_speed(plan, "auto", device, most).images_per_s * num_workers
    images = int((seconds - _STARTING_S) * speed)
    least = max(_LEAST_PASSES * manifest.num_examples, _LEAST_STEPS * _BATCHES[-1])
    if images < least:
        needed = (least / speed + _STARTING_S) / _FINETUNE
        left = as_duration(max(0.0, seconds))
        return f"{as_duration(needed)} are needed for the shortest on this machine, and {left} are left"
    batch = next(size for size in _BATCHES if images // size >= _LEAST_STEPS)
    steps = min(_MOST_STEPS, images // batch)
    ready, plan = planned(batch, steps)
    took = as_duration(steps * batch / speed + _STARTING_S)
    passes = steps * batch / manifest.num_examples
    return ready, plan, f"{steps:,} steps of {batch} images, {passes:,.1f} passes, about {took}"


def finetune_config(config: TrainConfig, *, shards: str, init: str) -> FinetuneConfig:
    """Return the settings of the fine-tuning below the run's folder."""
    return FinetuneConfig(
        name=f"{config.name} fine-tuning",
        shards=shards,
        init=init,
        random_flip=config.random_flip,
        seed=config.seed,
        storage=config.storage,
        tracking=config.tracking,
        register=config.register,
    )
