"""Read a whole shard set and report everything that is wrong with it."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bit_ray import store
from bit_ray.cluster.tasks import each
from bit_ray.data.images.decode import ImageError, decode_image
from bit_ray.data.images.views import example_keys
from bit_ray.data.shards.build import check_example, scratch_file
from bit_ray.data.shards.fetch import local_shard
from bit_ray.data.shards.footer import SCHEMA, Footer
from bit_ray.data.shards.manifest import Manifest, Shard, read_manifest
from bit_ray.data.shards.read import read_rows, to_examples
from bit_ray.data.shards.row_group import group_checksum, read_columns
from bit_ray.errors import DataError
from bit_ray.store import file_sha256

MAX_LISTED = 100


@dataclass(frozen=True)
class Problem:
    """One problem: its kind, its shard, and its example if it concerns one."""

    kind: str
    """missing, size, checksum, parquet, rows, row_groups, columns, label, id, image or duplicate_id."""
    shard: str
    id: str
    detail: str

    def __str__(self) -> str:
        """Return one line."""
        return f"{self.shard}{': ' + self.id if self.id else ''}: {self.detail}"


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """Result of reading the whole set."""

    num_shards: int
    num_examples: int
    """Examples read, of ``num_expected``."""
    num_expected: int
    counts: dict[str, int]
    """Number of problems by kind."""
    problems: tuple[Problem, ...]
    """The first problems, at most 100 per shard and per set."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.counts


@dataclass(frozen=True, kw_only=True)
class _Checked:
    """Result of reading one shard."""

    num_examples: int
    counts: dict[str, int]
    problems: tuple[Problem, ...]
    id_hashes: bytes
    """64 bits of each id."""


