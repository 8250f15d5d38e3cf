"""The whole way from a folder of images to a registered classifier."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from bit_ray import store
from bit_ray.autotrain.config import TrainConfig
from bit_ray.autotrain.look import Looked, look
from bit_ray.autotrain.scan import PARTS, Part, source
from bit_ray.autotrain.starts import DEFAULT_WEIGHTS, Start, choose_start
from bit_ray.autotrain.thumbnails import SIDE, thumbnail_accuracy
from bit_ray.claim import claimed_run
from bit_ray.cluster.slots import num_local_cores
from bit_ray.config import digest, to_dict
from bit_ray.data.shards.manifest import Manifest, read_manifest
from bit_ray.data.shards.report import WriteReport
from bit_ray.data.shards.write import write_shards
from bit_ray.errors import BitRayError, ConfigError
from bit_ray.evaluation.evaluate import Evaluation, evaluate_model, record
from bit_ray.evaluation.linear_head import LinearHead, fit_temperature
from bit_ray.evaluation.metrics import ClassificationMetrics
from bit_ray.inference.classifier import Classifier, load_model
from bit_ray.inference.features import read_features
from bit_ray.models.network import Network
from bit_ray.models.zoo import create_model
from bit_ray.progress import console, follow
from bit_ray.recipes.hyperrule import RuleOverrides
from bit_ray.report.subject import find_subject
from bit_ray.report.write import evaluated_page
from bit_ray.run_folder import RunFolder, first_difference
from bit_ray.tracking.address import tracking_uri
from bit_ray.tracking.identity import code_revision
from bit_ray.tracking.recorded import attach
from bit_ray.tracking.registry import RegisteredModel, register
from bit_ray.tracking.runs import Input, TrackedRun
from bit_ray.training import driver
from bit_ray.training.checkpoint.directory import write_directory
from bit_ray.training.checks import check_registration
from bit_ray.training.config import FinetuneConfig, Runtime
from bit_ray.training.estimate import measure_speed
from bit_ray.training.finetune import finetune_plan
from bit_ray.training.goodput import as_duration
from bit_ray.training.initial_weights import InitialWeights, read_init
from bit_ray.training.plan import TrainPlan
from bit_ray.weights.package import ModelSpec, save_package

log = logging.getLogger(__name__)

# Larger photographs are stored with this shorter side: no view is larger.
_SHORTER_SIDE = 512
# Shares of the time that is left: for larger views, and for fine-tuning.
_VIEWS, _FINETUNE = 0.25, 0.7
# Ray, its workers and their imports, on two cores.
_STARTING_S = 30.0
_BATCHES = (512, 256, 128, 64, 32)
_LEAST_STEPS, _MOST_STEPS, _LEAST_PASSES = 100, 500, 5
# Of HyperRule below 20,000 images.
_RULE_STEPS, _RULE_RATE, _LARGEST_RATE = 500, 0.003, 0.01


@dataclass(frozen=True, kw_only=True)
class FolderResult:
    """A classifier made from a folder of images."""

    version: RegisteredModel
    """The registered model."""
    metrics: dict[str, float]
    """Test metrics, as `bit_ray.evaluation.evaluate` has them."""
    run_id: str
    """MLflow run, with pictures below ``evaluation/``."""
    choices: tuple[str, ...]
    """What was chosen, and why."""
    report: str = ""
    """URI of a page about the model, one HTML file; empty if it could not be written."""


def train(folder: str | Path, **settings: Any) -> FolderResult | None:
    """Make a classifier from a folder of images; None after a dry run.

    Args:
        folder: As `TrainConfig.folder`.
        **settings: Other fields of `TrainConfig`.

    Raises:
        BitRayError: Anything the user can fix.
    """
    config = TrainConfig(folder=str(folder), **settings)
    looked = look(config)
    return None if config.dry_run else train_on(looked)


def train_on(looked: Looked) -> FolderResult:
    """Carry out the rest of `train` after `look`."""
    config = looked.config
    check_registration(_finetune_config(config, shards="", init=""))
    uri = tracking_uri(config.tracking.uri, config.storage)
    with claimed_run(config.storage, config.name):
        return _Run(looked, uri).result()


class _Run:
    """One run: its settings, and the choices so far."""

    def __init__(self, looked: Looked, uri: str) -> None:
        self.config, self.scan, self.parts, self.started = looked.config, looked.scan, looked.parts, looked.started
        self.uri = uri
        self.folder = RunFolder.of(self.config.storage, self.config.name)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.choices = list(looked.notes)
        self.shards = {part: store.join(self.folder.uri, "data", part) for part in PARTS}
        self.start_file = store.join(self.folder.uri, "start.json")

    def say(self, choice: str) -> None:
        """Print a choice, and keep it for the record."""
        self.choices.append(choice)
        console.print(f"{self.config.name}: {choice}")

    def left(self) -> float:
        """Seconds that are left."""
        return self.config.minutes * 60 - (time.monotonic() - self.started)

    def result(self) -> FolderResult:
        """Do everything."""
        config = self.config
        self._begin()
        if store.exists(self.folder.result):
            console.print(f"{config.name}: already finished")
            return store.read_record(FolderResult, self.folder.result)
        manifests = {part: self._write(part) for part in PARTS}
        uri, size = self._earlier_start()
        start = choose_start(
            uri,
            size,
            self.shards["train"],
            manifests["train"],
            tracking_uri=self.uri,
            own_name=config.register.name,
            seed=config.seed,
            seconds=_VIEWS * self.left(),
            device=self.device,
            say=self.say,
        )
        store.write_json(self.start_file, {"uri": start.uri, "size": start.size})
        spec = ModelSpec(
            model=start.classifier.spec.model,
            num_classes=len(self.scan.class_names),
            class_names=self.scan.class_names,
            multi_label=False,
            resize_mode="square",
            resize_size=start.size,
            crop_size=start.size,
            convert_images=True,
            upright=True,
        )
        init = _initial_weights(start, self.uri)
        with TrackedRun.open(
            config.tracking,
            run_name=config.name,
            storage=store.absolute(config.storage),
            params=to_dict(config),
            tags={"bit_ray.manifest_digest": manifests["train"].digest, "bit_ray.parent": init.parent},
            kind="train",
            inputs=[self._input("training", manifests["train"]), self._input("test", manifests["test"])],
        ) as tracked:
            models = {}
            if config.method != "finetune":
                models["linear head"] = Classifier(_with_head(start), spec)
            if config.method != "head" and (tuned := self._finetune(start, init, manifests["train"], tracked)):
                models["fine-tuning"] = tuned
            best, temperature = self._choose(models, start, manifests, tracked)
            result, evaluation = self._finish(best, temperature, init, spec, manifests, tracked)
        if report := self._report(result, evaluation, manifests["test"]):
            result = replace(result, report=report)
            store.write_json(self.folder.result, to_dict(result))
        return result

    def _input(self, context: Literal["training", "test"], manifest: Manifest) -> Input:
        part: Part = "train" if context == "training" else context
        return Input(context, manifest.name, manifest.digest, self.shards[part])

    def _begin(self) -> None:
        """Record what the run is, or make sure that it is what an earlier start recorded.

        Raises:
            ConfigError: the name belongs to other images or settings.
        """
        kept = ("minutes", "init", "method", "crop_size", "random_flip", "drop_duplicates", "seed")
        images = digest([[part, image.path, image.sha256] for part in PARTS for image in self.parts[part]])
        settings = {**{name: getattr(self.config, name) for name in kept}, "images": images[:12]}
        if store.exists(self.folder.settings):
            before = store.read_json(self.folder.settings)
            if before != settings:
                field, old, new = first_difference(before if isinstance(before, dict) else {}, settings)
                raise ConfigError.of(
                    "name",
                    f"{self.config.name} was begun with {field} {old}, here it is {new}",
                    "the images and settings that it began with",
                    "choose another name, or restore them",
                )
        store.write_json(self.folder.settings, settings)

    def _earlier_start(self) -> tuple[str, int]:
        """Return weights and view: as an interrupted start chose them, as what time there was counted; else as set."""
        if store.exists(self.start_file):
            found = store.read_json(self.start_file)
            if isinstance(found, dict) and isinstance(found.get("uri"), str) and isinstance(found.get("size"), int):
                return found["uri"], found["size"]
        return self.config.init, self.config.crop_size

    def _write(self, part: Part) -> Manifest:
        with follow(f"write {part}") as progress:
            report: WriteReport = write_shards(
                source(self.scan, self.parts[part]),
                self.shards[part],
                name=f"{self.config.name} {part}",
                convert_images=True,
                upright=True,
                on_bad="skip",
                shorter_side=_SHORTER_SIDE,
                progress=progress,
            )
        for path, reason in report.skipped[:5]:
            self.say(f"left out of {part}: {path}: {reason}")
        if len(report.skipped) > 5:
            self.say(f"left out of {part}: {len(report.skipped) - 5:,} more, see {self.shards[part]}/skipped.json")
        return read_manifest(self.shards[part])

    def _finetune(
        self, start: Start, init: InitialWeights, manifest: Manifest, tracked: TrackedRun
    ) -> Classifier | None:
        """Fine-tune if there is time for it, and return the result."""
        config = self.config
        chosen = _plan(config, self.shards["train"], start, init, manifest, self.device, _FINETUNE * self.left())
        if isinstance(chosen, str):
            if config.method == "finetune":
                raise ConfigError.of(
                    "minutes", f"{config.minutes:g}, {chosen}", remedy="raise it, or use --method auto"
                )
            self.say(f"no fine-tuning: {chosen}")
            return None
        settings, plan, why = chosen
        self.say(f"fine-tuning: {why}")
        result = driver.train(settings, plan, self.shards["train"], manifest, init=init, parent_run_id=tracked.run_id)
        return load_model(result.package_uri, device=self.device)

    def _choose(
        self,
        models: Mapping[str, Classifier],
        start: Start,
        manifests: Mapping[Part, Manifest],
        tracked: TrackedRun,
    ) -> tuple[Classifier, float]:
        """Return the best by the validation images, and the temperature that calibrates it.

        What does not beat thumbnails is said to be so. The temperature is fitted on the validation images; for the
        linear head also on the training images, as the folds that they were not in classified them: with a few
        validation images alone it would make the calibration worse.
        """
        scored, head = {}, start.head
        for name, classifier in models.items():
            found = read_features(classifier, self.shards["val"], manifests["val"])
            logits = _logits(classifier, found.features)
            scored[name] = float((logits.argmax(1) == found.labels).mean()), logits, found.labels
        best = max(scored, key=lambda name: scored[name][0])
        accuracy, logits, labels = scored[best]
        others = [f"{name} has {scored[name][0]:.1%}" for name in scored if name != best]
        compared = f", {', '.join(others)}" if others else ""
        self.say(f"chosen: {best}, {accuracy:.1%} of {len(labels):,} validation images{compared}")
        sets = (self.shards["train"], manifests["train"]), (self.shards["val"], manifests["val"])
        by_thumbnails = thumbnail_accuracy(*sets, seed=self.config.seed)
        if by_thumbnails >= accuracy:
            is_open = accuracy < 1 and DEFAULT_WEIGHTS not in start.uri
            known = f"; weights trained on photographs may, --init {DEFAULT_WEIGHTS}" if is_open else ""
            self.say(
                f"no gain: a support vector machine on thumbnails of {SIDE} x {SIDE} pixels has {by_thumbnails:.1%} of "
                f"the validation images, so these weights do not help with such images{known}"
            )
        temperature, before, after, said = _calibrated(logits, labels, head if best == "linear head" else None)
        self.say(said)
        found_metrics = {f"val/top_1_{name.replace(' ', '_').replace('-', '_')}": scored[name][0] for name in scored}
        found_metrics["val/top_1_thumbnails"] = by_thumbnails
        tracked.log_metrics({**found_metrics, "val/ece_before": before, "val/ece": after}, step=0)
        return models[best], temperature

    def _finish(
        self,
        classifier: Classifier,
        temperature: float,
        init: InitialWeights,
        spec: ModelSpec,
        manifests: Mapping[Part, Manifest],
        tracked: TrackedRun,
    ) -> tuple[FolderResult, Evaluation]:
        """Test once, save, record and register."""
        config, train_set = self.config, manifests["train"]
        network = create_model(spec.model, spec.num_classes)
        network.load_state_dict(classifier.model.state_dict())
        for parameter in network.head.parameters():
            parameter.data /= temperature
        spec = replace(
            spec,
            recipe={"choices": list(self.choices), "temperature": temperature},
            provenance={
                "manifest_digest": train_set.digest,
                "code_revision": code_revision(),
                "parent": init.parent,
                "parent_digest": init.digest,
                "data": f"{train_set.name}: {train_set.num_examples:,} images of {train_set.num_classes:,} classes",
                "run_id": tracked.run_id,
                "run_name": config.name,
            },
        )
        evaluation = evaluate_model(
            Classifier(network.to(self.device), spec), self.shards["test"], manifests["test"], None
        )
        record(tracked, evaluation, manifests["test"], step=0)
        tracked.log_text("\n".join(self.choices) + "\n", "choices.txt")
        found = evaluation.metrics
        # What MLflow's page of the run says first.
        about = (
            f"{found['top_1']:.1%} top-1 on {found['num_examples']:,.0f} test images of {spec.num_classes:,} classes. "
            "Below Artifacts: `report.html`, the page about the model, and `choices.txt`."
        )
        tracked.set_tags({"mlflow.note.content": about})
        package = store.join(self.folder.uri, "model")
        write_directory(package, lambda directory: save_package(directory, network, spec))
        version = register(
            package,
            name=config.register.name,
            alias=config.register.alias,
            tracking_uri=self.uri,
            run_id=tracked.run_id,
        )
        result = FolderResult(
            version=version, metrics=evaluation.metrics, run_id=tracked.run_id, choices=tuple(self.choices)
        )
        store.write_json(self.folder.result, to_dict(result))
        return result, evaluation

    def _report(self, result: FolderResult, evaluation: Evaluation, test_set: Manifest) -> str:
        """Write the page about the model, next to it and into its run; return its URI, empty if that fails.

        The model is trained and registered already: a page that cannot be written is no reason to fail.
        """
        uri = store.join(self.folder.uri, "report.html")
        try:
            subject = find_subject(
                f"models:/{result.version.name}/{result.version.version}",
                storage=self.config.storage,
                tracking_uri=self.uri,
                device=self.device,
            )
            page = evaluated_page(subject, self.shards["test"], test_set, evaluation)
            store.write_bytes(uri, page)
            attach(self.uri, result.run_id, page, "report.html")
        except BitRayError as error:
            log.warning("%s: no page about the model: %s", self.config.name, error)
            return ""
        return uri


def _plan(
    config: TrainConfig,
    shards: str,
    start: Start,
    init: InitialWeights,
    manifest: Manifest,
    device: str,
    seconds: float,
) -> tuple[FinetuneConfig, TrainPlan, str] | str:
    """Return settings and plan of a fine-tuning that takes at most some seconds, with a reason; or why not.

    The learning rate keeps HyperRule's sum over the steps, up to 0.01.
    """
    settings = _finetune_config(config, shards=shards, init=init.parent)
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


def _finetune_config(config: TrainConfig, *, shards: str, init: str) -> FinetuneConfig:
    """The settings of the fine-tuning below the run's folder."""
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


