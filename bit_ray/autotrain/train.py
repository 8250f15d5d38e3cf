"""The whole way from a folder of images to a registered classifier."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from bit_ray import store
from bit_ray.autotrain.choice import choose
from bit_ray.autotrain.config import TrainConfig
from bit_ray.autotrain.finetune import finetune_config, finetune_in_time
from bit_ray.autotrain.look import Looked, look
from bit_ray.autotrain.scan import PARTS, Part, source
from bit_ray.autotrain.starts import Start, choose_start, initial_weights, with_head
from bit_ray.claim import claimed_run
from bit_ray.config import digest, to_dict
from bit_ray.data.shards.manifest import Manifest, read_manifest
from bit_ray.data.shards.report import WriteReport
from bit_ray.data.shards.write import write_shards
from bit_ray.errors import BitRayError, ConfigError
from bit_ray.evaluation.evaluate import Evaluation, evaluate_model, record
from bit_ray.inference.classifier import Classifier, load_model
from bit_ray.models.zoo import create_model
from bit_ray.progress import console, follow
from bit_ray.report.subject import find_subject
from bit_ray.report.write import evaluated_page
from bit_ray.run_folder import RunFolder, first_difference
from bit_ray.tracking.address import tracking_uri
from bit_ray.tracking.identity import code_revision
from bit_ray.tracking.recorded import attach
from bit_ray.tracking.registry import RegisteredModel, register
from bit_ray.tracking.runs import Input, TrackedRun, send_kept
from bit_ray.training import driver
from bit_ray.training.checkpoint.directory import write_directory
from bit_ray.training.checks import check_registration
from bit_ray.training.initial_weights import InitialWeights
from bit_ray.weights.package import ModelSpec, save_package

log = logging.getLogger(__name__)

# Larger photographs are stored with this shorter side: no view is larger.
_SHORTER_SIDE = 512
# Share of the time that is left for larger views.
_VIEWS = 0.25


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
    check_registration(finetune_config(config, shards="", init=""))
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
            done = store.read_record(FolderResult, self.folder.result)
            send_kept(config.tracking, config.storage, done.run_id)
            console.print(f"{config.name}: already finished")
            return done
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
        init = initial_weights(start, self.uri)
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
                models["linear head"] = Classifier(with_head(start), spec)
            if config.method != "head" and (tuned := self._finetune(start, init, manifests["train"], tracked)):
                models["fine-tuning"] = tuned
            best, temperature, measured = choose(models, start, self.shards, manifests, seed=config.seed, say=self.say)
            tracked.log_metrics(measured, step=0)
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
        """Return weights and view: those that an interrupted start chose, else those that are set."""
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
        chosen = finetune_in_time(config, self.shards["train"], start, init, manifest, self.device, self.left())
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
