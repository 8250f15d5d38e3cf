"""What the trainings of a study start from: shard sets, draws from them, and weights; each is read once."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from bit_ray import store
from bit_ray.data.shards.manifest import MANIFEST, Manifest, check_same_classes, read_manifest
from bit_ray.data.shards.scan import read_labels
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.embedded.catalog import is_embedded
from bit_ray.errors import ConfigError, DataError
from bit_ray.evaluation.subsets import few_shot_subset
from bit_ray.inference.features import check_single_label
from bit_ray.recipes.embedded import EMBEDDED_INIT, EMBEDDED_MODEL, EMBEDDED_NAME, GLYPHS
from bit_ray.run_folder import RunFolder
from bit_ray.studies.cells import Part
from bit_ray.tracking.address import tracking_uri
from bit_ray.tracking.config import TrackingConfig
from bit_ray.training.config import FinetuneConfig, PretrainConfig
from bit_ray.training.finetune import check_start, finetune_plan
from bit_ray.training.initial_weights import InitialWeights, read_init
from bit_ray.training.plan import TrainPlan
from bit_ray.training.pretrain import pretrain, pretrain_plan


class Inputs:
    """The sets and weights of one study.

    Args:
        storage: The user's setting; embedded data are written into it.
        tracking: The user's setting.
    """

    def __init__(self, storage: str, tracking: TrackingConfig) -> None:
        self.before = ""
        """What comes before the trainings, in words: see `pretrained`."""
        self.weights: dict[str, InitialWeights] = {}
        """Weights that were asked for, by their digest."""
        self._storage, self._tracking = storage, tracking
        self._manifests: dict[str, Manifest] = {}
        self._labels: dict[str, npt.NDArray[np.int64]] = {}
        self._init: dict[str, InitialWeights] = {}

    def manifest(self, uri: str) -> Manifest:
        """Return the manifest of a single-label set.

        Raises:
            BitRayError: there is none, or it has several labels per image.
        """
        if uri not in self._manifests:
            manifest = read_manifest(uri)
            check_single_label(manifest, uri)
            self._manifests[uri] = manifest
        return self._manifests[uri]

    def part(self, name: str) -> Part:
        """Return a whole set by its URI, or embedded data by their name, which are written first.

        Raises:
            BitRayError: there is none.
        """
        uri = store.absolute(name)
        if is_embedded(name):
            uri = store.join(store.absolute(self._storage), "shards", name.replace(":", "-"))
            if not store.exists(store.join(uri, MANIFEST)):
                write_shards(name, uri, name=name)
        return Part(uri, self.manifest(uri).digest)

    def num_examples(self, name: str) -> int:
        """Return the number of examples of a set."""
        return self.manifest(self.part(name).shards).num_examples

    def draw(self, part: Part, shots: int, seed: int) -> Part:
        """Return some examples per class of a whole set.

        Raises:
            DataError: a class has too few.
        """
        try:
            chosen = few_shot_subset(self.labels(part), shots, seed, self.manifest(part.shards).class_names)
        except DataError as error:
            raise error.renamed("shots") from None
        return replace(part, rows=tuple(chosen.tolist()))

    def split(self, part: Part, share: float, seed: int) -> tuple[Part, Part]:
        """Divide examples into those to learn from and those to select on, the same share of every class.

        Args:
            part: The examples.
            share: Share to select on; at least one of each class.
            seed: Of the draw.

        Raises:
            ConfigError: a class has only one example.
        """
        labels = self.labels(part)
        rows = np.arange(len(labels)) if part.indices is None else part.indices
        held: list[npt.NDArray[np.int64]] = []
        for number, name in enumerate(self.manifest(part.shards).class_names):
            members = rows[labels[rows] == number]
            if len(members) == 1:
                raise ConfigError.of(
                    "val_share",
                    f"class {name!r} of {part.shards} has one example, so none can be held out to select on",
                    "at least 2 of each class",
                    "add examples, or name a set by val_shards",
                )
            words = np.random.PCG64(np.random.SeedSequence((seed, number))).random_raw(len(members))
            count = min(len(members) - 1, max(1, round(share * len(members)))) if len(members) else 0
            held.append(members[np.argsort(words, kind="stable")[:count]])
        chosen = np.sort(np.concatenate(held))
        rest = np.setdiff1d(rows, chosen)
        return replace(part, rows=tuple(rest.tolist())), replace(part, rows=tuple(chosen.tolist()))

    def halves(self, part: Part, seed: int) -> tuple[Part, Part]:
        """Divide examples into two random halves.

        Raises:
            ConfigError: there is only one.
        """
        rows = np.arange(self.manifest(part.shards).num_examples) if part.indices is None else part.indices
        if len(rows) < 2:
            given = f"{part.shards} has 1 example"
            raise ConfigError.of("val_shards", given, "at least 2 to select on", "add examples")
        mixed = np.random.default_rng(seed).permutation(rows)
        first, second = np.sort(mixed[: len(mixed) // 2]), np.sort(mixed[len(mixed) // 2 :])
        return replace(part, rows=tuple(first.tolist())), replace(part, rows=tuple(second.tolist()))

    def labels(self, part: Part) -> npt.NDArray[np.int64]:
        """Return the labels ``[N]`` of the whole set of a part."""
        if part.shards not in self._labels:
            self._labels[part.shards] = read_labels(part.shards, self.manifest(part.shards))[1]
        return self._labels[part.shards]

    def init(self, uri: str) -> InitialWeights:
        """Return weights; some without tensors stand for `EMBEDDED_INIT` until it is `pretrained`.

        Raises:
            BitRayError: they are missing or damaged.
        """
        if uri not in self._init:
            if uri == EMBEDDED_INIT and not store.exists(RunFolder.of(self._storage, EMBEDDED_NAME).result):
                self.before = f"before them {EMBEDDED_NAME} is pre-trained, as in the main job"
                return InitialWeights(EMBEDDED_MODEL, {}, "0" * 64, uri)
            self._init[uri] = self._read(uri)
        init = self._init[uri]
        self.weights[init.digest] = init
        return init

    def pretrained(self) -> bool:
        """Pre-train the embedded network if weights stood for it; then all plans are to be made again.

        It takes minutes: call it when nothing else is left that could be refused.
        """
        if missing := bool(self.before):
            self._init[EMBEDDED_INIT] = self._read(EMBEDDED_INIT)
            self.before = ""
        return missing

    def _read(self, uri: str) -> InitialWeights:
        if uri == EMBEDDED_INIT:  # does what is left of it
            pretrain(
                PretrainConfig(
                    name=EMBEDDED_NAME,
                    shards=self.part("glyphs:m").shards,
                    model=EMBEDDED_MODEL,
                    recipe=GLYPHS,
                    storage=self._storage,
                    tracking=self._tracking,
                )
            )
        return read_init(uri, tracking_uri(self._tracking.uri, self._storage))

    def training(
        self, config: PretrainConfig | FinetuneConfig, rows: Sequence[int] | None = None
    ) -> tuple[TrainPlan, Part]:
        """Return the plan of a training and its examples.

        Args:
            config: The settings of the training.
            rows: Examples to train on, instead of all or of the draw that the settings ask for.

        Raises:
            BitRayError: a set or the weights are missing, or the plan is not possible.
        """
        part = self.part(config.shards)
        manifest = self.manifest(part.shards)
        if isinstance(config, FinetuneConfig) and config.shots and rows is None:
            part = self.draw(part, config.shots, config.subset_seed)
        if rows is not None:
            part = replace(part, rows=tuple(rows))
        number = manifest.num_examples if part.rows is None else len(part.rows)
        if isinstance(config, PretrainConfig):
            return pretrain_plan(config, manifest, number), part
        init = self.init(config.init) if config.init else None
        check_start(config, init)
        return finetune_plan(config, manifest, init, number), part

    def check_classes(self, part: Part, other: Part, field: str) -> None:
        """Refuse a set whose classes are not those of another.

        Args:
            part: The set to learn from.
            other: The set that is refused.
            field: The setting that names it, for the error.

        Raises:
            ConfigError: they differ.
        """
        try:
            check_same_classes(self.manifest(part.shards), self.manifest(other.shards), other.shards)
        except ConfigError as error:
            raise error.renamed(field) from None

    def tensors(self) -> dict[str, dict[str, Any]]:
        """Return the tensors of the weights that were asked for, by digest and name."""
        return {digest: dict(init.tensors) for digest, init in self.weights.items()}
