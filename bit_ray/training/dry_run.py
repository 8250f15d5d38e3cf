"""What ``--dry-run`` shows: the whole resolved plan, and the time that it will take."""

import ray

from bit_ray.cluster.slots import Workers
from bit_ray.config import from_dict
from bit_ray.data.shards.manifest import Manifest
from bit_ray.errors import root_cause
from bit_ray.models.zoo import PUBLISHED
from bit_ray.recipes.hyperrule import HyperRule
from bit_ray.training.config import Runtime
from bit_ray.training.estimate import Speed, measure_speed
from bit_ray.training.goodput import as_duration
from bit_ray.training.memory import total_memory, worker_memory
from bit_ray.training.parts import count_parameters
from bit_ray.training.plan import TrainPlan
from bit_ray.training.shares import share_out

_SECONDS_FOR_A_PLACE = 120.0


def worker_speed(plan: TrainPlan, runtime: Runtime, num_workers: int, use_gpu: bool, *, local: bool) -> Speed | None:
    """Speed of one worker, measured in this process or on the running cluster; None if no slot there is free soon.

    A step in shards takes all workers, and is not measured: None.

    Raises:
        ConfigError: The batch cannot be shared out, or a micro-batch does not fit into a GPU.
    """
    _, micro = share_out(plan, runtime, num_workers)
    if runtime.sharding != "none":
        return None
    arguments = plan, runtime.precision, "cuda" if use_gpu else "cpu", micro
    if local:
        return measure_speed(*arguments)
    ref = ray.remote(num_cpus=1, num_gpus=1 if use_gpu else 0)(measure_speed).remote(*arguments)
    try:
        speed: Speed = ray.get(ref, timeout=_SECONDS_FOR_A_PLACE)
        return speed
    except ray.exceptions.GetTimeoutError:
        ray.cancel(ref, force=True)
        return None
    except ray.exceptions.RayError as error:
        raise root_cause(error) or error from None


