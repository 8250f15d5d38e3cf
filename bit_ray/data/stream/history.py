"""The examples of any step, the steps of any example, and how the network saw them.

All of it is computed from the order (`bit_ray.data.stream.order`) and the shard set; a run records none of it.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc

from bit_ray import store
from bit_ray.config import from_dict
from bit_ray.data.images.decode import ImageError
from bit_ray.data.images.sheet import Tile, write_sheet
from bit_ray.data.shards.manifest import Manifest, read_manifest
from bit_ray.data.shards.read import read_rows
from bit_ray.data.stream.order import Order
from bit_ray.data.stream.settings import Shuffle
from bit_ray.errors import ConfigError, DataError
from bit_ray.run_folder import RunFolder
from bit_ray.run_records import RunRecord

_NUM_THREADS = 16


@dataclass(frozen=True, kw_only=True)
class StreamPlan:
    """What decides the examples of every step and how the network sees them."""

    seed: int
    """Seed of order and views."""
    global_batch_size: int
    """Examples per step over all workers."""
    view: dict[str, Any]
    """Fields of a `bit_ray.data.images.views.TrainView`, which is not made here because it imports PyTorch."""
    shuffle: Shuffle = field(default_factory=Shuffle)
    """Lanes and window."""
    num_steps: int | None = None
    """Length of the run; None: not known."""

    def order(self, manifest: Manifest) -> Order:
        """Return the order of the examples of a set."""
        return Order(
            shard_sizes=[shard.num_examples for shard in manifest.shards],
            row_group_size=manifest.row_group_size,
            global_batch_size=self.global_batch_size,
            seed=self.seed,
            shuffle=self.shuffle,
        )


class Use(NamedTuple):
    """An example at a position of the stream."""

    epoch: int
    step: int
    slot: int
    shard: int
    row: int
    id: str
    labels: tuple[str, ...]
    """Class names."""


def read_plan(run_uri: str | Path, shards: str = "") -> tuple[StreamPlan, str, Manifest]:
    """Read what the plan of a run says about its stream.

    Args:
        run_uri: Folder of the run, which has ``plan.json``.
        shards: Current URI of the shard set that it trained on; empty: the URI at that time.

    Returns:
        The stream's plan, the shard set and its manifest.

    Raises:
        DataError: No run there, its plan is damaged, its set does not exist any more, or the given set is another.
    """
    path = RunFolder(str(run_uri)).plan
    if not store.exists(path):
        raise DataError(f"{run_uri}: not a run (no plan.json in it); accepted: STORAGE/NAME of a run; correct it")
    recorded = store.read_record(RunRecord, path)
    try:
        plan = recorded.plan
        found = {f.name: plan[f.name] for f in fields(StreamPlan) if f.name != "num_steps"}
        result = from_dict(StreamPlan, {**found, "num_steps": plan["schedule"]["num_steps"]})
        digest = str(plan["manifest_digest"])
        shards = shards or recorded_shards(path, recorded.shards)
    except KeyError as error:
        raise DataError(f"{path}: {error.args[0]}: missing; accepted: the plan of a run; restore the file") from None
    except (TypeError, ConfigError) as error:
        raise DataError(f"{path}: not the plan of a run ({str(error)[:300]}); restore the file") from None
    manifest = read_manifest(shards)
    if digest != manifest.digest:
        raise DataError(
            f"{shards}: digest {manifest.digest[:12]}; accepted: {digest[:12]}, the set that the run {run_uri} trained "
            "on; give that set"
        )
    return result, shards, manifest


def recorded_shards(run_uri: str, shards: str) -> str:
    """Check that the URI of a run's shard set, as recorded, may still be read, and return it.

    Args:
        run_uri: The run, for messages.
        shards: The recorded URI.

    Raises:
        DataError: It was recorded with keys in its URI, which is not read any more.
    """
    try:
        store.check_uri(shards)
    except DataError as error:
        raise DataError(f"{run_uri}: shards: {error}, and give the URI of the shard set (SHARDS, --shards)") from None
    return shards


def uses_in_step(shards: str | Path, manifest: Manifest, plan: StreamPlan, step: int) -> list[Use]:
    """Return the examples of a step, in slot order.

    Raises:
        ConfigError: The run has no such step.
        DataError: A shard cannot be read.
    """
    last = f"0 to {plan.num_steps - 1}, the steps of the run" if plan.num_steps else "0 or more"
    if step < 0 or (plan.num_steps and step >= plan.num_steps):
        raise ConfigError.of("step", step, last)
    seen = list(plan.order(manifest).rows_of_step(step))
    rows = _read(str(shards), manifest, [(shard, row) for _, shard, row in seen], ("id", "labels"))
    return [
        Use(epoch, step, slot, shard, row, rows[shard, row]["id"], _names(manifest, rows[shard, row]["labels"]))
        for slot, (epoch, shard, row) in enumerate(seen)
    ]


def uses_of_image(
    shards: str | Path,
    manifest: Manifest,
    plan: StreamPlan,
    image: str,
    num_epochs: int,
    progress: Callable[[int, int | None], None] | None = None,
) -> list[Use]:
    """Return the steps that use an image: over the length of the run or, if that is not known, over some epochs.

    Args:
        shards: The shard set; its ids are read until the image is found.
        manifest: Its manifest.
        plan: What decides the order.
        image: Id of the image.
        num_epochs: Epochs to look at if the plan has no ``num_steps``.
        progress: Called with the number of ids read and of all ids, after each shard.

    Raises:
        DataError: No image of that id in the set, or a shard cannot be read.
    """
    shard, row, labels = _find(str(shards), manifest, image, progress)
    stop = plan.num_steps
    if stop is not None:
        num_epochs = -(-stop * plan.global_batch_size // manifest.num_examples)
    positions = plan.order(manifest).steps_of(shard, row, range(num_epochs))
    return [
        Use(epoch, step, slot, shard, row, image, labels)
        for epoch, (step, slot) in enumerate(positions)
        if stop is None or step < stop
    ]


def draw_views(shards: str | Path, manifest: Manifest, plan: StreamPlan, uses: Sequence[Use], path: str | Path) -> None:
    """Write a contact sheet of examples exactly as the network saw them.

    Args:
        shards: The shard set.
        manifest: Its manifest.
        plan: What decides the views.
        uses: What to draw, at least one.
        path: PNG file to write, or its URI.

    Raises:
        ConfigError: The plan's view is not valid.
        DataError: A shard cannot be read.
    """
    from bit_ray.data.images.decode_view import decode_train_view
    from bit_ray.data.images.views import TrainView, example_keys, uniforms  # imports PyTorch

    view = from_dict(TrainView, plan.view, "view")
    numbers = uniforms(plan.seed, np.array([use.epoch for use in uses]), example_keys([use.id for use in uses]))
    images = _read(str(shards), manifest, [(use.shard, use.row) for use in uses], ("image",))
    tiles = []
    for use, u in zip(uses, numbers, strict=True):
        pixels = np.full((view.crop_size, view.crop_size, 3), 255, np.uint8)
        about = ", ".join(use.labels) or "(no label)"
        try:
            decode_train_view(images[use.shard, use.row]["image"], view, u, pixels, convert=manifest.convert_images)
        except ImageError as error:
            about = f"left out: {error.reason}"
        tiles.append(Tile(pixels=pixels, text=f"step {use.step}, slot {use.slot}\n{about}"))
    write_sheet(path, tiles)


def _names(manifest: Manifest, labels: Sequence[int]) -> tuple[str, ...]:
    return tuple(manifest.class_names[label] for label in labels)


def _read(
    shards: str, manifest: Manifest, rows: Iterable[tuple[int, int]], columns: tuple[str, ...]
) -> dict[tuple[int, int], dict[str, Any]]:
    """Columns of some (shard, row), reading the row groups that they are in."""
    size = manifest.row_group_size
    wanted: dict[tuple[int, int], list[int]] = {}
    for shard, row in set(rows):
        wanted.setdefault((shard, row // size), []).append(row)

    def read(key: tuple[int, int]) -> list[dict[str, Any]]:
        table = read_rows(shards, manifest, key[0], [key[1]], columns)
        picked: list[dict[str, Any]] = table.take([row % size for row in wanted[key]]).to_pylist()
        return picked

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        found = dict(zip(wanted, pool.map(read, wanted), strict=True))
    return {(key[0], row): value for key in wanted for row, value in zip(wanted[key], found[key], strict=True)}


def _find(
    shards: str, manifest: Manifest, image: str, progress: Callable[[int, int | None], None] | None
) -> tuple[int, int, tuple[str, ...]]:
    """Shard, row and class names of an image."""

    def find(shard: int) -> int:
        ids = read_rows(shards, manifest, shard, range(manifest.row_groups(shard)), ("id",))["id"]
        return int(pc.index(ids, image).as_py())

    done = 0
    pool = ThreadPoolExecutor(_NUM_THREADS)
    try:
        for shard, row in enumerate(pool.map(find, range(len(manifest.shards)))):
            if row >= 0:
                labels = _read(shards, manifest, [(shard, row)], ("labels",))[shard, row]["labels"]
                return shard, row, _names(manifest, labels)
            done += manifest.shards[shard].num_examples
            if progress is not None:
                progress(done, manifest.num_examples)
    finally:
        pool.shutdown(cancel_futures=True)
    raise DataError.of("image", f"{image}: no such id in {shards}", "an id as `--step` lists them")
