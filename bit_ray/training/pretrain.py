"""Upstream pre-training: a recipe meets a shard set."""

from dataclasses import dataclass, field, replace

from bit_ray.config import to_dict
from bit_ray.data.augment import TrainView
from bit_ray.data.manifest import Manifest, read_manifest
from bit_ray.data.order import Shuffle
from bit_ray.recipes.upstream import UpstreamRecipe, bit_m
from bit_ray.tracking.registry import check_name
from bit_ray.tracking.runs import TrackingConfig
from bit_ray.training.launch import RegisterAs, Trained, preflight, register_result, train
from bit_ray.training.plan import Runtime, TrainPlan


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Pre-train a BiT network on a shard set."""

    name: str
    """Name of the run; starting again with the same name continues it."""
    shards: str
    """Shard set to train on: a folder, s3://... or gs://..."""
    model: str = "R50x1"
    """Network: R26x1 R50x1 R50x3 R101x1 R101x3 R152x1 R152x2 R152x4, or a size of your own such as R1-1-1-1x0.5."""
    recipe: UpstreamRecipe = field(default_factory=bit_m)
    """What the paper says, or your own."""
    storage: str = "bit_ray_runs"
    """Folder of all runs, or s3://...; on a cluster of several nodes it must be one that all of them reach."""
    seed: int = 0
    """Seed of the initial weights, the order, the views and MixUp."""
    mixup_alpha: float = 0.0
    """MixUp's parameter; the paper found no use for it upstream (§2.2)."""
    clip_norm: float = 0.0
    """Largest global gradient norm; 0: off."""
    head_bias: float = 0.0
    """Initial bias of the head; big_vision starts sigmoid training at -10."""
    shuffle: Shuffle = field(default_factory=Shuffle)
    """How far apart examples are mixed."""
    runtime: Runtime = field(default_factory=Runtime)
    """How the plan is carried out; none of it changes what is learnt."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the run is recorded."""
    register: RegisterAs = field(default_factory=RegisterAs)
    """Where the finished model is registered."""
    dry_run: bool = False
    """Print the resolved plan and stop."""


def pretrain_plan(config: PretrainConfig, manifest: Manifest) -> TrainPlan:
    """Resolve the recipe against the data at hand.

    Raises:
        ConfigError: The recipe does not fit the data: fewer steps than the warm-up, softmax with several labels.
    """
    recipe = config.recipe
    return TrainPlan(
        kind="pretrain",
        model=config.model,
        num_classes=manifest.num_classes,
        manifest_digest=manifest.digest,
        num_examples=manifest.num_examples,
        view=TrainView(
            crop="inception",
            crop_size=recipe.crop_size,
            area_range=recipe.area_range,
            aspect_range=recipe.aspect_range,
            random_flip=recipe.random_flip,
        ),
        resize_mode="shorter_side",
        # 256 for a crop of 224 (big_vision:configs/bit_i21k.py), and in that proportion for other sizes.
        resize_size=round(recipe.crop_size * 256 / 224),
        loss=recipe.loss_for(manifest.multi_label),
        schedule=recipe.schedule(manifest.num_examples),
        global_batch_size=recipe.global_batch_size,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        mixup_alpha=config.mixup_alpha,
        clip_norm=config.clip_norm,
        head_bias=config.head_bias,
        seed=config.seed,
        shuffle=config.shuffle,
        recipe=to_dict(recipe),
    )


def pretrain(config: PretrainConfig) -> Trained | None:
    """Pre-train, record and register; None after a dry run.

    Raises:
        BitRayError: Anything the user can put right.
    """
    check_name(config.register.name or config.name, config.register.alias)
    manifest = read_manifest(config.shards)
    plan = pretrain_plan(config, manifest)
    if not preflight(plan, config.shards, manifest, config.runtime, dry_run=config.dry_run):
        return None
    result = train(
        plan,
        name=config.name,
        storage=config.storage,
        shards=config.shards,
        manifest=manifest,
        runtime=config.runtime,
        tracking=config.tracking,
        config=to_dict(replace(config, dry_run=False)),
    )
    return register_result(result, config.name, config.register, config.tracking, config.storage)