def describe(
    plan: TrainPlan, runtime: Runtime, manifest: Manifest, workers: Workers, speed: Speed | None, subset: str = ""
) -> list[tuple[str, str]]:
    """The resolved plan as rows of a table.

    Args:
        plan: What is to be learned.
        runtime: How.
        manifest: Of the shards.
        workers: Least and most training workers; shares and time are those of the most.
        speed: Of one of them; None: not known.
        subset: What is drawn from the shards, if the run does not train on all of them.

    Raises:
        ConfigError: The batch cannot be shared out over the workers.
    """
    shares, micro = share_out(plan, runtime, workers.most)
    schedule = plan.schedule
    saves = -(-schedule.num_steps // runtime.checkpoint_every_steps)
    num_images = schedule.num_steps * plan.global_batch_size
    trained, total = count_parameters(plan.model, plan.num_classes, plan.train)
    rows = [
        ("model", f"{plan.model}{'' if plan.model in PUBLISHED else ' (own size)'}, {total:,} parameters"),
        ("weights", plan.init or f"from scratch, seed {plan.seed}"),
        (
            "shards",
            f"{manifest.name}: {manifest.num_examples:,} images of {manifest.num_classes:,} classes in "
            f"{len(manifest.shards):,} shards, {manifest.num_bytes / 1e6:,.1f} MB, digest {manifest.digest[:12]}",
        ),
    ]
    if subset:
        rows.append(("few-shot", subset))
    if plan.kind == "finetune":
        rows += [
            ("HyperRule", _rule(from_dict(HyperRule, plan.recipe))),
            ("trained", f"{plan.train}: {trained:,} of {total:,} parameters"),
        ]
    rows += [
        ("view", _view(plan)),
        ("loss", f"{plan.loss} cross-entropy"),
        ("MixUp", f"alpha {plan.mixup_alpha:g}, one lambda per step" if plan.mixup_alpha else "none"),
        (
            "length",
            f"{schedule.num_steps:,} steps of {plan.global_batch_size:,} images, "
            f"{num_images / plan.num_examples:,.2f} passes",
        ),
        ("warm-up", f"{schedule.warmup_steps:,} steps" if schedule.warmup_steps else "none"),
        ("learning rate", ", ".join(f"{lr:.4g} from step {step:,}" for step, lr in schedule.table())),
        (
            "optimizer",
            f"SGD, momentum {plan.momentum:g}, weight decay {plan.weight_decay:g} on kernels"
            + (f", gradient norm at most {plan.clip_norm:g}" if plan.clip_norm else ""),
        ),
        (
            "batch split",
            _split([len(share) for share in shares], micro)
            + (
                f"; {workers.least} to {workers.most} workers, as there is room" if workers.least < workers.most else ""
            ),
        ),
        (
            "memory",
            f"about {worker_memory(plan, runtime, workers.most, micro) / 1e9:,.1f} GB for each of {workers.most} "
            f"workers, {micro:,} images at a time"
            + (", weights, gradients and momentum in shards" if runtime.sharding != "none" else "")
            + (
                ("" if runtime.micro_batch_size else "; fewer where a GPU has no room for them")
                if workers.use_gpu
                else f"; this machine has {total_memory() / 1e9:,.1f} GB"
            ),
        ),
        ("precision", runtime.precision + (", torch.compile" if runtime.compile else "")),
        ("shuffle", f"{plan.shuffle.num_lanes} lanes x windows of {plan.shuffle.lane_window} images"),
        (
            "checkpoints",
            f"{saves} (every {runtime.checkpoint_every_steps:,} steps and at the end)"
            + (f", and after {runtime.checkpoint_every_s:g} s without one" if runtime.checkpoint_every_s else "")
            + f"; the last {runtime.num_checkpoints_to_keep} are kept",
        ),
        ("images", f"{num_images:,} in all"),
        ("time", _time(num_images, workers.most, speed, runtime)),
        ("plan digest", "depends on the drawn subset, which is not written yet" if subset else plan.digest[:12]),
    ]
    return rows


def _rule(rule: HyperRule) -> str:
    height, width = rule.image_size
    replaced = f"; replaced: {', '.join(rule.overrides)}" if rule.overrides else ""
    return (
        f"profile {rule.profile}, {rule.regime} regime: N = {rule.num_examples:,}, images of about "
        f"{height} x {width} pixels{replaced}"
    )


def _split(shares: list[int], micro: int) -> str:
    least, most = min(shares), max(shares)
    if least < most:
        return f"{len(shares)} workers x {least} or {most} images, micro-batches of at most {micro}"
    num_micro = -(-most // micro)
    each = f"{micro} images" if most % micro == 0 else f"at most {micro} images"
    return f"{len(shares)} workers x {num_micro} micro-batches x {each}"


def _view(plan: TrainPlan) -> str:
    view, size = plan.view, plan.view.crop_size
    seen = {
        "resize_crop": f"resize to {view.resize_size} x {view.resize_size}, random crop {size} x {size} pixels",
        "resize": f"resize to {size} x {size} pixels, no crop",
        "inception": f"random box, {size} x {size} pixels",
    }[view.crop]
    straight = f"resize to {size} x {size}"
    test = straight if plan.resize_mode == "square" else f"shorter side to {plan.resize_size}, centre crop {size}"
    return f"{seen}, {'random flips' if view.random_flip else 'no flips'}; test: {test}"


def _time(num_images: int, num_workers: int, speed: Speed | None, runtime: Runtime) -> str:
    if runtime.sharding != "none":
        return "unknown: a step in shards takes all workers, and is not measured"
    if speed is None:
        return "unknown: the cluster had no free slot for a measurement"
    seconds = num_images / (speed.images_per_s * num_workers)
    return (
        f"{as_duration(seconds)} of training steps, at {num_workers} workers x {speed.images_per_s:,.3g} images/s, "
        f"{speed.how}"
    )
