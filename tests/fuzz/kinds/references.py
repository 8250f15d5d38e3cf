"""What a registry says of a model, and the package that it leads to."""

import hashlib
import json
from contextlib import suppress
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from fuzz.kind import Attempt, Case
from fuzz.mutate import Rng, chance, damaged, damaged_json, pick
from fuzz.object_store import ObjectStore
from fuzz.seeds import is_digest, network, spec

from bit_ray import store
from bit_ray.tracking.fetch import fetch
from bit_ray.tracking.reference import parse_reference
from bit_ray.weights.location import DESCRIPTION_FILE
from bit_ray.weights.package import save_package
from bit_ray.weights.tensor_files import WEIGHTS_FILE


class Kind:
    """``reference.json`` to a package in a folder or in an object store, and the package's ``model.json``."""

    cpu_s, memory = 8.0, 2**29

    def __init__(self, folder: Path) -> None:
        self.package = folder / "package"
        if not self.package.exists():
            save_package(self.package, network(), spec())
            self._shorten()
        self.data = (self.package / DESCRIPTION_FILE).read_bytes()
        digest = hashlib.sha256(self.data).hexdigest()
        weights_digest = json.loads(self.data)["weights"]["sha256"]
        self.reference = {
            "name": "x",
            "package_uri": "s3://bucket/package",
            "description_sha256": digest,
            "description": json.loads(self.data),
        }
        # Where a path would lead that is made of what a reference says instead of a digest.
        self.canaries = {f"victim-{digest[:8]}/work.txt": b"x", f"home/cache/models/victim-{digest[:8]}/a": b"x"}
        digests = ("0" * 64, "A" * 64, "0" * 63, f"{weights_digest}/x", f"{weights_digest}\n")
        self.words = {
            "sha256": (
                "@canary@/victim",
                "../../../canary/victim",
                "../../../canary/home/cache/models/victim",
                *digests,
            ),
            "description_sha256": (f"{digest[:8]}/../../../canary/project", *digests),
            "file": ("../model.safetensors", "@canary@/project/a.txt", "model.json", "."),
            "num_bytes": (0, -1, 2**63),
            "package_uri": (
                *("@canary@/victim", "file://@canary@/victim", "s3://bucket/hostile", "s3://bucket/../x", "s3://"),
                *("s3://key:secret@bucket/package", "s3://bucket/package?endpoint_override=127.0.0.1:9&scheme=http"),
                *("http://127.0.0.1:9/x", "ftp://x/y", "s3://bucket/package#x"),
            ),
            "name": ("../x", "a\nb"),
        }
        self.all_words = [word for words in self.words.values() for word in words]
        self.store = ObjectStore()
        for folder in ("package", "hostile"):
            for name in (DESCRIPTION_FILE, WEIGHTS_FILE):
                self.store.objects[f"{folder}/{name}"] = (self.package / name).read_bytes()

    def _shorten(self) -> None:
        """Put a few bytes in place of the weights, which nobody reads here."""
        (self.package / WEIGHTS_FILE).write_bytes(b"weights")
        description = json.loads((self.package / DESCRIPTION_FILE).read_bytes())
        description["weights"] |= {"num_bytes": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}
        (self.package / DESCRIPTION_FILE).write_text(json.dumps(description))

    def case(self, rng: Rng) -> Case:
        """Damage the reference, or the description that it leads to and vouches for."""
        reference, hostile = json.loads(json.dumps(self.reference)), self.data
        if chance(rng, 0.3):
            reference["package_uri"] = "@canary@/../seeds/package"
        if chance(rng, 0.2):
            hostile = damaged_json(rng, reference["description"], self.all_words)
            digest = hashlib.sha256(hostile).hexdigest()
            reference |= {"package_uri": "s3://bucket/hostile", "description_sha256": digest}
            with suppress(ValueError, RecursionError):
                reference["description"] = json.loads(hostile)
            data = json.dumps(reference).encode()
        elif chance(rng, 0.3):
            name = pick(rng, list(self.words))
            holder = reference if name in reference else reference["description"]["weights"]
            holder[name] = pick(rng, self.words[name])
            data = json.dumps(reference).encode()
        elif chance(rng, 0.2):
            data = damaged(rng, json.dumps(reference).encode())
        else:
            data = damaged_json(rng, reference, self.all_words)
        return Case({"reference.json": data, "hostile.json": hostile, "cache/kept": b"x"}, partial(self._fetch))

    def _fetch(self, place: Path, attempt: Attempt) -> None:
        self.store.objects[f"hostile/{DESCRIPTION_FILE}"] = (place / "hostile.json").read_bytes()
        reference = parse_reference((place / "reference.json").read_bytes())
        local = store.is_local(reference.weights_uri)
        bucket = urlsplit(reference.weights_uri).netloc
        assert local or "?" not in reference.weights_uri, "an address with a query"
        assert local or not {"@", ":"} & set(bucket), "an address with a user"
        directory = fetch(reference, place / "cache")
        for digest in (reference.sha256, reference.description_sha256):
            assert is_digest(digest), "no digest"
        assert local or directory.parent == place / "cache", "outside the cache"
        assert (directory / WEIGHTS_FILE).read_bytes() == b"weights", "other weights"