def _initial_weights(start: Start, uri: str) -> InitialWeights:
    """The start's weights, negated where it sees negatives."""
    init = read_init(start.uri, uri)
    if not start.inverted:
        return init
    network: Network = start.classifier.model
    tensors = {name: tensor.cpu() for name, tensor in network.state_dict().items()}
    return replace(init, tensors=tensors, parent=f"{init.parent}, inverted")


def _with_head(start: Start) -> Network:
    """The start's network with its linear head."""
    num_classes = len(start.head.bias)
    network = create_model(start.classifier.spec.model, num_classes)
    tensors = {name: t for name, t in start.classifier.model.state_dict().items() if not name.startswith("head.")}
    tensors["head.weight"] = torch.from_numpy(start.head.kernel)
    tensors["head.bias"] = torch.from_numpy(start.head.bias)
    network.load_state_dict(tensors)
    return network.to(start.classifier.device)


def _logits(classifier: Classifier, features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    head = classifier.model.head
    weight, bias = head.weight.detach().cpu().numpy(), head.bias.detach().cpu().numpy()
    return features @ weight.T + bias


def _calibrated(
    logits: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], head: LinearHead | None
) -> tuple[float, float, float, str]:
    """Return the temperature, the calibration error before and after it, and what is said of them.

    Args:
        logits: Of the validation images.
        labels: Theirs.
        head: The linear head that they are of; its folds then count, too.
    """
    which = f"{len(labels):,} validation images"
    if head is not None:
        logits, labels = np.concatenate([logits, head.held_out]), np.concatenate([labels, head.labels])
        which += f" and {len(head.labels):,} cross-validated ones"
    temperature = fit_temperature(logits, labels)
    before, after = _calibration_error(logits, labels), _calibration_error(logits / temperature, labels)
    error = f"the error of the probabilities (ECE) of {which}"
    if temperature == 1:
        said = f"none, as its gain is below its standard error; {error} is {after:.1%}"
    else:
        said = f"logits divided by {temperature:.3g}; {error} was {before:.1%} and is {after:.1%}"
    return temperature, before, after, f"calibration: {said}"


def _calibration_error(logits: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> float:
    metrics = ClassificationMetrics(logits.shape[1], multi_label=False)
    metrics.update(torch.from_numpy(logits), torch.from_numpy(labels))
    return metrics.result()["ece"]
