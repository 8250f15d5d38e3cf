"""Sets of files in one word: ``train-{0000..0146}.tar``, ``s3://bucket/train-*.parquet``."""

import fnmatch
import re
from itertools import product

from bit_ray import store
from bit_ray.errors import DataError

_MAX_FILES = 1_000_000


def is_pattern(uri: str) -> bool:
    """Return whether the URI names several files."""
    return any(sign in uri for sign in "{*?[")


def matching_files(pattern: str) -> list[str]:
    """Return the files that a pattern names: braces in their order, a glob's sorted; a plain path names itself.

    Braces contain ``first..last``, with as many digits as the first, or words with commas between them. A ``*`` or
    ``?`` matches anything except a slash.

    Raises:
        DataError: A file that braces name is missing, or a glob matches none.
    """
    if not is_pattern(pattern) or (store.is_local(pattern) and store.exists(pattern)):
        return _existing([store.absolute(pattern)])
    pattern = store.absolute(pattern)  # the files may be read in another process
    names = _expand(pattern)
    if not any(is_pattern(name) for name in names):
        return _existing(names)
    return [file for name in names for file in (_glob(name) if is_pattern(name) else _existing([name]))]


def short_names(files: list[str]) -> list[str]:
    """Return the paths without suffix and without the folders that all of them have in common."""
    parts = [file.rsplit(".", 1)[0].split("/") for file in files]
    same = 0
    while all(len(words) > same + 1 and words[same] == parts[0][same] for words in parts):
        same += 1
    return ["/".join(words[same:]) for words in parts]


def _expand(pattern: str) -> list[str]:
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    if any("{" in piece or "}" in piece for piece in pieces):
        raise DataError(f"{pattern}: unbalanced braces; accepted: {{0000..0146}} or {{train,val}}; correct it")
    choices: list[list[str]] = []
    total = 1
    for i, piece in enumerate(pieces):
        bounds = re.fullmatch(r"(\d+)\.\.(\d+)", piece) if i % 2 else None
        if bounds:
            first, last = int(bounds[1]), int(bounds[2])
            if last < first or total * (last - first + 1) > _MAX_FILES:
                raise DataError(f"{pattern}: {{{piece}}}; accepted: 1 to {_MAX_FILES:,} files; correct it")
            choices.append([f"{number:0{len(bounds[1])}d}" for number in range(first, last + 1)])
        else:
            choices.append(piece.split(",") if i % 2 else [piece])
        total *= len(choices[-1])
    return ["".join(words) for words in product(*choices)]


def _existing(files: list[str]) -> list[str]:
    for file, size in zip(files, store.file_sizes(files), strict=True):
        if size is None:
            store.check_file(file)
            raise DataError(f"{file}: no such file; check the path")
    return files


def _glob(pattern: str) -> list[str]:
    start = next(i for i, sign in enumerate(pattern) if sign in "*?[")
    folder = pattern[:start].rpartition("/")[0] + "/" if "/" in pattern[:start] else ""
    # fnmatch lets * match a slash, so each level is matched by itself.
    levels = [re.compile(fnmatch.translate(part)) for part in pattern[len(folder) :].split("/")]
    names = []
    for name, _ in store.list_tree(folder or ".")[0]:
        parts = name.split("/")
        if len(parts) == len(levels) and all(level.match(part) for level, part in zip(levels, parts, strict=True)):
            names.append(folder + name)
    if not names:
        raise DataError(f"{pattern}: matches no file; check the path, and quote the pattern in the shell")
    return names
