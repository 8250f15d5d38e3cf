"""Weights of other programs and saved models: arrays, tensors, and the JSON beside them."""

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuzz.kind import Attempt, Case
from fuzz.mutate import Rng, chance, damaged, damaged_json, damaged_tensors, pick
from fuzz.seeds import CLASSES, network, spec, zipped
from safetensors.torch import save

from bit_ray.config import to_dict
from bit_ray.inference.classifier import Classifier
from bit_ray.weights.folders import huggingface_files, timm_files
from bit_ray.weights.foreign import build_network, foreign_spec
from bit_ray.weights.location import DESCRIPTION_FILE
from bit_ray.weights.package import describe, load_package, save_package
from bit_ray.weights.read import read_weights
from bit_ray.weights.tensor_files import WEIGHTS_FILE, TensorFile, Weights, write_tensors
from bit_ray.weights.write import named_tensors

_MODELS = ("R1-1-1-1x0.5", "R50x1", "R1000000-1-1-1x1", "R1-1-1-1x1000000", "R50x1000000", "R9-9-9-9x64", "R0-1-1-1x1")
_WORDS = (*_MODELS, "square", "shorter_side", "../x", "@canary@/project/a.txt", 31, 32, 33, 10**5, [-1e308, 1e308])
_SHAPES = ("(10000000, 1000, 100)", "(-1, 3)", "(2, 3", "(7, 7, 3, 32)", "()", "(0,)", "(1e3,)", "(9999999999999,)")
_NAMES = ("/unit99999999/", "/unit02/", "/unit00/", "/unit1/", "/")


def _parts(folder: Path) -> tuple[TensorFile, ...]:
    return tuple(map(TensorFile.of, sorted(folder.glob("*.safetensors"))))


