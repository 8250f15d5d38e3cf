"""``bit-ray shards``: write, inspect and verify shard sets."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Literal

from bit_ray.errors import DataError
from bit_ray.flags import positional
from bit_ray.progress import print_table, track


@dataclass(frozen=True, kw_only=True)
class WriteConfig:
    """Write images and labels as a shard set; the same command continues after a stop."""

    source: str = field(metadata=positional("SOURCE"))
    """Folder of class folders, .csv or .parquet table with the columns path and label, or embedded set: glyphs:s,
    glyphs:m, glyphs:l, digits:train, digits:test."""
    output: str = field(metadata=positional("OUTPUT"))
    """Folder of the shard set, new or empty, or s3://... or gs://..."""
    name: str = ""
    """What the manifest calls the set; empty: after the source."""
    class_names: str = ""
    """Text file with a class name per line, in the order of the class indices; empty: as found in the source."""
    multi_label: bool = False
    """An image may have any number of labels: separated by ; in a CSV, a list in Parquet."""
    root: str = ""
    """Folder where a table's relative paths start; empty: where the table lies."""
    convert_images: bool = False
    """Readers convert grayscale, CMYK, 16-bit, alpha, palette and animated images to 8-bit RGB."""
    on_bad: Literal["error", "skip"] = "error"
    """Bad images end the command, or are left out and listed in skipped.json beside the manifest."""
    row_group_size: int = 64
    """Images that are read together."""
    shard_examples: int | None = None
    """Images in a shard; without it a sixteenth of the set, at most 4096."""
    seed: int = 0
    """Seed of the order in which the shards mix the source."""
    num_workers: int = 0
    """Ray tasks that write a shard each, here or on the cluster of RAY_ADDRESS; 0: this process alone."""


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Show what is in a shard set, as numbers and as a picture."""

    shards: str = field(metadata=positional("SHARDS"))
    """Folder of the shard set, or s3://... or gs://..."""
    sheet: str = ""
    """Write a contact sheet of drawn images to this PNG file."""
    num_images: int = 48
    """Images on the contact sheet."""
    seed: int = 0
    """Seed of the draw."""


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Read a whole shard set and report what is corrupt, unreadable, doubled or out of range."""

    shards: str = field(metadata=positional("SHARDS"))
    """Folder of the shard set, or s3://... or gs://..."""
    decode: bool = True
    """Without decoding only sizes, checksums, layout, ids and labels are checked."""
    num_workers: int = 0
    """Ray tasks that check a shard each, here or on the cluster of RAY_ADDRESS; 0: this process alone."""


def write(config: WriteConfig) -> None:
    """Write a shard set."""
    from bit_ray.data.write import write_shards

    with _progress("write") as progress:
        report = write_shards(
            config.source,
            config.output,
            name=config.name or PurePath(config.source).stem,
            class_names=_read_lines(config.class_names) if config.class_names else None,
            multi_label=config.multi_label,
            root=config.root or None,
            row_group_size=config.row_group_size,
            shard_examples=config.shard_examples,
            seed=config.seed,
            convert_images=config.convert_images,
            on_bad=config.on_bad,
            num_workers=config.num_workers,
            progress=progress,
        )
    rows = [
        ("shard set", report.output),
        ("images", f"{report.num_examples:,}"),
        (
            "shards",
            f"{report.num_shards:,}" + (f", {report.num_resumed:,} there already" if report.num_resumed else ""),
        ),
        ("size", f"{report.num_bytes / 1e6:,.1f} MB"),
        ("time", f"{report.seconds:.1f} s"),
    ]
    if report.skipped:
        rows.append(("left out", f"{len(report.skipped):,} bad images, see skipped.json beside the manifest"))
    if report.empty_classes:
        names = ", ".join(report.empty_classes[:5]) + (", ..." if len(report.empty_classes) > 5 else "")
        rows.append(("without images", f"{len(report.empty_classes):,} classes: {names}"))
    print_table("Written", rows)


def inspect(config: InspectConfig) -> None:
    """Print what is in a shard set, and draw some of it."""
    from bit_ray.data.summary import contact_sheet, inspect_shards

    found = inspect_shards(config.shards)
    height, width = found["median_image_size"]
    smallest, largest = found["shard_bytes"]["min"] / 1e6, found["shard_bytes"]["max"] / 1e6
    rows = [
        ("name", found["name"]),
        ("images", f"{found['num_examples']:,}, {found['bytes_per_example'] / 1e3:,.1f} kB each"),
        ("median image", f"{height} x {width} pixels" + (", converted to RGB" if found["convert_images"] else "")),
        ("classes", f"{found['num_classes']:,}, {found['classes_without_example']:,} of them without an image"),
        ("labels per image", f"{found['labels_per_example']:.2f}" + (" (multi-label)" if found["multi_label"] else "")),
        ("largest", ", ".join(f"{name} ({count:,})" for name, count in found["largest_classes"])),
        ("smallest", ", ".join(f"{name} ({count:,})" for name, count in found["smallest_classes"])),
        (
            "shards",
            f"{found['num_shards']:,} of {smallest:,.2f} to {largest:,.2f} MB, row groups of {found['row_group_size']}",
        ),
        ("size", f"{found['num_bytes'] / 1e6:,.1f} MB"),
        ("digest", found["digest"]),
    ]
    if found["shards_counted"] < found["num_shards"]:
        rows.append(("counted", f"classes in {found['shards_counted']} of the shards"))
    if config.sheet:
        contact_sheet(config.shards, config.sheet, config.num_images, seed=config.seed)
        rows.append(("contact sheet", config.sheet))
    print_table(config.shards, rows)


def verify(config: VerifyConfig) -> None:
    """Check a shard set.

    Raises:
        DataError: something is wrong with it; all that was found has been printed.
    """
    from bit_ray.data.verify import verify_shards

    with _progress("verify") as progress:
        report = verify_shards(config.shards, decode=config.decode, num_workers=config.num_workers, progress=progress)
    counts = ", ".join(f"{count:,} x {kind}" for kind, count in sorted(report.counts.items()))
    rows = [
        ("shards", f"{report.num_shards:,}"),
        ("images", f"{report.num_examples:,} of {report.num_expected:,}"),
        ("problems", counts or "none"),
    ]
    if report.problems:
        listed = [(problem.shard, problem.kind, problem.id, problem.detail) for problem in report.problems]
        print_table("Problems", listed, ("shard", "kind", "image", "detail"))
    print_table(config.shards, rows)
    if not report.ok:
        first = report.problems[0]
        raise DataError(
            f"{config.shards}: damaged ({counts}); first: {first}; restore the shards or write the set again"
        )


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int | None], None]]:
    """Show progress from the first report on, which says how much there is to do."""
    with ExitStack() as stack:
        advance: list[Callable[[int], None]] = []
        last = 0

        def progress(done: int, total: int | None) -> None:
            nonlocal last
            if not advance:
                advance.append(stack.enter_context(track(title, total, "images")))
            advance[0](done - last)
            last = done

        yield progress


def _read_lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8") as file:
            return [line.strip() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text in UTF-8"
        raise DataError(f"--class-names: {path}: {reason}; accepted: a text file with a name per line") from None
