"""What lies beside the shards of a set: manifest.json, _writing.json and skipped.json."""

import json
from functools import partial
from pathlib import Path, PurePosixPath

from fuzz.kind import Attempt, Case
from fuzz.mutate import Rng, chance, damaged, damaged_json, pick
from fuzz.seeds import CLASSES, encoded, is_digest, picture

from bit_ray.data.shards.inspect import inspect_shards
from bit_ray.data.shards.manifest import MANIFEST, SKIPPED, WRITING, read_manifest
from bit_ray.data.shards.read import read_rows
from bit_ray.data.shards.write import write_shards
from bit_ray.data.stream.order import Order

_OPTIONS = {"name": "x", "row_group_size": 2, "shard_examples": 4, "on_bad": "skip"}
_WORDS = (
    "shard-00000.parquet",
    "../set/shard-00000.parquet",
    "0" * 64,
    "f" * 63,
    "F" * 64,
    "@canary@/project/a",
    "ant",
)


class Kind:
    """JSON of a shard set, read and then used."""

    cpu_s, memory, canaries = 8.0, 2**29, {}

    def __init__(self, folder: Path) -> None:
        self.images, self.set = folder / "images", folder / "set"
        if not self.set.exists():
            for i in range(9):
                path = self.images / CLASSES[i % 3] / f"{i}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encoded(picture(8 + i, 9, i)) if i else b"no image")
            write_shards(self.images, self.set, **_OPTIONS)
        self.manifest = json.loads((self.set / MANIFEST).read_bytes())
        self.skipped = json.loads((self.set / SKIPPED).read_bytes())
        self.shards = sorted(path.name for path in self.set.glob("*.parquet"))
        self.writing = self._begun(folder)

    def _begun(self, folder: Path) -> dict:
        """What a run leaves that is stopped before its manifest."""
        begun = folder / "begun.json"
        if not begun.exists():

            class Stopped(BaseException):
                pass

            def stop(done: int, total: int | None) -> None:
                if done >= 8:
                    raise Stopped

            try:
                write_shards(self.images, folder / "stopped", **_OPTIONS, progress=stop)
            except Stopped:
                begun.write_bytes((folder / "stopped" / WRITING).read_bytes())
        return json.loads(begun.read_bytes())

    def case(self, rng: Rng) -> Case:
        """Damage one of the three."""
        name, tree, check = pick(
            rng,
            (
                *[(MANIFEST, self.manifest, self._use)] * 6,
                (MANIFEST, self.manifest, self._write_again),
                (SKIPPED, self.skipped, self._write_again),
                (WRITING, self.writing, self._write_again),
            ),
        )
        if chance(rng, 0.2):
            data = damaged(rng, json.dumps(tree).encode())
        else:
            data = damaged_json(rng, tree, _WORDS)
        files: dict[str, bytes | Path] = {f"set/{shard}": (self.set / shard).read_bytes() for shard in self.shards}
        if name == SKIPPED:
            files[f"set/{MANIFEST}"] = json.dumps(self.manifest).encode()
        return Case({**files, f"set/{name}": data}, partial(check))

    def _use(self, place: Path, attempt: Attempt) -> None:
        uri = place / "set"
        manifest = read_manifest(uri)
        for number, shard in enumerate(manifest.shards):
            path = PurePosixPath(shard.path)
            assert not {"/", ".."} & set(path.parts), "a shard outside its set"
            assert is_digest(shard.sha256), "no digest"
            assert manifest.row_groups(number) >= 0, "less than no row groups"
        assert manifest.num_classes == len(manifest.class_names), "not a name for each class"
        assert is_digest(manifest.digest), "no digest"
        order = attempt(
            Order,
            shard_sizes=[shard.num_examples for shard in manifest.shards],
            row_group_size=manifest.row_group_size,
            global_batch_size=4,
            seed=0,
        )
        if order is not None:
            assert len(list(order.rows_of_step(3))) == 4, "a step of another size"
        attempt(read_rows, str(uri), manifest, 0, [0])
        attempt(inspect_shards, uri)

    def _write_again(self, place: Path, attempt: Attempt) -> None:
        report = write_shards(self.images, place / "set", **_OPTIONS)
        assert all(isinstance(text, str) for pair in report.skipped for text in pair), "skipped: no text"
        read_manifest(place / "set")
