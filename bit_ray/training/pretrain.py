"""Upstream pre-training: a recipe applied to a shard set."""

from bit_ray.claim import claimed_run
from bit_ray.config import to_dict
from bit_ray.data.images.views import TrainView
from bit_ray.data.shards.manifest import Manifest, read_manifest
from bit_ray.errors import BitRayError
from bit_ray.evaluation.probe import ProbeTask, probe_task
from bit_ray.training.checks import check_registration, preflight
from bit_ray.training.config import PretrainConfig
from bit_ray.training.driver import Trained, finished, register_result, train
from bit_ray.training.plan import TrainPlan


def pretrain_plan(config: PretrainConfig, manifest: Manifest, num_examples: int = 0) -> TrainPlan:
    """Resolve the recipe for the data.

    Args:
        config: The user's settings.
        manifest: Of the shards.
        num_examples: Examples that are trained on, if not all.

    Raises:
        ConfigError: The recipe does not fit the data: fewer steps than the warm-up, softmax with several labels.
    """
    recipe = config.recipe
    num_examples = num_examples or manifest.num_examples
    return TrainPlan(
        kind="pretrain",
        model=config.model,
        num_classes=manifest.num_classes,
        manifest_digest=manifest.digest,
        num_examples=num_examples,
        view=TrainView(
            crop="inception",
            crop_size=recipe.crop_size,
            area_range=recipe.area_range,
            aspect_range=recipe.aspect_range,
            random_flip=recipe.random_flip,
        ),
        resize_mode="shorter_side",
        # 256 for a crop of 224 (big_vision:configs/bit_i21k.py), and in proportion for other sizes.
        resize_size=round(recipe.crop_size * 256 / 224),
        loss=recipe.loss_for(manifest.multi_label),
        schedule=recipe.schedule(num_examples),
        global_batch_size=recipe.global_batch_size,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        dropout=config.dropout,
        norm_batch=config.norm_batch,
        mixup_alpha=config.mixup_alpha,
        clip_norm=config.clip_norm,
        head_bias=config.head_bias,
        seed=config.seed,
        shuffle=config.shuffle,
        recipe=to_dict(recipe),
    )


def _probe_task(config: PretrainConfig) -> ProbeTask:
    try:
        return probe_task(config.probe)
    except BitRayError as error:
        raise error.under("probe" if error.field else "") from None


def pretrain(config: PretrainConfig) -> Trained | None:
    """Pre-train, record and register; None after a dry run.

    Raises:
        BitRayError: Anything the user can fix.
    """
    check_registration(config)
    manifest = read_manifest(config.shards)
    plan = pretrain_plan(config, manifest)
    if config.dry_run:
        finished(config, plan)  # or the name has other settings
    task = _probe_task(config) if config.probe.shards else None
    if not preflight(plan, config.shards, manifest, config.runtime, dry_run=config.dry_run):
        return None
    with claimed_run(config.storage, config.name):
        return register_result(config, train(config, plan, config.shards, manifest, probe_task=task))