class Kind:
    """Files and folders in every format that weights are read from."""

    cpu_s, memory, canaries = 8.0, 2**30, {}

    def __init__(self, folder: Path) -> None:
        self.whole = folder / "whole"
        model = network()
        if not self.whole.exists():
            save_package(self.whole / "package", model, spec())
            for name in ("huggingface", "timm"):
                tensors = {key: tensor.contiguous() for key, tensor in named_tensors(model, name).items()}
                (self.whole / f"{name}.safetensors").write_bytes(save(tensors))
            (self.whole / "parts").mkdir()
            tensors = model.state_dict()
            for i in range(3):
                some = {name: tensors[name] for name in sorted(tensors)[i::3]}
                write_tensors(self.whole / "parts" / f"{i + 1}.safetensors", some)
            describe(self.whole / "parts", spec(), Weights.in_parts(_parts(self.whole / "parts")))
        self.description = json.loads((self.whole / "package" / DESCRIPTION_FILE).read_bytes())
        self.configs = {
            "huggingface": huggingface_files(spec(), model.config),
            "timm": timm_files(spec(), model.config),
        }
        # A few tensors of each program: enough to be taken for its file, and small.
        self.parts = {
            name: {key: tensor.contiguous() for key, tensor in list(named_tensors(model, name).items())[:6]}
            for name in ("npz", "big_vision", "timm", "huggingface", "bit_pytorch")
        }

    def case(self, rng: Rng) -> Case:
        """Damage something of one format."""
        make = pick(rng, (self._npz, self._safetensors, self._torch, self._folder, self._package, self._in_parts))
        name, files = make(rng)
        return Case(files, partial(self._load if name == "package" else self._read, name))

    def _in_parts(self, rng: Rng) -> tuple[str, dict[str, bytes | Path]]:
        """A package in three parts: its description is damaged, or says the truth of parts that do not fit."""
        parts = _parts(self.whole / "parts")
        files: dict[str, bytes | Path] = {part.file: self.whole / "parts" / part.file for part in parts}
        listed = [to_dict(part) for part in parts]
        action = int(rng.integers(4))
        if action == 1:  # a tensor in two parts, or in none, or of another shape
            part = pick(rng, listed)
            data = damaged_tensors(rng, (self.whole / "parts" / part["file"]).read_bytes())
            files[part["file"]] = data
            part |= {"sha256": hashlib.sha256(data).hexdigest(), "num_bytes": len(data)}
        elif action == 2:
            listed = [pick(rng, listed) for _ in range(pick(rng, (1, 2, 3, 20_000)))]
        elif action == 3:
            pick(rng, listed)["file"] = pick(rng, ("../x", "@canary@/project/a.txt", DESCRIPTION_FILE, "1.safetensors"))
        weights = {
            "file": WEIGHTS_FILE,
            "sha256": hashlib.sha256("".join(part["sha256"] for part in listed).encode()).hexdigest(),
            "num_bytes": sum(part["num_bytes"] for part in listed),
            "parts": listed,
        }
        tree = {**self.description, "weights": weights}
        data = damaged_json(rng, tree, _WORDS) if action == 0 else json.dumps(tree).encode()
        return "package", {f"package/{name}": data for name, data in (files | {DESCRIPTION_FILE: data}).items()}

    def _npz(self, rng: Rng) -> tuple[str, dict[str, bytes]]:
        arrays = {}
        for key, tensor in self.parts[pick(rng, ("npz", "big_vision"))].items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, tensor.numpy())
            arrays[f"{key}.npy"] = buffer.getvalue()
        name = pick(rng, list(arrays))
        action = int(rng.integers(4))
        if action == 0:
            shape = pick(rng, _SHAPES).encode()
            arrays[name] = re.sub(rb"'shape': \([^)]*\)", b"'shape': " + shape, arrays[name])
        elif action == 1:
            arrays[name] = damaged(rng, arrays[name], stop=128)
        elif action == 2:
            arrays[re.sub(r"/unit\d+/", pick(rng, _NAMES), name)] = arrays.pop(name)
        elif action == 3:
            arrays = {re.sub(r"/unit\d+/", pick(rng, _NAMES), key): array for key, array in arrays.items()}
        data = zipped(arrays, pick(rng, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))
        return "x.npz", {"x.npz": self._damaged(rng, data)}

    def _safetensors(self, rng: Rng) -> tuple[str, dict[str, bytes]]:
        data = save(self.parts[pick(rng, list(self.parts))], {"bit_ray.spec": json.dumps(self.description["spec"])})
        return "x.safetensors", {"x.safetensors": damaged_tensors(rng, data)}

    def _torch(self, rng: Rng) -> tuple[str, dict[str, bytes]]:
        tensors: Mapping[str, Any] = self.parts[pick(rng, ("timm", "huggingface", "bit_pytorch"))]
        state = pick(
            rng, (tensors, {"state_dict": tensors, "epoch": 3}, {f"module.{k}": v for k, v in tensors.items()})
        )
        buffer, zipfile_format = io.BytesIO(), chance(rng, 0.6)
        torch.save(state, buffer, _use_new_zipfile_serialization=zipfile_format)
        data = buffer.getvalue()
        suffix = pick(rng, (".pth", ".pt", ".bin", ".tar", ".ckpt"))
        if zipfile_format and chance(rng, 0.7):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                members = {name: archive.read(name) for name in archive.namelist()}
            name = next(name for name in members if name.endswith("data.pkl"))
            if chance(rng, 0.2):
                name = pick(rng, list(members))
            members[name] = damaged(rng, members[name], list(members.values()))
            data = zipped(members)
        else:
            data = damaged(rng, data, stop=pick(rng, (600, 2500, len(data))))
        return f"x{suffix}", {f"x{suffix}": data}

    def _folder(self, rng: Rng) -> tuple[str, dict[str, bytes | Path]]:
        program = pick(rng, list(self.configs))
        files: dict[str, bytes | Path] = {
            name: json.dumps(tree).encode() for name, tree in self.configs[program].items()
        }
        weights = self.whole / f"{program}.safetensors"
        name = pick(rng, (*files, "model.safetensors.index.json"))
        if name in files:
            tree = self.configs[program][name]
            files[name] = damaged_json(rng, tree, ("bit", "resnetv2_50x1_bit", 0, [0.0] * 3, [0.5] * 3, "squash"))
            files["model.safetensors"] = weights
        else:
            index = {"metadata": {"total_size": 1}, "weight_map": {"a": "part.safetensors", "b": "part.safetensors"}}
            words = ("part.safetensors", "../x", "@canary@/project/a.txt", "@canary@/fifo", ".", "")
            files[name] = damaged_json(rng, index, words)
            files["part.safetensors"] = weights
        return "folder", {f"folder/{name}": data for name, data in files.items()}

    def _package(self, rng: Rng) -> tuple[str, dict[str, bytes | Path]]:
        action = int(rng.integers(5))
        if action == 0:
            data = damaged(rng, json.dumps(self.description).encode())
        elif action == 1:
            data = json.dumps(
                {**self.description, "spec": {**self.description["spec"], "model": pick(rng, _MODELS)}}
            ).encode()
        else:
            data = damaged_json(rng, self.description, _WORDS)
        weights = self.whole / "package" / WEIGHTS_FILE
        return "package", {f"package/{DESCRIPTION_FILE}": data, f"package/{WEIGHTS_FILE}": weights}

    def _damaged(self, rng: Rng, data: bytes) -> bytes:
        """Damage the directory at the end of a zip, or anything, or nothing."""
        return damaged(rng, data, start=pick(rng, (0, len(data) - 500))) if chance(rng, 0.4) else data

    def _read(self, name: str, place: Path, attempt: Attempt) -> None:
        weights = read_weights(place / name)
        labels = [f"class {i}" for i in range(weights.num_classes)]
        if "class_names" in weights.spec:
            labels = []
        described = attempt(foreign_spec, weights, labels, features_only=not weights.num_classes)
        if described is None:
            return
        head = "load" if weights.num_classes else "zero"
        model = build_network(weights, described.num_classes, head=head)
        assert model.config.num_classes == len(described.class_names), "not one name for each class"
        attempt(Classifier(model, described).view, np.zeros((9, 8, 3), np.uint8))

    def _load(self, name: str, place: Path, attempt: Attempt) -> None:
        model, described = load_package(place / name)
        assert len(described.class_names) == model.config.num_classes == len(CLASSES), "not one name for each class"
        view = Classifier(model, described).view(np.zeros((9, 8, 3), np.uint8))
        assert view.shape == (described.crop_size, described.crop_size, 3), "a view of another size"
