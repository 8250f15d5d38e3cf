"""The sources of a shard set, distinguished by how they are given."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from bit_ray import store
from bit_ray.data.sources.base import Example, ReadOptions, Source
from bit_ray.data.sources.embedded.catalog import CATALOG, is_embedded, open_embedded
from bit_ray.data.sources.files import open_files
from bit_ray.data.sources.labels import check_classes
from bit_ray.data.sources.parquet import image_columns, open_parquet, read_schema
from bit_ray.data.sources.pattern import is_pattern
from bit_ray.data.sources.published.names import NAMED, is_named, open_dataset
from bit_ray.data.sources.vtab.splits import is_vtab, open_subset
from bit_ray.data.sources.webdataset import open_webdataset
from bit_ray.errors import ConfigError, DataError, did_you_mean

Kind = Literal["embedded", "named", "vtab", "webdataset", "parquet", "table", "folder"]


@dataclass(frozen=True)
class IteratorSource:
    """An iterable of examples, with the attributes of a ``Source``, but neither length nor parts."""

    examples: Iterable[Example]
    class_names: tuple[str, ...]
    multi_label: bool
    optional_columns: tuple[str, ...]

    @property
    def identity(self) -> dict[str, Any]:
        """The kind: the content is known only after it has run."""
        return {"kind": "iterator"}


# Which kinds take which option; for the other options see ``_check``.
_TAKEN_BY: dict[str, tuple[Kind, ...]] = {
    "class_names": ("webdataset", "parquet", "table", "folder"),
    "multi_label": ("webdataset", "table"),
    "root": ("table",),
    "download": ("named",),
    "check_size": ("named",),
    "label": ("webdataset", "parquet"),
}
_CALLED: dict[Kind, str] = {
    "embedded": "an embedded set",
    "named": "a set by name",
    "vtab": "a task of VTAB-1k",
    "webdataset": "WebDataset tar files",
    "parquet": "Parquet files with images inside",
    "table": "a .csv or .parquet table of paths",
    "folder": "a folder of class folders",
}


def open_source(
    source: str | Path | Source | Iterable[Example],
    output: str,
    options: ReadOptions,
    *,
    class_names: Sequence[str] | None = None,
    optional_columns: Sequence[str] = (),
    num_workers: int = 0,
) -> Source | IteratorSource:
    """Open anything that ``write_shards`` accepts as source; see there for the arguments.

    Raises:
        ConfigError: An option that this kind of source does not take.
        DataError: A source that does not exist, is empty, or is refused.
    """
    given = {**vars(options), "class_names": class_names}
    known = isinstance(source, (str, Path)) or hasattr(source, "part")
    if known and optional_columns:
        accepted = "only with an iterator, because other sources know their own"
        raise ConfigError.of("optional_columns", ", ".join(optional_columns), accepted, "leave it out")
    if isinstance(source, (str, Path)):
        opened = _open_text(str(source), output, options, class_names)
    elif known:
        _check(given, (), "a source that knows its own")
        opened = cast(Source, source)
    else:
        _check(given, ("class_names", "multi_label"), "an iterator")
        if num_workers > 0:
            raise ConfigError.of("num_workers", num_workers, "0 with an iterator, which is read in this process")
        if not class_names:
            raise ConfigError.of("class_names", "empty", "unique names, with an iterator", "give them")
        check_classes("class_names", tuple(class_names), "unique names")
        return IteratorSource(
            cast(Iterable[Example], source), tuple(class_names), options.multi_label, tuple(optional_columns)
        )
    if not opened.class_names or not len(opened):
        found = f"{len(opened)} examples of {len(opened.class_names)} classes"
        raise DataError.of("source", found, "at least one of each", "check it")
    check_classes("source", tuple(opened.class_names), "unique names")
    return opened


def _open_text(source: str, output: str, options: ReadOptions, class_names: Sequence[str] | None) -> Source:
    kind = _kind(source)
    taken = [option for option, kinds in _TAKEN_BY.items() if kind in kinds]
    if kind == "named" and (named := NAMED.get(source.split(":")[0])) is not None and not named.num_classes:
        taken.append("class_names")  # the set has no official list
    _check({**vars(options), "class_names": class_names}, taken, _CALLED[kind])
    if kind == "embedded":
        return open_embedded(source)
    if kind == "named":
        name, _, split = source.partition(":")
        return open_dataset(
            name,
            split,
            options.data_dir,
            download=options.download,
            check_size=options.check_size,
            class_names=class_names,
        )
    if kind == "vtab":
        return open_subset(source, options.data_dir)
    if kind == "webdataset":
        return open_webdataset(source, label=options.label, class_names=class_names, multi_label=options.multi_label)
    if kind == "parquet":
        return open_parquet(source, label=options.label, class_names=class_names)
    if "/" not in source and "." not in source and not store.exists(source):
        known = (*NAMED, *CATALOG)
        hint = did_you_mean(source.split(":")[0], known)
        raise DataError(
            f"{source}: neither a path nor a set by name; accepted: a folder, a table, .tar or .parquet files, "
            f"or one of {', '.join(known)}{hint}"
        )
    if _within(output, source):
        raise DataError(f"{output}: inside the source {source}; accepted: an output elsewhere; choose another")
    return open_files(source, root=options.root or None, class_names=class_names, multi_label=options.multi_label)


def _kind(source: str) -> Kind:
    """Return the kind of source that a text names; a Parquet file may be a table of paths or contain the images."""
    if is_embedded(source):
        return "embedded"
    if is_named(source):
        return "named"
    if is_vtab(source):
        return "vtab"
    if source.endswith(".tar"):
        return "webdataset"
    if source.endswith(".parquet"):
        if is_pattern(source) or (store.exists(source) and image_columns(read_schema(source))):
            return "parquet"
        return "table"
    return "table" if source.endswith(".csv") else "folder"


def _check(given: Mapping[str, Any], taken: Sequence[str], what: str) -> None:
    """Raise ConfigError for an option that would have no effect."""
    for option in _TAKEN_BY:
        value = given[option]
        if option not in taken and value not in (None, getattr(ReadOptions, option, None)):
            kinds = [_CALLED[kind] for kind in _TAKEN_BY[option]]
            shown = "given" if option == "class_names" else f"{value}, given"
            accepted = f"only with {' or '.join(kinds)}"
            raise ConfigError.of(option, f"{shown} with {what}", accepted, "leave it out")


def _within(path: str, directory: str) -> bool:
    inner, outer = store.filesystem(path)[1], store.filesystem(directory)[1]
    return store.is_local(path) == store.is_local(directory) and f"{inner}/".startswith(f"{outer}/")
