"""The manifest of a shard set: everything a reader must know before it opens the first shard.

``manifest.json`` is written last, so a directory that has one has a complete set; a directory that has only
``_writing.json`` is half-written. To plan an epoch, a reader need not list a bucket or open a footer: every row group
of a shard has exactly ``row_group_size`` rows, except the shard's last, which has the remaining rows.

Format 2 adds a checksum of every row group and the names of optional columns; sets of format 1 are read as before. A
manifest is not trusted: its dataclasses check every field when they are made.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_type_hints

from bit_ray import store
from bit_ray.config import check_digest, from_dict
from bit_ray.data.shards.footer import OPTIONAL_COLUMNS
from bit_ray.data.shards.row_group import CHECKSUM_DIGITS
from bit_ray.errors import ConfigError, DataError

MANIFEST = "manifest.json"
WRITING = "_writing.json"
SKIPPED = "skipped.json"
FORMATS = (1, 2)

_FILE_NAME = re.compile(r"\w[\w.-]{0,254}")
_CHECKSUMS = re.compile(rf"(?:[0-9a-f]{{{CHECKSUM_DIGITS}}})*")
# Far above any set: these limits stop a small file from requesting all of a machine's memory.
_MAX_SHARD_BYTES = 2**50
_MAX_GROUP_ROWS = 2**20
_MAX_GROUPS = 2**26
_MAX_IMAGE_SIDE = 10**6


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One Parquet file of a set."""

    path: str
    """Name of the file in the directory of the set."""
    num_examples: int
    num_bytes: int
    sha256: str
    checksums: str = ""
    """Eight hex digits for each row group, `bit_ray.data.shards.row_group.checksum`; empty in format 1."""

    def __post_init__(self) -> None:
        if not _FILE_NAME.fullmatch(self.path):
            raise ConfigError.of("path", repr(self.path[:80]), "the name of a file in the directory of the set")
        check_digest("sha256", self.sha256)
        if not _CHECKSUMS.fullmatch(self.checksums):
            accepted = f"{CHECKSUM_DIGITS} hex digits per row group"
            raise ConfigError.of("checksums", repr(self.checksums[:80]), accepted)
        if not 0 < self.num_bytes <= _MAX_SHARD_BYTES:
            raise ConfigError.of("num_bytes", self.num_bytes, f"1 to {_MAX_SHARD_BYTES}")
        if not 0 < self.num_examples <= self.num_bytes:
            raise ConfigError.of("num_examples", self.num_examples, "1 or more, at most one per byte")

    def checksum(self, group: int) -> str:
        """Return the checksum of a row group, empty if the manifest has none."""
        return self.checksums[group * CHECKSUM_DIGITS : (group + 1) * CHECKSUM_DIGITS]


