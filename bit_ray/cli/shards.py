"""``bit-ray shards``: inspect, verify and measure shard sets, and ask what a training step saw."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bit_ray.cli.flags import positional
from bit_ray.data.stream.settings import Shuffle
from bit_ray.errors import ConfigError, DataError
from bit_ray.models.inputs import MIN_IMAGE_SIZE
from bit_ray.progress import console, follow, print_table

if TYPE_CHECKING:
    from bit_ray.data.images.views import TrainView


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Show what is in a shard set, as numbers and as a picture."""

    shards: str = field(metadata=positional("SHARDS"))
    """Folder of the shard set, or s3://... or gs://..."""
    sheet: str = ""
    """Write a contact sheet of drawn images to this PNG file."""
    num_images: int = 48
    """Images on the contact sheet."""
    augmented: bool = False
    """Show next to each image three training views of it, as upstream pre-training sees them."""
    finetune: bool = False
    """Show the views that finetune has by BiT-HyperRule instead."""
    crop_size: int = 0
    """Side of the training views, pixels; 0: 224, or that of BiT-HyperRule for these images."""
    seed: int = 0
    """Seed of the draw and of the views."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError.of("seed", self.seed, "0 or more")
        for name in ("augmented", "finetune"):
            if getattr(self, name) and not self.sheet:
                raise ConfigError.of(name, "given without sheet", "with a PNG file to draw", "add --sheet FILE.png")
        if self.crop_size and self.crop_size < MIN_IMAGE_SIZE:
            raise ConfigError.of("crop_size", self.crop_size, f"0, or {MIN_IMAGE_SIZE} or more")


@dataclass(frozen=True, kw_only=True)
class IdsConfig:
    """Ask any training step what it saw, or at which steps an image is used."""

    shards: str = field(default="", metadata=positional("SHARDS"))
    """Folder of the shard set, or s3://... or gs://...; with a run only if the set has moved since."""
    step: int | None = None
    """List the images of this step, by slot of the global batch."""
    image: str = ""
    """List the steps that use the image of this id."""
    sheet: str = ""
    """Draw what is listed, each image as the network saw it, on this PNG file."""
    num_images: int = 48
    """Most images on the sheet, spread over what is listed."""
    run: str = ""
    """Folder of the run that is asked, STORAGE/NAME; it knows all of the settings below."""
    seed: int | None = None
    """Without a run: seed of the order and the views; 0 if not given."""
    global_batch_size: int | None = None
    """Without a run: images per step, over all workers."""
    epochs: int | None = None
    """Without a run: epochs in which the image is looked for; 1 if not given."""
    crop_size: int | None = None
    """Without a run: side of the upstream training views on the sheet, pixels; 224 if not given."""
    shuffle: Shuffle = field(default_factory=Shuffle)
    """Without a run: how far apart examples are mixed."""

    def __post_init__(self) -> None:
        if (self.step is None) == (not self.image):
            given = "neither it nor image is given" if self.step is None else f"{self.step}, and image is given too"
            raise ConfigError.of("step", given, "one of the two", "ask --step T or --image ID")
        if self.step is not None and self.step < 0:
            raise ConfigError.of("step", self.step, "0 or more")
        for name, least in (
            ("num_images", 1),
            ("seed", 0),
            ("global_batch_size", 1),
            ("epochs", 1),
            ("crop_size", MIN_IMAGE_SIZE),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError.of(name, value, f"{least} or more")
        for name in ("seed", "global_batch_size", "epochs", "crop_size") if self.run else ():
            if getattr(self, name) is not None:
                raise ConfigError.of(
                    name, f"{getattr(self, name)} with a run", "the run's own", "leave out one of the two"
                )
        if self.run and self.shuffle != Shuffle():
            raise ConfigError.of("shuffle", "given with a run", "the run's own", "leave out one of the two")
        remedy = "give it, or the run by --run STORAGE/NAME"
        if not self.run and not self.shards:
            raise ConfigError.of("shards", "missing", "a shard set", remedy)
        if not self.run and self.global_batch_size is None:
            raise ConfigError.of("global_batch_size", "missing", "images per step", remedy)


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Read a whole shard set and report what is corrupt, unreadable, doubled or out of range."""

    shards: str = field(metadata=positional("SHARDS"))
    """Folder of the shard set, or s3://... or gs://..."""
    decode: bool = True
    """Without decoding only sizes, checksums, layout, ids and labels are checked."""
    num_workers: int = 0
    """Ray tasks that check a shard each, here or on the cluster of RAY_ADDRESS; 0: this process alone."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Measure how fast this machine and this store read and decode, and which part is the slowest."""

    shards: str = field(metadata=positional("SHARDS"))
    """Folder of the shard set, or s3://... or gs://..."""
    crop_size: int = 224
    """Side of the upstream training views, pixels."""
    batch_size: int = 256
    """Images per batch of the whole stream."""
    num_threads: int = 0
    """Threads that decode in the whole stream; 0: one per CPU core."""
    seconds: float = 5.0
    """Time for each of the four parts."""

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("num_threads", 0)):
            if getattr(self, name) < least:
                raise ConfigError.of(name, getattr(self, name), f"{least} or more")
        if not 0 < self.seconds < 3600:
            raise ConfigError.of("seconds", self.seconds, "more than 0, less than 3600")


