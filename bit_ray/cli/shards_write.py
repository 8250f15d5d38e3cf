"""``bit-ray shards write``: images and labels as a shard set."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import PurePath

from bit_ray.cli.flags import positional
from bit_ray.data.shards.options import WriteOptions
from bit_ray.errors import DataError
from bit_ray.models.inputs import MIN_IMAGE_SIZE
from bit_ray.progress import console, follow, print_table


@dataclass(frozen=True, kw_only=True)
class WriteConfig(WriteOptions):
    """Write images and labels as a shard set; the same command continues after a stop."""

    source: str = field(metadata=positional("SOURCE"))
    """Folder of class folders; .csv or .parquet table with the columns path and label; WebDataset tar files, as
    'train-{000..146}.tar'; Parquet files with images inside, as 'train-*.parquet'; a set by name and split: cifar10,
    cifar100, oxford_iiit_pet, oxford_flowers102, imagenet2012 or imagenet21k, as cifar10:train (see data-dir); a
    task of VTAB-1k, as vtab:svhn:train800; or an embedded set: glyphs:s, glyphs:m, glyphs:l, digits:train,
    digits:test."""
    output: str = field(metadata=positional("OUTPUT"))
    """Folder of the shard set, new or empty, or s3://... or gs://..."""
    name: str = ""
    """What the manifest calls the set; empty: after the source."""
    class_names: str = ""
    """Text file with a class name per line, in the order of the class indices, or a shard set whose classes these are;
    empty: as found in the source."""


def write(config: WriteConfig) -> None:
    """Write a shard set."""
    from bit_ray.data.shards.report import counted
    from bit_ray.data.shards.write import write_shards
    from bit_ray.data.sources.endings import named

    _show_log("bit_ray.data.sources")
    with follow("write") as progress:
        report = write_shards(
            config.source,
            config.output,
            WriteOptions(**{option.name: getattr(config, option.name) for option in fields(WriteOptions)}),
            name=config.name or PurePath(config.source).stem,
            class_names=_read_class_names(config.class_names) if config.class_names else None,
            progress=progress,
        )
    rows = [
        ("shard set", report.output),
        ("images", f"{report.num_examples:,}"),
        ("classes", _classes(report.class_names)),
        (
            "shards",
            f"{report.num_shards:,}" + (f", {report.num_resumed:,} there already" if report.num_resumed else ""),
        ),
        ("size", f"{report.num_bytes / 1e6:,.1f} MB"),
        ("time", f"{report.seconds:.1f} s"),
    ]
    if report.num_small:
        small = f"{report.num_small:,} images; training enlarges them, which adds no detail"
        rows.append((f"below {MIN_IMAGE_SIZE} pixels", small))
    if config.shorter_side is not None and report.num_shrunk is not None:
        rows.append(("made smaller", f"{report.num_shrunk:,} of {report.num_examples:,} images"))
    if report.num_turned:
        rows.append(("turned upright", f"{report.num_turned:,} of {report.num_examples:,} images"))
    if config.seekable and report.num_seekable is not None:
        rows.append(("seekable", f"{report.num_seekable:,} of {report.num_examples:,} images"))
    if report.skipped:
        kinds = counted(reason for _, reason in report.skipped)
        rows.append(
            ("left out", f"{len(report.skipped):,} bad images ({kinds}), see skipped.json next to the manifest")
        )
    if report.others:
        rows.append(("not images", named(report.others)))
    if report.empty_classes:
        names = ", ".join(report.empty_classes[:5]) + (", ..." if len(report.empty_classes) > 5 else "")
        rows.append(("without images", f"{len(report.empty_classes):,} classes: {names}"))
    print_table("Written", rows)


def _classes(names: Sequence[str]) -> str:
    """Return how many classes there are, with the first names, and a warning where these look like parts of a set."""
    text = f"{len(names):,}: {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}"
    if {name.lower() for name in names} <= {"train", "training", "val", "valid", "validation", "test", "testing"}:
        text += "; these look like the parts of a set: give the folder of one part"
    return text


def _show_log(name: str) -> None:
    """Print the log of a part of the library: work that takes minutes before the first image."""
    log = logging.getLogger(name)
    if not any(isinstance(handler, _Printed) for handler in log.handlers):
        log.addHandler(_Printed())
        log.setLevel(logging.INFO)


class _Printed(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        console.print(record.getMessage())


def _read_class_names(path: str) -> list[str]:
    from bit_ray import store
    from bit_ray.data.shards.manifest import MANIFEST, read_manifest

    if store.exists(store.join(path, MANIFEST)):
        return list(read_manifest(path).class_names)
    store.check_file(path)
    try:
        with open(path, encoding="utf-8") as file:
            return [line.strip() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text in UTF-8"
        accepted = "a text file with one name per line, or a shard set"
        raise DataError.of("class_names", f"{path}: {reason}", accepted, "check the path") from None