_KINDS = get_type_hints(Shard)
_KINDS_1 = {name: kind for name, kind in _KINDS.items() if name != "checksums"}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A shard set: class names, shards and how their rows are laid out."""

    name: str
    class_names: tuple[str, ...]
    multi_label: bool
    """Whether an example may have any number of labels; otherwise each has exactly one."""
    row_group_size: int
    """Rows of every row group except a shard's last."""
    median_image_size: tuple[int, int]
    """Height and width in pixels; over several shards, the median of the shards' medians weighted by examples."""
    num_examples: int
    shards: tuple[Shard, ...]
    convert_images: bool = False
    """Whether readers convert what is not 8-bit RGB (``decode_image(..., convert=True)``) or refuse it."""
    upright: bool = False
    """Whether images were turned as their EXIF orientation says; else it is ignored."""
    plan_digest: str = ""
    """SHA-256 of the plan that wrote the set (source and options); empty for a set written from an iterator."""
    optional_columns: tuple[str, ...] = ()
    """Those of `bit_ray.data.shards.footer.OPTIONAL_COLUMNS` that its shards have, in that order."""
    format: int = FORMATS[-1]

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            accepted = ", ".join(map(str, FORMATS))
            raise ConfigError.of("format", self.format, accepted, "use the version that wrote it")
        if not self.class_names:
            raise ConfigError.of("class_names", "empty", "at least one")
        if not 1 <= self.row_group_size <= _MAX_GROUP_ROWS:
            raise ConfigError.of("row_group_size", self.row_group_size, f"1 to {_MAX_GROUP_ROWS}")
        if not all(1 <= side <= _MAX_IMAGE_SIDE for side in self.median_image_size):
            raise ConfigError.of("median_image_size", self.median_image_size, f"1 to {_MAX_IMAGE_SIDE} pixels")
        if self.optional_columns != tuple(name for name in OPTIONAL_COLUMNS if name in self.optional_columns):
            accepted = f"any of {', '.join(OPTIONAL_COLUMNS)}, in order"
            raise ConfigError.of("optional_columns", self.optional_columns, accepted)
        if len({shard.path for shard in self.shards}) < len(self.shards):
            raise ConfigError.of("shards", "a duplicate shard", "each once")
        num_groups = [-(-shard.num_examples // self.row_group_size) for shard in self.shards]
        if sum(num_groups) > _MAX_GROUPS:
            raise ConfigError.of("shards", f"{sum(num_groups)} row groups", f"at most {_MAX_GROUPS}")
        if self.format == 1 and (self.optional_columns or any(shard.checksums for shard in self.shards)):
            raise ConfigError.of("format", 1, "2 for a set with checksums or optional columns")
        if self.format > 1:
            for i, (shard, n) in enumerate(zip(self.shards, num_groups, strict=True)):
                if len(shard.checksums) != n * CHECKSUM_DIGITS:
                    raise ConfigError.of(f"shards[{i}].checksums", "incomplete", f"one for each of its {n} row groups")

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards together."""
        return sum(shard.num_bytes for shard in self.shards)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the set's content; its name and URI are not part of it."""
        content = {
            "class_names": list(self.class_names),
            "multi_label": self.multi_label,
            "row_group_size": self.row_group_size,
            "convert_images": self.convert_images,
            "shards": [[shard.sha256, shard.num_examples] for shard in self.shards],
        }
        # `bit_ray.config.digest` without its conversion to plain data, which takes half a second and is not needed.
        if self.optional_columns:
            content["optional_columns"] = list(self.optional_columns)
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def row_groups(self, shard_index: int) -> int:
        """Return the number of row groups of a shard."""
        return -(-self.shards[shard_index].num_examples // self.row_group_size)


def read_manifest(uri: str | Path, digest: str | None = None) -> Manifest:
    """Read the manifest of the shard set in the directory ``uri``.

    Args:
        uri: Directory of the set.
        digest: The manifest's digest when the work on the set began; None: any.

    Raises:
        DataError: No such path, no shard set, a half-written one, a damaged manifest, or another digest.
    """
    path = store.join(uri, MANIFEST)
    if not store.exists(path):
        raise DataError(f"{uri}: {_why_no_manifest(uri)}")
    data = store.read_json(path, _read_shard)
    if not isinstance(data, dict):
        raise DataError(f"{path}: not a manifest; accepted: what `bit-ray shards write` makes; write the set again")
    if data.get("format") not in FORMATS:  # before fields of a newer version are called unknown
        given, accepted = repr(data.get("format"))[:80], ", ".join(map(str, FORMATS))
        raise DataError(f"{path}: format: {given}; accepted: {accepted}; use the version that wrote it")
    try:
        shards = data.get("shards")
        if isinstance(shards, list) and all(type(shard) is Shard for shard in shards):
            manifest = replace(from_dict(Manifest, {**data, "shards": []}), shards=tuple(shards))
        else:
            manifest = from_dict(Manifest, data)  # says what is wrong
    except ConfigError as error:
        raise DataError(f"{path}: {str(error)[:300]}") from None
    total = sum(shard.num_examples for shard in manifest.shards)
    if total != manifest.num_examples or not manifest.shards:
        raise DataError(
            f"{path}: num_examples: {manifest.num_examples}; accepted: {total}, as in its {len(manifest.shards)} "
            "shards; the manifest is damaged, restore it or write the set again"
        )
    if digest is not None and manifest.digest != digest:
        raise DataError(
            f"{uri}: changed since the run began (digest {manifest.digest[:12]}); accepted: the same set "
            f"({digest[:12]}); restore it, or start again under another name"
        )
    return manifest


def write_manifest(uri: str | Path, manifest: Manifest) -> None:
    """Write the manifest into the directory ``uri``: from then on the set is complete."""
    store.write_json(store.join(uri, MANIFEST), to_json(manifest))


def to_json(manifest: Manifest) -> dict[str, Any]:
    """Return the manifest as plain data, its shards one flat record each."""
    data = {field.name: getattr(manifest, field.name) for field in fields(manifest)}
    shards = [asdict(shard) for shard in manifest.shards]
    if not manifest.upright:  # sets that were written before there was the option have the same manifest
        del data["upright"]
    if manifest.format == 1:
        del data["optional_columns"]
        for shard in shards:
            del shard["checksums"]
    return {**data, "shards": shards}


def check_same_classes(manifest: Manifest, test_manifest: Manifest, test_shards: str) -> None:
    """Make sure that labels of the test shards mean the same as those of the training shards.

    Raises:
        ConfigError: They do not.
    """
    train, test = manifest.class_names, test_manifest.class_names
    if test_manifest.multi_label != manifest.multi_label:
        several = "several labels per image" if test_manifest.multi_label else "one label per image"
        given = f"{test_shards} has {several}, unlike the training shards"
        raise ConfigError.of("test_shards", given, "the same for both sets", "write both with the same labels")
    if train == test:
        return
    first = next((i for i, (a, b) in enumerate(zip(train, test, strict=False)) if a != b), min(len(train), len(test)))
    names = [repr(names[first]) if first < len(names) else "none" for names in (test, train)]
    given = f"{test_shards} has {len(test):,} classes that are not those of the training shards ({len(train):,})"
    accepted = f"the same classes (class {first} is {names[0]} here and {names[1]} there)"
    raise ConfigError.of(
        "test_shards", given, accepted, "write it again with --class-names SHARDS, the training shards (class_names)"
    )


def _read_shard(record: dict[str, Any]) -> Any:
    """Make a JSON object a Shard, if it is exactly one, while it is parsed: a large set has 100,000 of them."""
    if {name: type(value) for name, value in record.items()} not in (_KINDS, _KINDS_1):
        return record
    try:
        return Shard(**record)
    except ConfigError:
        return record  # is read again, for an error that names its position


def _why_no_manifest(uri: str | Path) -> str:
    if str(uri).endswith(MANIFEST):
        return "the path of a manifest; give the directory that it is in"
    if store.exists(store.join(uri, WRITING)):
        return "an incomplete shard set; run the same `bit-ray shards write` command again to finish it"
    if not store.exists(uri):
        return "no such path; give the directory of a shard set; `bit-ray shards write` makes one"
    return f"not a shard set (no {MANIFEST} in it); give a directory that `bit-ray shards write` made"
