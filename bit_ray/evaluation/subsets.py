"""Few-shot subsets: k examples of every class, drawn by a seed, kept in a file (paper §3.5, Figure 2).

The protocol is k per class of *all* classes, five random subsets, the full test set, and the median reported. The
reference code did not seed its subsets, so there is no canonical draw; a saved index file makes a number repeatable.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from bit_ray import store
from bit_ray.config import check_digest
from bit_ray.data.shards.manifest import Manifest
from bit_ray.data.shards.scan import read_labels
from bit_ray.errors import ConfigError, DataError


def few_shot_subset(
    labels: Sequence[int] | npt.NDArray[np.integer], k: int, seed: int, class_names: Sequence[str] = ()
) -> npt.NDArray[np.int64]:
    """Draw ``k`` examples of every class.

    Each class has its own stream of random words, from PCG64 seeded by SeedSequence((seed, class)); NumPy guarantees
    that neither changes. The examples of the k smallest words are taken. So a draw depends on neither the NumPy version
    nor the other classes, and with one seed the subset of a smaller k is part of that of a larger one.

    Args:
        labels: ``[N]`` class indices, one per example.
        k: Examples per class.
        seed: 0 or more; another seed is another subset.
        class_names: All C class names; without them the classes are 0 to the largest label.

    Returns:
        ``[k * C] int64`` indices into ``labels``, ascending.

    Raises:
        ConfigError: K or seed out of range.
        DataError: No labels, several per example, a label outside the classes, or a class with fewer than k examples.
    """
    if k < 1:
        raise ConfigError.of("k", k, "at least 1 example per class", "the paper has 1, 5, 10, 25 and 100")
    if seed < 0:
        raise ConfigError.of("seed", seed, "0 or more", "choose another")
    labels = np.asarray(labels)
    if labels.ndim != 1 or not (labels.size and np.issubdtype(labels.dtype, np.integer)):
        raise DataError(
            f"labels: shape {list(labels.shape)} of {labels.dtype}; accepted: [N] class indices, one per example; "
            "few-shot subsets need a data set with one label per example"
        )
    num_classes = len(class_names) or int(labels.max()) + 1
    if labels.min() < 0 or labels.max() >= num_classes:
        wrong = int(labels.min() if labels.min() < 0 else labels.max())
        raise DataError(f"labels: {wrong}; accepted: 0 to {num_classes - 1}; correct the labels or the class names")
    by_class = np.split(np.argsort(labels, kind="stable"), np.searchsorted(np.sort(labels), np.arange(1, num_classes)))
    chosen = []
    for c, members in enumerate(by_class):
        if len(members) < k:
            name = f"class {c} ({class_names[c]!r})" if class_names else f"class {c}"
            most = f"at most {len(members)}, the number of examples of {name}"
            raise DataError.of("k", k, most, "lower it or add examples")
        words = np.random.PCG64(np.random.SeedSequence((seed, c))).random_raw(len(members))
        chosen.append(members[np.argsort(words, kind="stable")[:k]])
    return np.sort(np.concatenate(chosen)).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class Subset:
    """A drawn few-shot subset, by the ids of its examples, and the data set that it was drawn from."""

    manifest_digest: str
    """Digest of the manifest of the whole data set."""
    k: int
    """Examples per class."""
    seed: int
    """Seed of the draw."""
    ids: tuple[str, ...]
    """Ids of the chosen examples, in the order of the data set."""
    format: Literal[1] = 1

    def __post_init__(self) -> None:
        check_digest("manifest_digest", self.manifest_digest)
        if self.k < 1 or not self.ids or len(self.ids) % self.k or len(set(self.ids)) < len(self.ids):
            raise ConfigError.of("ids", f"{len(self.ids)} entries", f"k ({self.k}) different ids per class")


def save_subset(subset: Subset, uri: str | Path) -> None:
    """Write the index file of a subset, JSON, completely or not at all."""
    store.write_json(uri, asdict(subset))


def load_subset(uri: str | Path, manifest_digest: str) -> Subset:
    """Read an index file made for the data set with this manifest digest.

    Raises:
        DataError: No such file, not an index file, or one made for another data set.
    """
    remedy = "draw the subset again"
    subset = store.read_record(Subset, uri, remedy)
    if subset.manifest_digest != manifest_digest:
        raise DataError(
            f"{uri}: drawn from the data set {subset.manifest_digest[:12]}; accepted: one of this set, "
            f"{manifest_digest[:12]}; {remedy}, or use the set that it was drawn from"
        )
    return subset


def subset_file(folder: str | Path, k: int, seed: int) -> str:
    """Return the name of an index file in its folder."""
    return store.join(folder, f"{k}-per-class-seed-{seed}.json")


def subset_indices(
    subset: Subset, ids: Sequence[str], labels: npt.NDArray[np.int64], class_names: Sequence[str], uri: str | Path
) -> npt.NDArray[np.int64]:
    """Return indices ``[k * C]`` of a subset's examples in their set, ascending.

    Args:
        subset: As `load_subset` read it from ``uri``.
        ids: Ids of the whole set.
        labels: ``[N]`` their class indices.
        class_names: All C class names.
        uri: The index file, for messages.

    Raises:
        DataError: An example is not in the set, or a class has another number of examples than k.
    """
    wanted = frozenset(subset.ids)
    positions = np.array([i for i, name in enumerate(ids) if name in wanted], np.int64)
    if len(positions) < len(wanted):
        absent = sorted(wanted - frozenset(ids))
        raise DataError(
            f"{uri}: ids: {absent[0]!r}{f' and {len(absent) - 1} more' if len(absent) > 1 else ''} not in the set; "
            "accepted: ids of its examples; use the set that the subset was drawn from, or draw the subset again"
        )
    counts = np.bincount(labels[positions], minlength=len(class_names))
    if np.any(counts != subset.k):
        c = int(np.argmax(counts != subset.k))
        raise DataError(
            f"{uri}: {counts[c]} examples of class {c} ({class_names[c]!r}); accepted: {subset.k} of every class; "
            "draw the subset again"
        )
    return positions


def draw_subsets(
    shards: str,
    manifest: Manifest,
    shots: Sequence[int],
    num_subsets: int,
    *,
    saved: str | Path = "",
    given: str | Path = "",
) -> dict[tuple[int, int], npt.NDArray[np.int64]]:
    """Return the subsets of a protocol: read from their index files, or drawn and saved.

    Args:
        shards: The set; ids and labels are read, images are not.
        manifest: Its manifest.
        shots: Examples per class.
        num_subsets: Draws for each of them, by the seeds from 0 on.
        saved: Folder where draws are saved, and read from the next time; empty: nothing is saved.
        given: Folder of the index files to use, all of which must exist; empty: they are drawn.

    Returns:
        (k, seed) -> ascending indices ``[k * C]`` into the set.

    Raises:
        DataError: A class has fewer than k examples, or an index file is missing, damaged or of another set.
    """
    ids, labels = read_labels(shards, manifest)
    subsets = {}
    for k in shots:
        for seed in range(num_subsets):
            uri = subset_file(given or saved, k, seed)
            if given or (saved and store.exists(uri)):
                if not store.exists(uri):
                    remedy = "draw it, or leave subsets out"
                    raise DataError.of("subsets", f"{uri} is missing", "a file for each k and seed", remedy)
                subset = load_subset(uri, manifest.digest)
                if subset.k != k:
                    raise DataError(f"{uri}: k: {subset.k}; accepted: {k}, as in its name; draw the subset again")
                subsets[k, seed] = subset_indices(subset, ids, labels, manifest.class_names, uri)
                continue
            try:
                chosen = few_shot_subset(labels, k, seed, class_names=manifest.class_names)
            except DataError as error:
                raise error.renamed("shots") from None
            subsets[k, seed] = chosen
            if saved:
                index = Subset(manifest_digest=manifest.digest, k=k, seed=seed, ids=tuple(ids[i] for i in chosen))
                save_subset(index, uri)
    return subsets


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Median and spread of one number over repeats."""

    median: float
    """Middle value, as the paper reports."""
    lowest: float
    """Smallest value."""
    highest: float
    """Largest value."""
    std: float
    """Sample standard deviation (divisor n - 1); 0 for a single value."""
    values: tuple[float, ...]
    """All values, in the order given."""


def summarize(values: Sequence[float]) -> Summary:
    """Return median and spread of one number over repeats, as five few-shot subsets (paper §3.5)."""
    assert values
    return Summary(
        median=float(statistics.median(values)),
        lowest=float(min(values)),
        highest=float(max(values)),
        std=statistics.stdev(values) if len(values) > 1 else 0.0,
        values=tuple(float(v) for v in values),
    )
