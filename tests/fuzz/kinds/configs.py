"""Settings: of runs, plans and lists of examples, as JSON and YAML."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from fuzz.kind import Attempt, Case
from fuzz.mutate import Rng, chance, damaged, damaged_json, pick

from bit_ray.config import digest, from_dict, to_dict
from bit_ray.config_files import read_config
from bit_ray.data.images.views import TrainView
from bit_ray.data.shards.manifest import Manifest, Shard, write_manifest
from bit_ray.data.sources.vtab.index import load_index, read_index
from bit_ray.data.sources.vtab.tasks import find_task
from bit_ray.data.stream.history import read_plan
from bit_ray.evaluation.config import EvaluateConfig
from bit_ray.recipes.schedules import Schedule
from bit_ray.training.config import FinetuneConfig, PretrainConfig
from bit_ray.training.plan import TrainPlan

_CONFIGS = (
    PretrainConfig(name="x", shards="y"),
    FinetuneConfig(name="x", shards="y", init="z"),
    EvaluateConfig(model="x", shards="y"),
)
_YAML = (
    *(
        b"&a [*a, *a]",
        b"!!python/object/apply:os.system [x]",
        b"!!binary x",
        b"? [a]\n: b",
        b"{<<: {a: 1}}",
        b"2001-01-01",
    ),
    *(
        b"0x" + b"f" * 6000,
        b"0o7",
        b"1_000",
        b"1:30:00",
        b".nan",
        b".inf",
        b"~",
        b"yes",
        b"- - - -",
        b"{" * 2000,
        b"\t",
    ),
    *(b"%TAG ! x", b"--- a\n--- b", b"|\n  x", b"!!set {a}", b"!!omap [a: 1]", b"\xff\xfe", b"a: " * 500),
)


class Kind:
    """Files that a user or another program has written, read strictly."""

    cpu_s, memory, canaries = 8.0, 2**29, {}

    def __init__(self, folder: Path) -> None:
        shards = (
            Shard(path="shard-00000.parquet", num_examples=8, num_bytes=999, sha256="0" * 64, checksums="0" * 16),
        )
        self.manifest = Manifest(
            name="x",
            class_names=("a", "b"),
            multi_label=False,
            row_group_size=4,
            median_image_size=(9, 9),
            num_examples=8,
            shards=shards,
        )
        plan = TrainPlan(
            kind="pretrain",
            model="R1-1-1-1x0.5",
            num_classes=2,
            manifest_digest=self.manifest.digest,
            num_examples=8,
            view=TrainView(crop="inception", crop_size=32),
            resize_mode="shorter_side",
            resize_size=37,
            loss="softmax",
            schedule=Schedule(base_lr=0.1, num_steps=10, warmup_steps=5, boundaries=(5, 7)),
            global_batch_size=4,
        )
        self.configs = [*_CONFIGS, plan]
        self.task = find_task("cifar100")
        self.index = {"format": 1, "task": "cifar100", "origin": "x", "train": ["a", "b"], "val": ["c"], "test": []}
        self.set = folder / "set"
        if not self.set.exists():
            write_manifest(self.set, self.manifest)
        self.run = {"plan": to_dict(plan), "shards": "@canary@/../seeds/set"}

    def case(self, rng: Rng) -> Case:
        """Damage one of them."""
        action = int(rng.integers(5))
        if action < 3:
            config = pick(rng, self.configs)
            suffix = pick(rng, (".json", ".yaml"))
            data = self._data(rng, to_dict(config), suffix)
            return Case({f"config{suffix}": data}, partial(self._config, type(config), suffix))
        if action == 3:
            return Case({"plan.json": self._data(rng, self.run, ".json")}, self._plan)
        if chance(rng, 0.5):
            return Case({"cifar100.json": self._data(rng, self.index, ".json")}, self._index)
        lists = {f"cifar100/{name}": damaged(rng, b"a 1\nb 2\n\nc 3\n") for name in ("train800.txt", "val200.txt")}
        return Case(lists, self._lists)

    def _data(self, rng: Rng, tree: Any, suffix: str) -> bytes:
        action = int(rng.integers(4))
        if action == 0:
            text = yaml.safe_dump(tree) if suffix == ".yaml" else json.dumps(tree)
            return damaged(rng, text.encode())
        if action == 1 and suffix == ".yaml":
            lines = yaml.safe_dump(tree).encode().splitlines()
            at = int(rng.integers(len(lines)))
            lines[at] = lines[at].partition(b":")[0] + b": " + pick(rng, _YAML)
            return b"\n".join(lines)
        return damaged_json(rng, tree, ("inception", "resize", 31, 33, "stages:2", "bit_l", "R50x1", "a" * 64))

    def _config(self, cls: type, suffix: str, place: Path, attempt: Attempt) -> None:
        config = read_config(cls, place / f"config{suffix}")
        assert len(digest(config)) == 64, "no digest"
        assert from_dict(cls, to_dict(config)) == config, "another config when written and read again"

    def _plan(self, place: Path, attempt: Attempt) -> None:
        plan, _, manifest = read_plan(place)
        assert len(list(plan.order(manifest).rows_of_step(1))) == plan.global_batch_size, "another step"

    def _index(self, place: Path, attempt: Attempt) -> None:
        index = load_index(place / "cifar100.json", self.task)
        assert min(len(index.train), len(index.val)) > 0, "an index of nothing"

    def _lists(self, place: Path, attempt: Attempt) -> None:
        index = read_index(place, self.task)
        assert min(len(index.train), len(index.val)) > 0, "an index of nothing"
