"""Files of images as others publish them: tar, compressed tar, zip, WebDataset, Parquet of Hugging Face."""

import gzip
import io
import json
import tarfile
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fuzz.kind import Attempt, Case
from fuzz.mutate import Rng, chance, damaged, damaged_json, pick
from fuzz.seeds import encoded, picture, tarred, zipped

from bit_ray.data.sources.archives import members, read_members
from bit_ray.data.sources.base import Source
from bit_ray.data.sources.parquet import open_parquet
from bit_ray.data.sources.vtab.images import Files
from bit_ray.data.sources.webdataset import open_webdataset

_BLOCK = 512
_MOST = 64


class Kind:
    """Archives of a few images with their labels."""

    cpu_s, memory, canaries = 8.0, 2**29, {}

    def __init__(self, folder: Path) -> None:
        images = [encoded(picture(9 + i, 8, i)) for i in range(4)]
        self.images = {f"{'long/' * 30 if i == 3 else ''}{i}.jpg": image for i, image in enumerate(images)}
        self.tars = [
            tarred(self.images | {"list.txt": b"0 1 2 3"}, format)
            for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT)
        ]
        self.zips = [
            zipped(self.images | {"list.txt": b"0 1 2 3"}, kind) for kind in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        ]
        self.parquets = [self._parquet(images, compression) for compression in ("none", "snappy")]
        # 800 MB of zeros in 800 KB.
        self.bomb = gzip.compress(self.tars[0][: -2 * _BLOCK]) + gzip.compress(bytes(8 * 2**20), 1) * 100

    def _parquet(self, images: list[bytes], compression: str) -> bytes:
        image = pa.array([{"bytes": image, "path": f"{i}.jpg"} for i, image in enumerate(images)])
        features = {"label": {"_type": "ClassLabel", "names": ["ant", "bee"]}, "image": {"_type": "Image"}}
        about = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
        table = pa.table({"image": image, "label": pa.array([0, 1, 0, 1])}).replace_schema_metadata(about)
        sink = io.BytesIO()
        pq.write_table(table, sink, row_group_size=2, compression=compression)
        return sink.getvalue()

    def case(self, rng: Rng) -> Case:
        """Damage an archive of one kind."""
        return pick(rng, (self._tar, self._compressed, self._zip, self._webdataset, self._huggingface))(rng)

    def _tar(self, rng: Rng) -> Case:
        data = self._tar_changed(rng, pick(rng, self.tars))
        if chance(rng, 0.5):
            return Case({"x.tar": data}, partial(self._members, "x.tar"))
        return Case({"x.tar": data}, partial(self._read, "x.tar"))

    def _compressed(self, rng: Rng) -> Case:
        if chance(rng, 0.01):
            data = self.bomb
        else:
            data = gzip.compress(self._tar_changed(rng, pick(rng, self.tars)), 1)
            data = damaged(rng, data) if chance(rng, 0.5) else data
        name = pick(rng, ("x.tar.gz", "x.tgz"))
        return Case({name: data}, partial(pick(rng, (self._members, self._read)), name))

    def _zip(self, rng: Rng) -> Case:
        data = pick(rng, self.zips)
        data = damaged(rng, data, self.zips, pick(rng, (0, 0, data.find(b"PK\1\2"))))
        return Case({"x.zip": data}, self._files)

    def _webdataset(self, rng: Rng) -> Case:
        suffix = pick(rng, ("cls", "json"))
        files: dict[str, bytes] = {}
        for i, image in enumerate(self.images.values()):
            label = json.dumps({"label": i % 2}).encode() if suffix == "json" else b"%d" % (i % 2)
            files |= {f"{i:04d}.jpg": image, f"{i:04d}.{suffix}": label}
        name = f"{int(rng.integers(4)):04d}.{suffix}"
        if chance(rng, 0.5):
            files[name] = damaged(rng, files[name])
        elif suffix == "json":
            files[name] = damaged_json(rng, {"label": 1, "x": [1, "a"]}, ([1, 0], "ant", True, 2**40))
        data = tarred(files)
        data = self._tar_changed(rng, data) if chance(rng, 0.3) else data
        return Case({"x.tar": data}, partial(self._open_webdataset, chance(rng, 0.3)))

    def _huggingface(self, rng: Rng) -> Case:
        data = pick(rng, self.parquets)
        footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
        data = damaged(rng, data, self.parquets, pick(rng, (0, footer, footer)))
        return Case({"x.parquet": data}, self._open_parquet)

    def _tar_changed(self, rng: Rng, data: bytes) -> bytes:
        """Damage one header and mend its checksum, or damage anything."""
        if chance(rng, 0.3):
            return damaged(rng, data, self.tars)
        blocks = [data[i : i + _BLOCK] for i in range(0, len(data), _BLOCK)]
        headers = [i for i, block in enumerate(blocks) if block[257:262] == b"ustar"]
        at = pick(rng, headers)
        header = bytearray(blocks[at])
        if chance(rng, 0.5):
            sizes = (
                b"77777777777\0",
                b"\x80" + bytes(7) + b"\x7f" * 4,
                b"\xff" * 12,
                b"-0000000001\0",
                b"00000000001\0",
            )
            header[124:136] = pick(rng, sizes)
        elif chance(rng, 0.5):
            header[156:157] = pick(rng, (b"0", b"1", b"2", b"3", b"5", b"6", b"L", b"K", b"x", b"g", b"S", b"\0", b"Z"))
            names = (b"../../canary/x", b"\xff\xfe", b"a\nb", b"")
            header[0:100] = pick(rng, names).ljust(100, b"\0") if chance(rng, 0.3) else header[0:100]
        else:
            header[:] = damaged(rng, bytes(header), stop=345)[:_BLOCK].ljust(_BLOCK, b"\0")
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        blocks[at] = bytes(header)
        return b"".join(blocks)

    def _members(self, name: str, place: Path, attempt: Attempt) -> None:
        size = None
        for member in members(place / name):
            size = Path(member.file).stat().st_size if size is None else size
            assert 0 <= member.offset <= member.offset + member.length, "a member outside its archive"

    def _read(self, name: str, place: Path, attempt: Attempt) -> None:
        found = read_members(place / name, ["1.jpg", "list.txt"])
        assert found.keys() == {"1.jpg", "list.txt"}, "other members"

    def _files(self, place: Path, attempt: Attempt) -> None:
        files = Files(place / "x.zip")
        attempt(files.read_text, "list.txt")
        names = files.image_names[:_MOST]
        _use(attempt(files.source, "x", names, names, [0] * len(names), ["a"]), attempt)

    def _open_webdataset(self, multi_label: bool, place: Path, attempt: Attempt) -> None:
        _use(open_webdataset(str(place / "x.tar"), multi_label=multi_label), attempt)

    def _open_parquet(self, place: Path, attempt: Attempt) -> None:
        _use(open_parquet(str(place / "x.parquet")), attempt)


def _use(source: Source | None, attempt: Attempt) -> None:
    """Read what a source has, as writing shards does."""
    if source is None:
        return
    assert isinstance(source.identity, dict), "no identity"
    indices = np.arange(min(len(source), _MOST))
    examples = attempt(lambda: list(source.part(indices)))
    assert examples is None or len(examples) == len(indices), "other examples"
