"""Shards: damaged, with a manifest that tells; and hostile, with a manifest that vouches for them."""

import hashlib
import json
from functools import partial
from pathlib import Path

import numpy as np
from fuzz.kind import Attempt, Case
from fuzz.mutate import Rng, chance, damaged, pick
from fuzz.seeds import CLASSES, encoded, picture

from bit_ray.data.cache import CacheConfig
from bit_ray.data.layout import footer_length
from bit_ray.data.manifest import read_manifest
from bit_ray.data.read import ReadRequest, read, request_groups
from bit_ray.data.shards import Example, count_rows, index_rows, read_rows, to_examples
from bit_ray.data.verify import verify_shards
from bit_ray.data.write import write_shards

_ROWS, _GROUP = 12, 4


class Kind:
    """Bytes of a Parquet file, read in one of the ways that shards are read."""

    cpu_s, memory, canaries = 8.0, 2**30, {}

    def __init__(self, folder: Path) -> None:
        self.set = folder / "set"
        if not self.set.exists():
            kinds = ("PNG", "JPEG")
            images = [encoded(picture(9 + i, 8, i), kinds[i % 2]) for i in range(_ROWS)]
            examples = [Example(f"é{i}", image, (i % 3,)) for i, image in enumerate(images)]
            write_shards(iter(examples), self.set, name="x", class_names=CLASSES, row_group_size=_GROUP)
        manifest = read_manifest(self.set)
        self.path = manifest.shards[0].path
        self.good = (self.set / self.path).read_bytes()
        self.footer = len(self.good) - footer_length(self.good)
        groups = range(_ROWS // _GROUP)
        self.examples = to_examples(read_rows(str(self.set), manifest, 0, groups))

    def case(self, rng: Rng) -> Case:
        """Damage the shard, more often in its footer than elsewhere."""
        good, end = self.good, len(self.good)
        start, stop = pick(rng, ((self.footer, end), (self.footer, end), (self.footer, end), (0, end)))
        if chance(rng, 0.5):
            flipped = bytearray(good)
            flipped[int(rng.integers(start, stop))] ^= 1 << int(rng.integers(8))
            bad = bytes(flipped)
        else:
            bad = damaged(rng, good, start=start, stop=stop)
        manifest = json.loads((self.set / "manifest.json").read_bytes())
        vouched = chance(rng, 0.5)
        if vouched:
            _vouch(manifest, bad)
        files = {"set/manifest.json": json.dumps(manifest).encode(), f"set/{self.path}": bad}
        # The first two take a tenth of the time that the others take, and training begins with them.
        check = pick(rng, (*[self._count, self._index] * 4, self._rows, self._stream, self._verify))
        return Case(files, partial(check, bad == good or vouched))

    def _count(self, trusted: bool, place: Path, attempt: Attempt) -> None:
        for group in range(_ROWS // _GROUP):
            attempt(count_rows, place / "set" / self.path, group)

    def _index(self, trusted: bool, place: Path, attempt: Attempt) -> None:
        path = place / "set" / self.path
        for row in index_rows(path, 0).to_pylist():
            end = row["offset"] + row["length"]
            assert 0 <= row["offset"] <= end <= path.stat().st_size, "an image outside the file"

    def _rows(self, trusted: bool, place: Path, attempt: Attempt) -> None:
        manifest = read_manifest(place / "set")
        for group in range(_ROWS // _GROUP):
            table = attempt(read_rows, str(place / "set"), manifest, 0, [group])
            if table is not None:
                attempt(to_examples, table)

    def _stream(self, trusted: bool, place: Path, attempt: Attempt) -> None:
        """What training reads."""
        manifest, rows = read_manifest(place / "set"), np.arange(_ROWS)
        groups, group, row = request_groups(manifest.shards, rows * 0, rows, _GROUP)
        request = ReadRequest(
            shards=str(place / "set"),
            manifest_digest=manifest.digest,
            row_group_size=_GROUP,
            groups=groups,
            group=group,
            row=row,
            cache=CacheConfig(max_gb=0),
        )
        for found, good in zip(read(request).to_pylist(), self.examples, strict=True):
            if found["problem"] is not None:
                assert len(found["problem"].splitlines()) == 1, "a problem of several lines"
                attempt.refused = True
                continue
            with open(found["file"], "rb") as file:
                file.seek(found["offset"])
                image = file.read(found["length"])
            assert len(image) == found["length"], "an image outside the file"
            if manifest.format > 1 and not trusted:
                same = (found["id"], image, tuple(found["labels"])) == (good.id, good.image, good.labels)
                assert same, "training takes other bytes than were written"

    def _verify(self, trusted: bool, place: Path, attempt: Attempt) -> None:
        report = verify_shards(place / "set")
        assert report.ok == (not report.problems), "not whole, and no problem named"
        assert trusted or not report.ok, "a damaged shard passes verification"
        attempt.refused = not report.ok


def _vouch(manifest: dict, data: bytes) -> None:
    """Make the manifest say of the shard what is true of these bytes, as the writer of a hostile set would."""
    manifest["shards"][0] |= {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
