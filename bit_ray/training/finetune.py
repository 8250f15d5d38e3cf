"""Transfer: fine-tune pre-trained weights on a shard set by BiT-HyperRule."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

from bit_ray import store
from bit_ray.claim import claimed_run
from bit_ray.cluster.slots import Resources
from bit_ray.data.shards.manifest import MANIFEST, Manifest, check_same_classes, read_manifest
from bit_ray.data.shards.read import read_tables, to_examples
from bit_ray.data.shards.scan import read_labels
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.base import Example
from bit_ray.errors import ConfigError, DataError
from bit_ray.evaluation.evaluate import evaluate_model, record
from bit_ray.evaluation.subsets import Subset, few_shot_subset, load_subset, save_subset
from bit_ray.inference.classifier import load_model
from bit_ray.recipes.hyperrule import hyperrule
from bit_ray.run_folder import RunFolder
from bit_ray.tracking.address import tracking_uri
from bit_ray.tracking.runs import Input, TrackedRun
from bit_ray.training.checks import check_registration, check_settings, preflight
from bit_ray.training.config import FinetuneConfig, check_train
from bit_ray.training.driver import Trained, TrainResult, finished, register_result, train
from bit_ray.training.initial_weights import InitialWeights, read_init
from bit_ray.training.plan import TrainPlan, transfer_plan


def draw_few_shot(shards: str, manifest: Manifest, shots: int, seed: int) -> Subset:
    """Draw a few-shot subset.

    Raises:
        DataError: A class has too few examples.
        ConfigError: The set is multi-label.
    """
    if manifest.multi_label:
        given = f"{shots} of a set with several labels per image"
        raise ConfigError.of("shots", given, "0: a few-shot subset needs one label per image", "leave it out")
    ids, labels = read_labels(shards, manifest)
    try:
        chosen = few_shot_subset(labels, shots, seed, class_names=manifest.class_names)
    except DataError as error:
        raise error.renamed("shots") from None
    return Subset(manifest_digest=manifest.digest, k=shots, seed=seed, ids=tuple(ids[i] for i in sorted(chosen)))


def write_few_shot(shards: str, manifest: Manifest, shots: int, seed: int, output: str) -> None:
    """Draw a few-shot subset and write it as a separate shard set, with its index file next to it.

    Raises:
        DataError: A class has too few examples.
        ConfigError: The set is multi-label.
    """
    index_uri, subset_uri = store.join(output, "subset.json"), store.join(output, "shards")
    if store.exists(store.join(subset_uri, MANIFEST)):
        subset = load_subset(index_uri, manifest.digest)
        if (subset.k, subset.seed) != (shots, seed):
            given = f"{shots} with subset_seed {seed}"
            accepted = f"{subset.k} with subset_seed {subset.seed}, as this run began"
            raise ConfigError.of("shots", given, accepted, "choose another name")
        return
    subset = draw_few_shot(shards, manifest, shots, seed)
    save_subset(subset, index_uri)
    wanted = frozenset(subset.ids)

    def examples() -> Iterator[Example]:
        whole = (example for table in read_tables(shards, manifest) for example in to_examples(table))
        yield from (example for example in whole if example.id in wanted)

    write_shards(
        examples(),
        subset_uri,
        name=f"{manifest.name}, {shots} per class, seed {seed}",
        class_names=manifest.class_names,
        convert_images=manifest.convert_images,
        upright=manifest.upright,  # its images are upright already; the model must turn those it is shown
        row_group_size=manifest.row_group_size,
    )


def finetune_plan(
    config: FinetuneConfig, manifest: Manifest, init: InitialWeights | None, num_examples: int
) -> TrainPlan:
    """Resolve BiT-HyperRule for some examples of a set.

    Args:
        config: The user's settings.
        manifest: Of the full task; its images' size counts, whatever is drawn from it.
        init: Weights to start from; None: from scratch.
        num_examples: Examples that are trained on.

    Raises:
        ConfigError: a setting is out of range.
    """
    model = init.model if init else config.model
    rule = hyperrule(
        num_examples,
        manifest.median_image_size,
        config.profile,
        model,
        random_crop=config.random_crop,
        random_flip=config.random_flip,
        overrides=config.rule,
    )
    return transfer_plan(
        rule,
        model=model,
        num_classes=manifest.num_classes,
        multi_label=manifest.multi_label,
        manifest_digest=manifest.digest,
        init=config.init,
        init_digest=init.digest if init else "",
        seed=config.seed,
        shuffle=config.shuffle,
        train=config.train,
        norm_batch=config.norm_batch,
    )


def check_start(config: FinetuneConfig, init: InitialWeights | None) -> None:
    """Refuse weights of another network than the given one, no weights and no network, or a part that needs weights.

    Args:
        config: The user's settings.
        init: Weights to start from, as ``config.init`` says.

    Raises:
        ConfigError: one of these.
    """
    if init is not None and config.model and config.model != init.model:
        given = f"{config.model}, but the weights in {config.init} are of {init.model}"
        raise ConfigError.of("model", given, remedy="leave it out")
    if init is None and not config.model:
        given = "empty, and model is empty"
        raise ConfigError.of("init", given, "weights to start from, or a model to train from scratch", "give one")
    check_train(config.train, config.init)


def finetune(config: FinetuneConfig) -> Trained | None:
    """Fine-tune, evaluate, record and register; None after a dry run.

    Raises:
        BitRayError: Anything the user can fix.
    """
    check_registration(config)
    manifest = read_manifest(config.shards)
    test_manifest = read_manifest(config.test_shards) if config.test_shards else None
    if test_manifest is not None:
        check_same_classes(manifest, test_manifest, config.test_shards)
    init = None
    if config.init:
        init = read_init(config.init, tracking_uri(config.tracking.uri, config.storage))
    check_start(config, init)
    with nullcontext() if config.dry_run else claimed_run(config.storage, config.name):
        return _finetune(config, manifest, test_manifest, init)


def _finetune(
    config: FinetuneConfig, manifest: Manifest, test_manifest: Manifest | None, init: InitialWeights | None
) -> Trained | None:
    shards, subset = config.shards, ""
    num_examples = config.shots * manifest.num_classes if config.shots else manifest.num_examples
    plan = finetune_plan(config, manifest, init, num_examples)
    check_settings(plan, config.runtime)  # before anything is written under this name
    if config.shots and config.dry_run:
        drawn = draw_few_shot(config.shards, manifest, config.shots, config.subset_seed)
        subset = f"{config.shots} of each class, {len(drawn.ids):,} images, drawn by seed {config.subset_seed}"
    elif config.shots:
        output = RunFolder.of(config.storage, config.name).few_shot
        write_few_shot(config.shards, manifest, config.shots, config.subset_seed, output)
        shards = store.join(output, "shards")
        manifest = read_manifest(shards)
        plan = replace(plan, manifest_digest=manifest.digest)
    if config.dry_run and not subset:  # whose digest is not known
        finished(config, plan)  # or the name has other settings
    if not preflight(plan, shards, manifest, config.runtime, dry_run=config.dry_run, subset=subset):
        return None

    def test(result: TrainResult, run: TrackedRun, resources: Resources) -> dict[str, float]:
        if test_manifest is None:
            return {}
        classifier = load_model(result.package_uri)
        evaluation = evaluate_model(classifier, config.test_shards, test_manifest, resources)
        record(run, evaluation, test_manifest, step=plan.schedule.num_steps)
        return evaluation.metrics

    inputs = []
    if test_manifest is not None:
        inputs.append(Input("test", test_manifest.name, test_manifest.digest, store.absolute(config.test_shards)))
    return register_result(config, train(config, plan, shards, manifest, init=init, test=test, inputs=inputs))
