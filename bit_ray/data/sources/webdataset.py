"""WebDataset: tar files in which the files of one example follow each other and have one name up to the first dot.

``0001.jpg`` and ``0001.cls``, or ``0001.json`` with a key for the label. The tar files are scanned once, for names,
offsets and labels. Images are then read from the tar files, so any example can be read at any time.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any

import pyarrow as pa

from bit_ray import store
from bit_ray.config import is_unicode
from bit_ray.data.sources.archived import ArchiveSource, Items
from bit_ray.data.sources.archives import Member, tar_members
from bit_ray.data.sources.labels import to_indices
from bit_ray.data.sources.pattern import matching_files, short_names
from bit_ray.errors import DataError, brief

IMAGES = ("jpg", "jpeg", "png", "webp", "ppm", "bmp", "gif", "tif", "tiff")
LABELS = ("cls", "json")
_NUM_READERS = 8
_MAX_LABEL_BYTES = 2**24
_MAX_KEYS_SHOWN = 20


def open_webdataset(
    pattern: str, *, label: str = "", class_names: Sequence[str] | None = None, multi_label: bool = False
) -> ArchiveSource:
    """Open the tar files that a pattern names (`bit_ray.data.sources.pattern`), local or in an object store.

    Args:
        pattern: As ``train-{0000..0146}.tar`` or ``train-*.tar``.
        label: The ending of the label files, such as cls, or a key in the .json files; empty: cls if there is one, else
            the key label.
        class_names: In the order of the class indices; without it indices or sorted names as found.
        multi_label: Whether an example may have any number of labels: a list in .json, or words in a .cls file.

    Raises:
        DataError: No such file, a damaged one, an example without image or label, or a label outside the class list.
    """
    files = matching_files(pattern)
    items = Items()
    ids: list[str] = []
    values: list[str] = []
    offsets = [0]
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        found = pool.map(lambda file: list(_examples(file, label, multi_label)), files)
        for short, examples in zip(short_names(files), found, strict=True):
            for key, image, labels in examples:
                ids.append(f"{short}/{key}")
                items.add(ids[-1], image)
                values += labels
                offsets.append(len(values))
    if not ids:
        raise DataError(
            f"{pattern}: no example; accepted: KEY.jpg or another image, with KEY.cls or KEY.json; check it"
        )
    if len(set(ids)) < len(ids):
        twice = next(id for id, count in Counter(ids).items() if count > 1)
        raise DataError(
            f"{pattern}: {twice} is there twice; accepted: names that are unique in their tar file, with the "
            "files of one example together; write the tar file again"
        )
    lists = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(values, pa.large_string()))
    indices, classes = to_indices(pattern, lists, class_names, ids)
    return items.source("webdataset", classes, multi_label=multi_label, labels=indices)


def _examples(file: str, label: str, multi_label: bool) -> Iterator[tuple[str, Member, list[str]]]:
    """Iterate over the examples of one tar file: key, image, labels."""
    with store.open_file(file) as opened:
        kept = (member for member in tar_members(file) if all(_split(member.name)))  # no hidden file, no README
        for key, group in groupby(kept, lambda member: _split(member.name)[0]):
            parts = {_split(member.name)[1]: member for member in group}
            image = next((parts[suffix] for suffix in IMAGES if suffix in parts), None)
            where = f"{file}: {key}"
            if image is None:
                raise DataError(
                    f"{where}: no image among .{', .'.join(parts)}; accepted: .{', .'.join(IMAGES)}; "
                    "correct the tar file"
                )
            wanted = (label, "json") if label else LABELS
            suffix = next((name for name in wanted if name in parts), None)
            if suffix is None:
                raise DataError(
                    f"{where}: no label among .{', .'.join(parts)}; accepted: .cls or .json; "
                    "name the ending by --label (label), or correct the tar file"
                )
            if parts[suffix].length > _MAX_LABEL_BYTES:
                raise DataError(
                    f"{where}.{suffix}: {parts[suffix].length:,} bytes; accepted: at most {_MAX_LABEL_BYTES:,} with a "
                    "label; correct the tar file"
                )
            with store.explained(file):
                data = bytes(store.read_range(opened, parts[suffix].offset, parts[suffix].length))
            yield key, image, _labels(data, suffix, label, multi_label, f"{where}.{suffix}")


def _split(name: str) -> tuple[str, str]:
    """Split a file's name at its first dot: the part before it, with folders, and the part after it, in lower case."""
    folder, slash, base = name.rpartition("/")
    key, _, suffix = base.partition(".")
    return folder + slash + key if key else "", suffix.lower()


def _labels(data: bytes, suffix: str, label: str, multi_label: bool, where: str) -> list[str]:
    try:
        value: Any = data.decode().strip()
        if suffix == "json":
            record = json.loads(value)
            key = label if label and label != "json" else "label"
            if not isinstance(record, dict) or key not in record:
                known = ", ".join(list(record)[:_MAX_KEYS_SHOWN]) if isinstance(record, dict) else type(record).__name__
                raise DataError(f"{where}: no key {key} in it; accepted: one of {known}; name it by --label (label)")
            value = record[key]
    except (ValueError, RecursionError):
        raise DataError(f"{where}: neither text nor JSON; accepted: an index or a name; correct the tar file") from None
    if multi_label:
        values = value if isinstance(value, list) else value.split() if isinstance(value, str) else [value]
    else:
        values = [value]
    for one in values:
        if not isinstance(one, (int, str)) or isinstance(one, bool) or one == "" or not is_unicode(str(one)):
            raise DataError(
                f"{where}: label {brief(one)}; accepted: an index or a name"
                + ("" if multi_label else ", or lists with --multi-label (multi_label)")
                + "; correct it"
            )
    return [str(one) for one in values]