def verify_shards(
    uri: str | Path,
    *,
    decode: bool = True,
    num_workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Read every byte of every shard and compare with the manifest; with ``decode``, decode every image too.

    Args:
        uri: Directory of the set.
        decode: Whether to decode the images; without it only size, checksum, layout, ids and labels are checked.
        num_workers: Ray tasks in flight, one shard each; 0 works in this process.
        progress: Called with (examples done, examples in all).

    Raises:
        DataError: No complete set there, or the store cannot be reached.
    """
    manifest = read_manifest(uri)
    uri = store.absolute(uri)
    counts: Counter[str] = Counter()
    problems: list[Problem] = []
    hashes: list[npt.NDArray[np.uint64]] = []
    num_examples = 0
    check = partial(
        _check_shard,
        uri,
        manifest.num_classes,
        manifest.multi_label,
        manifest.row_group_size,
        manifest.optional_columns,
    )
    tasks = ((shard, decode, manifest.convert_images) for shard in manifest.shards)
    with closing(each(check, tasks, num_workers)) as checks:
        for checked in checks:
            num_examples += checked.num_examples
            counts.update(checked.counts)
            problems.extend(checked.problems[: MAX_LISTED - len(problems)])
            hashes.append(np.frombuffer(checked.id_hashes, np.uint64))
            if progress is not None:
                progress(num_examples, manifest.num_examples)
    if _has_repetitions(hashes):
        repeated = repeated_ids(uri, manifest)
        if repeated:
            counts["duplicate_id"] = len(repeated)
            listed = [Problem("duplicate_id", manifest.name, id, "duplicate id") for id in repeated]
            problems.extend(listed[: max(1, MAX_LISTED - len(problems))])
    return VerifyReport(
        num_shards=len(manifest.shards),
        num_examples=num_examples,
        num_expected=manifest.num_examples,
        counts=dict(counts),
        problems=tuple(sorted(problems, key=lambda problem: (problem.shard, problem.kind))),
    )


def repeated_ids(uri: str, manifest: Manifest) -> list[str]:
    """Return the ids that occur more than once in the set, sorted; shards that cannot be read are skipped."""
    hashes = [example_keys(ids) for ids in _read_ids(uri, manifest)]
    if not _has_repetitions(hashes):
        return []
    values, counts = np.unique(np.concatenate(hashes), return_counts=True)
    suspects = values[counts > 1]
    seen: Counter[str] = Counter()
    for ids in _read_ids(uri, manifest):  # two ids may share a hash: count the ids themselves
        found = np.isin(example_keys(ids), suspects)
        seen.update(id for id, suspect in zip(ids, found, strict=True) if suspect)
    return sorted(id for id, count in seen.items() if count > 1)


def _check_shard(
    uri: str,
    num_classes: int,
    multi_label: bool,
    row_group_size: int,
    optional_columns: tuple[str, ...],
    shard: Shard,
    decode: bool,
    convert: bool,
) -> _Checked:
    counts: Counter[str] = Counter()
    problems: list[Problem] = []
    ids: list[str] = []

    def report(kind: str, detail: str, id: str = "") -> None:
        counts[kind] += 1
        if len(problems) < MAX_LISTED:
            problems.append(Problem(kind, shard.path, id, detail))

    path = store.join(uri, shard.path)
    wrong = _size_problem(path, shard)
    if wrong is not None:
        report("missing" if "missing" in wrong else "size", wrong)
    if wrong is None or "missing" not in wrong:
        with _local_copy(path) as local:
            if wrong is None and file_sha256(local) != shard.sha256:
                report("checksum", "not the SHA-256 in the manifest")
            try:
                with local_shard(local) as (_, file):
                    _check_layout(file.footer, shard, row_group_size, optional_columns, report)
                    for number, group in enumerate(file.footer.groups):
                        expected = shard.checksum(number)
                        if expected and group_checksum(file.read_at, group) != expected:
                            report("checksum", f"row group {number} does not have the manifest's checksum")
                        table = read_columns(file.read_at, file.footer, group, SCHEMA.names)
                        for example in to_examples(table):
                            ids.append(example.id)
                            try:
                                check_example(example, num_classes, multi_label)
                            except DataError as error:
                                report("label" if example.id else "id", str(error))
                            if decode:
                                try:
                                    decode_image(example.image, convert=convert)
                                except ImageError as error:
                                    report("image", error.reason, example.id)
            except (OSError, ValueError, TypeError, KeyError) as error:
                report("parquet", f"cannot be read as a shard ({' '.join(str(error).split())})")
    return _Checked(
        num_examples=len(ids),
        counts=dict(counts),
        problems=tuple(problems),
        id_hashes=example_keys(ids).tobytes(),
    )


def _check_layout(
    footer: Footer,
    shard: Shard,
    row_group_size: int,
    optional_columns: tuple[str, ...],
    report: Callable[[str, str], None],
) -> None:
    groups = [group.num_rows for group in footer.groups]
    num_rows = sum(groups)
    if num_rows != shard.num_examples:
        report("rows", f"{num_rows} rows; accepted: {shard.num_examples}, as in the manifest")
    expected = [min(row_group_size, num_rows - start) for start in range(0, num_rows, row_group_size)]
    if groups != expected:
        report("row_groups", f"row groups are not {row_group_size} rows each; write the set again")
    if footer.columns != (*SCHEMA.names, *optional_columns):
        report("columns", f"columns {', '.join(footer.columns)}, not those in the manifest")


def _size_problem(path: str, shard: Shard) -> str | None:
    size = store.file_sizes([path])[0]
    if size is None:
        return "is in the manifest but missing"
    if size != shard.num_bytes:
        return f"{size} bytes; accepted: {shard.num_bytes}, as in the manifest"
    return None


@contextmanager
def _local_copy(path: str) -> Iterator[Path]:
    if store.is_local(path):
        yield Path(store.filesystem(path)[1])
        return
    with scratch_file("shard.parquet") as local:
        store.download_file(path, local)
        yield local


def _read_ids(uri: str, manifest: Manifest) -> Iterator[list[str]]:
    for index in range(len(manifest.shards)):
        try:
            yield read_rows(uri, manifest, index, range(manifest.row_groups(index)), ["id"])["id"].to_pylist()
        except DataError:
            continue


def _has_repetitions(hashes: list[npt.NDArray[np.uint64]]) -> bool:
    values = np.concatenate(hashes) if hashes else np.empty(0, np.uint64)
    values.sort()
    return bool((values[1:] == values[:-1]).any())