def inspect(config: InspectConfig) -> None:
    """Print the content of a shard set, and draw some of its images."""
    from bit_ray.data.shards.inspect import contact_sheet, inspect_shards

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
        contact_sheet(config.shards, config.sheet, config.num_images, seed=config.seed, view=_view(config))
        rows.append(("contact sheet", config.sheet))
    print_table(config.shards, rows)


def _view(config: InspectConfig) -> "TrainView | None":
    """The training views that are asked for."""
    from bit_ray.data.images.views import TrainView
    from bit_ray.data.shards.manifest import read_manifest
    from bit_ray.recipes.hyperrule import hyperrule

    if not config.finetune:
        return TrainView(crop="inception", crop_size=config.crop_size or 224) if config.augmented else None
    manifest = read_manifest(config.shards)
    rule = hyperrule(manifest.num_examples, manifest.median_image_size, crop=config.crop_size or None)
    return TrainView(crop="resize_crop", crop_size=rule.crop, resize_size=rule.resize)


def bench(config: BenchConfig) -> None:
    """Print the rates of reading, decoding and the whole stream on this machine."""
    from bit_ray.data.images.decode_view import FAST_PATH
    from bit_ray.data.stream.bench import bench_shards

    result = bench_shards(
        config.shards,
        crop_size=config.crop_size,
        batch_size=config.batch_size,
        num_threads=config.num_threads,
        seconds=config.seconds,
    )
    threads = result.num_threads
    paths = ", ".join(f"{count:,} {path}" for path, count in sorted(result.decode_paths.items()))
    rows = [
        ("read", f"{result.read_images_per_s:,.0f}", f"{result.read_bytes_per_s / 1e6:,.0f} MB/s"),
        ("decode, 1 thread", f"{result.decode_images_per_s:,.0f}", f"{result.decode_cpu_s * 1e3:.2f} ms CPU; {paths}"),
        (
            f"stream, {threads} threads",
            f"{result.stream_images_per_s:,.0f}",
            f"first batch after {result.first_batch_s:.1f} s",
        ),
        (
            "stream, again",
            f"{result.second_pass_images_per_s:,.0f}",
            "with the row groups that are on the node by then",
        ),
    ]
    print_table(config.shards, rows, ("part", "images/s", ""))
    if result.num_bad:
        console.print(f"{result.num_bad:,} of the sampled images cannot be decoded; run bit-ray shards verify")
    if not FAST_PATH:
        console.print("The fast decoder is not installed: it needs a C compiler and libjpeg-turbo's headers.")
    console.print(f"Bound by {result.bound_by}.")


def ids(config: IdsConfig) -> None:
    """Print what a step saw, or which steps saw an image, and draw it."""
    from bit_ray.data.shards.manifest import read_manifest
    from bit_ray.data.stream.history import StreamPlan, draw_views, read_plan, uses_in_step, uses_of_image

    if config.run:
        plan, shards, manifest = read_plan(config.run, config.shards)
    else:
        assert config.global_batch_size is not None
        shards, manifest = config.shards, read_manifest(config.shards)
        view = {"crop": "inception", "crop_size": config.crop_size or 224}
        plan = StreamPlan(
            seed=config.seed or 0, global_batch_size=config.global_batch_size, view=view, shuffle=config.shuffle
        )
    if config.step is not None:
        uses = uses_in_step(shards, manifest, plan, config.step)
        rows = [(f"{use.slot}", f"{use.epoch}", use.id, ", ".join(use.labels)) for use in uses]
        _print_lines(("slot", "epoch", "id", "labels"), rows)
    else:
        with follow("search") as progress:
            uses = uses_of_image(shards, manifest, plan, config.image, config.epochs or 1, progress)
        rows = [(f"{use.epoch}", f"{use.step}", f"{use.slot}", ", ".join(use.labels)) for use in uses]
        _print_lines(("epoch", "step", "slot", "labels"), rows)
    if config.sheet and uses:
        count = min(config.num_images, len(uses))
        draw_views(shards, manifest, plan, [uses[i * len(uses) // count] for i in range(count)], config.sheet)


def verify(config: VerifyConfig) -> None:
    """Check a shard set.

    Raises:
        DataError: Something is wrong with it; all that was found has been printed.
    """
    from bit_ray.data.shards.verify import verify_shards

    with follow("verify") as progress:
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


def _print_lines(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print a line per row, not wrapped, so that other programs can read them; two columns of numbers come first."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = [text.rjust(width) for text, width in zip(row, widths, strict=True)][:2]
        cells += [text.ljust(width) for text, width in zip(row, widths, strict=True)][2:]
        console.print("  ".join(cells).rstrip())
