"""Annotations on their way to an objective: boxes, which must follow the crop and the flip of their image."""

import io
import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from shard_sets import vouch_for

from bit_ray.data.images.views import TrainView
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.base import Example
from bit_ray.data.stream.batches import StreamSpec, batches, stream_order
from bit_ray.data.stream.rows import HOLE
from bit_ray.data.stream.settings import Shuffle
from bit_ray.errors import ConfigError

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_local")]
BATCH, STEPS, SIDE = 12, 8, 64
VIEWS = {
    "inception": TrainView(crop="inception", crop_size=SIDE, area_range=(0.3, 1.0)),
    "resize_crop": TrainView(crop="resize_crop", crop_size=SIDE, resize_size=96),
}


@dataclass
class Boxes:
    """Gray images with one red box, and further boxes that cannot be seen: 1 to 3 boxes, as JSON."""

    size: int = 60
    optional_columns = ("annotation",)
    class_names = ("few", "many")
    multi_label = False

    @property
    def identity(self):
        return {"boxes": self.size}

    def __len__(self):
        return self.size

    def part(self, indices):
        for i in np.asarray(indices).tolist():
            yield self.example(i)

    def example(self, i):
        rng = np.random.default_rng(i)
        height, width = (int(n) for n in rng.integers(80, 160, 2))
        top, left = int(rng.integers(0, height // 2)), int(rng.integers(0, width // 2))
        box = [top, left, top + height // 3, left + width // 3]
        pixels = np.full((height, width, 3), 60, np.uint8)
        pixels[box[0] : box[2], box[1] : box[3]] = (255, 60, 60)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        boxes = [box] + [[0, 0, height, width]] * (i % 3)
        return Example(f"b{i:03d}", file.getvalue(), (int(i % 3 > 0),), annotation=json.dumps(boxes).encode())


def box_targets(rows, view):
    """A ragged objective's targets: ``[b, n, 4]`` boxes (top, left, bottom, right) in the view; -1: no box."""
    found = [[] if row.placement is None else json.loads(row.annotation) for row in rows]
    targets = torch.full((len(rows), max(map(len, found)), 4), -1.0)
    for target, boxes, row in zip(targets, found, rows, strict=True):
        for i, box in enumerate(boxes):
            target[i] = in_view(torch.tensor(box, dtype=torch.float32), row.placement, view.crop_size)
    return targets


def in_view(box, placement, size):
    top, left, height, width = placement.box
    scale = torch.tensor([placement.resized[0] / height, placement.resized[1] / width] * 2)
    box = (box - torch.tensor([top, left] * 2)) * scale - torch.tensor([*placement.window] * 2)
    box = box.clamp(0, size)
    return torch.stack([box[0], size - box[3], box[2], size - box[1]]) if placement.flip else box


@pytest.fixture(scope="module")
def boxes(tmp_path_factory):
    uri = tmp_path_factory.mktemp("boxes") / "shards"
    write_shards(Boxes(), uri, name="boxes", row_group_size=8, shard_examples=16)
    return str(uri)


def spec(shards, **changes):
    settings = {
        "global_batch_size": BATCH,
        "slots": range(BATCH),
        "start_step": 0,
        "stop_step": STEPS,
        "seed": 5,
        "shuffle": Shuffle(num_lanes=4, lane_window=12, full_up_to=1),
        "view": VIEWS["inception"],
    }
    return StreamSpec(shards=shards, manifest_digest=read_manifest(shards).digest, **settings | changes)


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_every_annotation_comes_with_its_image(boxes, num_workers):
    share = BATCH // num_workers
    seen = set()
    for worker in range(num_workers):
        for batch in batches(spec(boxes, slots=range(worker * share, (worker + 1) * share))):
            assert len(batch.rows) == len(batch.ids) == share
            for id, row in zip(batch.ids, batch.rows, strict=True):
                example = Boxes().example(int(id[1:]))
                assert (row.annotation, tuple(row.labels)) == (example.annotation, example.labels)
                seen.add(id)
    assert len(seen) == len(Boxes())


@pytest.mark.parametrize("crop", VIEWS)
def test_padded_boxes_follow_crop_and_flip(boxes, crop):
    view = VIEWS[crop]
    flips, counts, num_seen = set(), set(), 0
    for batch in batches(spec(boxes, view=view)):
        targets = box_targets(batch.rows, view)
        assert targets.shape == (BATCH, 3, 4)
        for image, target, row, id in zip(batch.images, targets, batch.rows, batch.ids, strict=True):
            num_boxes = 1 + int(id[1:]) % 3
            assert (target[num_boxes:] == -1).all()
            assert (target[:num_boxes] >= 0).all()
            counts.add(num_boxes)
            flips.add(row.placement.flip)
            top, left, bottom, right = target[0].tolist()
            if min(bottom - top, right - left) < 4:
                continue  # cropped away, or nearly
            red = image[..., 0].numpy() > (255 + 60) / 2
            rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
            shown = [rows[0], columns[0], rows[-1] + 1, columns[-1] + 1]
            np.testing.assert_allclose(shown, [top, left, bottom, right], atol=1.5)
            num_seen += 1
    assert flips == {False, True}
    assert counts == {1, 2, 3}
    assert num_seen > BATCH * STEPS // 2


def test_a_hole_has_no_annotation_and_its_boxes_are_padding(tmp_path):
    write_shards(Boxes(), tmp_path, name="boxes", row_group_size=8, shard_examples=16)
    path = tmp_path / "shard-00000.parquet"
    data = path.read_bytes()
    start = data.index(b"IDAT") + 8
    path.write_bytes(data[:start] + bytes(20) + data[start + 20 :])
    vouch_for(tmp_path)
    stream = spec(str(tmp_path))
    order, holes = stream_order(stream), 0
    for batch in batches(stream):
        targets = box_targets(batch.rows, stream.view)
        for slot, (_, shard, row) in enumerate(order.rows_of_step(batch.step)):
            if (shard, row) == (0, 0):
                holes += 1
                assert batch.rows[slot] == HOLE
                assert batch.rows[slot].annotation == b""
                assert (targets[slot] == -1).all()
            else:
                assert batch.rows[slot].annotation == Boxes().example(int(batch.ids[slot][1:])).annotation
    assert holes > 0


def test_a_set_without_the_column_has_empty_annotations(tmp_path):
    examples = [Example(e.id, e.image, e.labels) for e in Boxes(24).part(range(24))]
    write_shards(iter(examples), tmp_path, name="plain", class_names=["few", "many"], row_group_size=8)
    for batch in batches(spec(str(tmp_path), stop_step=2)):
        assert {row.annotation for row in batch.rows} == {b""}
        assert None not in {row.placement for row in batch.rows}


def test_annotated_images_are_not_encoded_smaller(tmp_path):
    with pytest.raises(ConfigError, match="shorter_side: 64 with annotations; accepted: not set"):
        write_shards(Boxes(), tmp_path / "set", name="boxes", shorter_side=64)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("columns", [("boxes",), ("fingerprint", "annotation")])
def test_unknown_or_unordered_columns_are_refused(tmp_path, columns):
    source = Boxes()
    source.optional_columns = columns
    with pytest.raises(ConfigError, match="optional_columns: .*; accepted: any of annotation, fingerprint, in order"):
        write_shards(source, tmp_path / "set", name="boxes")
    assert not (tmp_path / "set").exists()
