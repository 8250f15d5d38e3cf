"""Shards: damaged, with a manifest that tells; and hostile, with a manifest that vouches for them."""

import hashlib
import json
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
from fuzz.kind import Attempt, Case
from fuzz.mutate import Rng, chance, damaged, pick
from fuzz.object_store import ObjectStore
from fuzz.seeds import CLASSES, encoded, picture

from bit_ray import store_failures
from bit_ray.data.shards.footer import LayoutError, footer_length, read_footer
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.shards.read import index_rows, read_rows, row_problems, to_examples
from bit_ray.data.shards.row_group import group_checksum
from bit_ray.data.shards.verify import verify_shards
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.base import Example
from bit_ray.data.stream.requests import ReadRequest, read, request_groups
from bit_ray.data.stream.settings import CacheConfig

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
        self.store, store_failures.PATIENCE_S = ObjectStore(), 1.0
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
        vouched, format = chance(rng, 0.5), pick(rng, (1, 2))
        files = {"set/manifest.json": self._manifest(format, bad if vouched else None), f"set/{self.path}": bad}
        # The quick ones, with which training begins, more often than the slow ones.
        checks = (*[self._index] * 16, *[self._rows, self._local, self._verify] * 2, self._remote)
        check = pick(rng, checks)
        return Case(files, partial(check, bad == good or vouched))

    def _manifest(self, format: int, vouched: bytes | None) -> bytes:
        """The manifest of the set in one of the formats; or what the writer of a hostile set would say of his shard."""
        manifest = json.loads((self.set / "manifest.json").read_bytes())
        shard = manifest["shards"][0]
        if vouched is not None:
            shard |= {"num_bytes": len(vouched), "sha256": hashlib.sha256(vouched).hexdigest()}
            with suppress(LayoutError):  # of a footer that cannot be read, nobody knows where row groups begin
                footer = read_footer(vouched[-footer_length(vouched) :], len(vouched))
                sums = [group_checksum(lambda at, n: vouched[at : at + n], group) for group in footer.groups]
                shard["checksums"] = "".join(sums)
        if format == 1:
            del manifest["optional_columns"], shard["checksums"]
        return json.dumps({**manifest, "format": format}).encode()

    def _index(self, trusted: bool, place: Path, attempt: Attempt) -> None:
        path = place / "set" / self.path
        table = index_rows(path, 0)
        row_problems(table, len(CLASSES), multi_label=False)  # its readers take no other rows' ids and labels
        for row in table.select(["offset", "length"]).to_pylist():
            end = row["offset"] + row["length"]
            assert 0 <= row["offset"] <= end <= path.stat().st_size, "an image outside the file"

    def _rows(self, trusted: bool, place: Path, attempt: Attempt) -> None:
        manifest = read_manifest(place / "set")
        for group in range(_ROWS // _GROUP):
            table = attempt(read_rows, str(place / "set"), manifest, 0, [group])
            if table is not None:
                attempt(to_examples, table)

    def _local(self, trusted: bool, place: Path, attempt: Attempt) -> None:
        self._stream(str(place / "set"), trusted, place, attempt)

    def _remote(self, trusted: bool, place: Path, attempt: Attempt) -> None:
        key = f"{place.name}/set"
        self.store.objects = {f"{key}/{path.name}": path.read_bytes() for path in (place / "set").iterdir()}
        self._stream(f"s3://bucket/{key}", trusted, place, attempt)

    def _stream(self, uri: str, trusted: bool, place: Path, attempt: Attempt) -> None:
        """What training reads."""
        manifest, rows = read_manifest(uri), np.arange(_ROWS)
        groups, group, row = request_groups(manifest.shards, rows * 0, rows, _GROUP)
        request = ReadRequest(
            shards=uri,
            manifest_digest=manifest.digest,
            num_classes=manifest.num_classes,
            multi_label=manifest.multi_label,
            row_group_size=_GROUP,
            groups=groups,
            group=group,
            row=row,
            cache=CacheConfig(directory=str(place / "cache"), max_gb=0.1),
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
            assert [0 <= label < len(CLASSES) for label in found["labels"]] == [True], "not one label of the set"
            if manifest.format > 1 and not trusted:
                same = (found["id"], image, tuple(found["labels"])) == (good.id, good.image, good.labels)
                assert same, "training takes other bytes than were written"

    def _verify(self, trusted: bool, place: Path, attempt: Attempt) -> None:
        report = verify_shards(place / "set")
        assert report.ok == (not report.problems), "not whole, and no problem named"
        assert trusted or not report.ok, "a damaged shard passes verification"
        attempt.refused = not report.ok
