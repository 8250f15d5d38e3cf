"""Checkpoints of trainings: what continues a run, in one file or in parts."""

import hashlib
import json
from pathlib import Path

import torch
from fuzz.kind import Attempt, Case
from fuzz.mutate import Rng, damaged_json, damaged_tensors, pick
from fuzz.seeds import CLASSES, MODEL, spec

from bit_ray.data.images.views import TrainView
from bit_ray.models.zoo import create_model
from bit_ray.recipes.schedules import Schedule
from bit_ray.run_folder import TRAINING_FILE
from bit_ray.training.checkpoint.state import (
    OPTIMIZER_FILE,
    Position,
    checkpoint_tensors,
    load_checkpoint,
    save_checkpoint,
    write_checkpoint_record,
)
from bit_ray.training.optimizer import build_optimizer
from bit_ray.training.plan import TrainPlan
from bit_ray.weights.package import describe
from bit_ray.weights.tensor_files import TensorFile, Weights, write_tensors

_NAMES = ("../x", "@canary@/project/a.txt", "@canary@/fifo", "", ".", TRAINING_FILE, "model-1.safetensors")
_WORDS = (*_NAMES, "optimizer-1.safetensors", "0" * 64, 9, 10, 11)
_PLAN = TrainPlan(
    kind="pretrain",
    model=MODEL,
    num_classes=len(CLASSES),
    manifest_digest="0" * 64,
    num_examples=8,
    view=TrainView(crop="inception", crop_size=32),
    resize_mode="shorter_side",
    resize_size=40,
    loss="softmax",
    schedule=Schedule(base_lr=0.1, num_steps=10),
    global_batch_size=4,
)
_POSITION = Position(next_step=3, train_s=1.5, recent=(1.0, 0.9, 0.8))


class Kind:
    """The record of a checkpoint, and the state of its optimizer."""

    cpu_s, memory, canaries = 8.0, 2**30, {}

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.model = create_model(MODEL, len(CLASSES))
        self.optimizer = build_optimizer(self.model, _PLAN)
        self.whole, self.parts = folder / "whole", folder / "parts"
        if not self.parts.exists():
            self.whole.mkdir(parents=True)
            save_checkpoint(self.whole, self.model, spec(), self.optimizer, _PLAN, _POSITION)
            self.parts.mkdir()
            files: dict[str, list[TensorFile]] = {"optimizer": [], "model": []}
            for kind, tensors in zip(files, checkpoint_tensors(self.model, self.optimizer), strict=True):
                for i in range(2):
                    path = self.parts / f"{kind}-{i + 1}.safetensors"
                    write_tensors(path, {name: tensors[name] for name in sorted(tensors)[i::2]})
                    files[kind].append(TensorFile.of(path))
            describe(self.parts, spec(), Weights.in_parts(tuple(files["model"])))
            write_checkpoint_record(self.parts, _PLAN, _POSITION, {"loss": 0.8}, tuple(files["optimizer"]))

    def case(self, rng: Rng) -> Case:
        """Damage the record or a file of the state; a hostile record vouches for that."""
        whole = pick(rng, (self.whole, self.parts))
        files: dict[str, bytes | Path] = {path.name: path for path in whole.iterdir()}
        record = json.loads((whole / TRAINING_FILE).read_bytes())
        optimizer = [file["file"] for file in record["optimizer"]] or [OPTIMIZER_FILE]
        action = int(rng.integers(4))
        if action == 0:
            files[TRAINING_FILE] = damaged_json(rng, record, _WORDS)
        elif action == 1:
            progress = damaged_json(rng, {"progress": record.pop("progress")}, _WORDS)
            files[TRAINING_FILE] = json.dumps(record)[:-1].encode() + b", " + progress[1:]
        elif action == 2:
            listed = [pick(rng, record["optimizer"] or [{}]) for _ in range(pick(rng, (1, 2, 20_000)))]
            pick(rng, listed)["file"] = pick(rng, _NAMES)
            files[TRAINING_FILE] = json.dumps({**record, "optimizer": listed}).encode()
        else:
            name = pick(rng, optimizer)
            files[name] = data = damaged_tensors(rng, (whole / name).read_bytes())
            for file in record["optimizer"]:
                if file["file"] == name:
                    file |= {"sha256": hashlib.sha256(data).hexdigest(), "num_bytes": len(data)}
            files[TRAINING_FILE] = json.dumps(record).encode()
        return Case(files, self._load)

    def _load(self, place: Path, attempt: Attempt) -> None:
        position = load_checkpoint(place, self.model, self.optimizer, _PLAN)
        assert 0 <= position.next_step <= _PLAN.schedule.num_steps, "a step that the plan has not"
