"""The loaders that loaders.py compares: how each stores the images, and how it brings batches of them.

python benchmarks/candidates.py write litdata FOLDER DATA
python benchmarks/candidates.py run litdata DATA

Each runs in a process of its own, and as its makers recommend: two worker processes or threads, images decoded by
Pillow unless its name says otherwise, and the same random boxes for all, so that no decoder gets smaller ones.
Libraries are imported where they are used, as each costs memory that is measured. A batch is
``([64, 3, 224, 224] or [64, 224, 224, 3] uint8, [64] int64)``.
"""

import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

BATCH_SIZE = 64
CROP_SIZE = 224
AREA_RANGE = (0.05, 1.0)
NUM_EPOCHS = 2
SHUFFLE_BUFFER = 1000  # examples, where a loader shuffles by a buffer
SHARD_EXAMPLES = 500  # about 50 MB

Epoch = Iterator[tuple[Any, Any]]


@dataclass(frozen=True, kw_only=True)
class Run:
    """How to run a candidate; all but ``num_workers`` for ours alone."""

    num_workers: int = 2
    """Worker processes or threads, shared out over the consumers."""
    num_consumers: int = 1
    """Actors that take batches, as training workers do."""
    lane_window: int = 64
    """Examples of a lane that are shuffled together."""
    cache: str = ""
    """Folder for what comes from a remote store."""


class Timed(NamedTuple):
    """When an epoch was asked for, and when each of its batches came, by the clock of all processes."""

    start: float
    batches: list[float]


def samples(folder: Path) -> list[tuple[str, int]]:
    """(file, class) of all images, in a fixed random order."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    found = [(str(file), label) for label, path in enumerate(classes) for file in sorted(path.iterdir())]
    random.Random(0).shuffle(found)
    return found


def shard_examples(num_examples: int) -> int:
    """Examples per shard: no fewer than eight shards, so that every worker has several."""
    return min(SHARD_EXAMPLES, -(-num_examples // 8))


def _random_crop() -> Any:
    import torch
    from torchvision.transforms import v2
    from torchvision.transforms.v2.functional import get_size

    from bit_ray.data.images.views import inception_box

    class InceptionCrop(v2.RandomResizedCrop):
        """The boxes that ours draws as well; torchvision's are larger on average."""

        def make_params(self, flat_inputs: list[Any]) -> dict[str, int]:
            u = torch.rand(23, dtype=torch.float64).numpy()
            box = inception_box(*get_size(flat_inputs[0]), u, AREA_RANGE, (3 / 4, 4 / 3))
            return dict(zip(("top", "left", "height", "width"), box, strict=True))

    return v2.Compose([InceptionCrop(CROP_SIZE, antialias=True), v2.RandomHorizontalFlip()])


def _pil_transform() -> Callable[[Any], Any]:
    from torchvision.transforms import v2

    return v2.Compose([_random_crop(), v2.PILToTensor()])


def _pil_decode() -> Callable[[bytes], Any]:
    from PIL import Image

    transform = _pil_transform()
    return lambda data: transform(Image.open(BytesIO(data)).convert("RGB"))


def _torch_loader(dataset: Any, run: Run, **kwargs: Any) -> Any:
    from torch.utils.data import DataLoader

    return DataLoader(
        dataset, BATCH_SIZE, drop_last=True, num_workers=run.num_workers, persistent_workers=True, **kwargs
    )


def open_dataloader(data: Path, run: Run) -> Callable[[], Epoch]:
    from torchvision.datasets import ImageFolder

    loader = _torch_loader(ImageFolder(str(data), _pil_transform()), run, shuffle=True)
    return lambda: iter(loader)


def open_torchcodec(data: Path, run: Run) -> Callable[[], Epoch]:
    from torchcodec.decoders import decode_jpeg
    from torchvision.datasets import ImageFolder

    loader = _torch_loader(ImageFolder(str(data), _random_crop(), loader=decode_jpeg), run, shuffle=True)
    return lambda: iter(loader)


def write_webdataset(folder: Path, data: Path) -> None:
    from webdataset import ShardWriter

    found = samples(folder)
    data.mkdir()
    with ShardWriter(f"{data}/%05d.tar", maxcount=shard_examples(len(found)), verbose=0) as sink:
        for i, (file, label) in enumerate(found):
            sink.write({"__key__": f"{i:08d}", "jpg": Path(file).read_bytes(), "cls": label})


def open_webdataset(data: Path, run: Run) -> Callable[[], Epoch]:
    import webdataset as wds

    decode = _pil_decode()
    shards = sorted(map(str, data.glob("*.tar")))
    dataset = (
        wds.WebDataset(shards, shardshuffle=len(shards))
        .shuffle(SHUFFLE_BUFFER)
        .to_tuple("jpg", "cls")
        .map_tuple(decode, int)
        .batched(BATCH_SIZE, partial=False)
    )
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=run.num_workers, persistent_workers=True)
    return lambda: iter(loader)


def write_mosaicml(folder: Path, data: Path) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(data), columns={"image": "bytes", "label": "int"}, size_limit="50mb") as sink:
        for file, label in samples(folder):
            sink.write({"image": Path(file).read_bytes(), "label": label})


def open_mosaicml(data: Path, run: Run) -> Callable[[], Epoch]:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    decode = _pil_decode()

    class Images(StreamingDataset):
        def __getitem__(self, at: int) -> Any:
            item = super().__getitem__(at)
            return decode(item["image"]), item["label"]

    clean_stale_shared_memory()  # left by runs that were stopped
    loader = _torch_loader(Images(local=str(data), shuffle=True, batch_size=BATCH_SIZE), run)
    return lambda: iter(loader)


def _litdata_item(sample: tuple[str, int]) -> dict[str, Any]:
    return {"image": Path(sample[0]).read_bytes(), "label": sample[1]}


def write_litdata(folder: Path, data: Path) -> None:
    # Its workers import the function: from __main__ they cannot, and then silently write an empty index.
    from candidates import _litdata_item as item
    from litdata import optimize

    optimize(item, samples(folder), output_dir=str(data), chunk_bytes="50MB", num_workers=2, verbose=False)
    assert sum(chunk["chunk_size"] for chunk in json.loads((data / "index.json").read_text())["chunks"])


def open_litdata(data: Path, run: Run) -> Callable[[], Epoch]:
    from litdata import StreamingDataLoader, StreamingDataset

    decode = _pil_decode()

    class Images(StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            item = super().__getitem__(index)
            return decode(item["image"]), item["label"]

    loader = StreamingDataLoader(
        Images(str(data), shuffle=True, drop_last=True),
        batch_size=BATCH_SIZE,
        num_workers=run.num_workers,
        drop_last=True,
        persistent_workers=True,
    )
    return lambda: iter(loader)


def open_spdl(data: Path, run: Run) -> Callable[[], Epoch]:
    import torch
    from spdl.pipeline import PipelineBuilder

    decode, found = _pil_decode(), samples(data)

    def load(sample: tuple[str, int]) -> tuple[Any, int]:
        return decode(Path(sample[0]).read_bytes()), sample[1]

    def collate(items: Sequence[tuple[Any, int]]) -> tuple[Any, Any]:
        return torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])

    def epoch() -> Epoch:
        random.shuffle(found)
        pipeline = (
            PipelineBuilder()
            .add_source(found)
            .pipe(load, concurrency=run.num_workers)
            .aggregate(BATCH_SIZE, drop_last=True)
            .pipe(collate)
            .add_sink(4)
            .build(num_threads=run.num_workers)
        )
        with pipeline.auto_stop():
            yield from pipeline

    return epoch


def write_ray_data(folder: Path, data: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = samples(folder)
    data.mkdir()
    step = shard_examples(len(found))
    for start in range(0, len(found), step):
        part = found[start : start + step]
        images = pa.array([Path(file).read_bytes() for file, _ in part], pa.binary())
        table = pa.table({"image": images, "label": pa.array([label for _, label in part], pa.int64())})
        pq.write_table(table, data / f"{start:08d}.parquet", compression="none", row_group_size=64)


def open_ray_data(data: Path, run: Run) -> Callable[[], Epoch]:
    import numpy as np
    import ray

    # Its workers import the function by this name: __main__ is another module there.
    from candidates import _pil_decode as pil_decode

    def decode_batch(batch: dict[str, Any]) -> dict[str, Any]:
        decode = pil_decode()
        return {"image": np.stack([decode(image).numpy() for image in batch["image"]]), "label": batch["label"]}

    ray.init(
        num_cpus=run.num_workers,
        object_store_memory=2 * 10**9,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    dataset = ray.data.read_parquet(str(data), shuffle="files").map_batches(decode_batch, batch_size=BATCH_SIZE)

    def epoch() -> Epoch:
        for batch in dataset.iter_torch_batches(
            batch_size=BATCH_SIZE, prefetch_batches=4, drop_last=True, local_shuffle_buffer_size=SHUFFLE_BUFFER
        ):
            yield batch["image"], batch["label"]

    return epoch


def write_ours(folder: Path, data: Path, *, seekable: bool = False) -> None:
    from bit_ray.data.shards.write import write_shards

    size = shard_examples(len(samples(folder)))
    write_shards(folder, data, name="photos", shard_examples=-(-size // 64) * 64, seekable=seekable)


class _Consumer:
    """What a training worker does with the stream."""

    def __init__(self) -> None:
        import bit_ray.data.stream.batches  # noqa: F401  a worker that is up has imported it

    def ready(self) -> bool:
        return True

    def take(self, uri: str, digest: str, consumer: int, steps_per_epoch: int, run: Run) -> tuple[list[Timed], str]:
        """Take all epochs, which run through, and say when each batch came and how the images were decoded."""
        from bit_ray.data.images.views import TrainView
        from bit_ray.data.stream.batches import StreamCounts, StreamSpec, batches
        from bit_ray.data.stream.settings import CacheConfig, Shuffle
        from bit_ray.training.objectives.classify import Classification

        start, times = time.monotonic(), []
        spec = StreamSpec(
            shards=uri,
            manifest_digest=digest,
            global_batch_size=BATCH_SIZE * run.num_consumers,
            slots=range(BATCH_SIZE * consumer, BATCH_SIZE * (consumer + 1)),
            start_step=0,
            stop_step=NUM_EPOCHS * steps_per_epoch,
            seed=0,
            shuffle=Shuffle(lane_window=run.lane_window, full_up_to=1),
            view=TrainView(crop="inception", crop_size=CROP_SIZE, area_range=AREA_RANGE),
            cache=CacheConfig(directory=run.cache),
        )
        counts = StreamCounts()
        targets = Classification(loss="softmax", num_classes=1).targets
        for batch in batches(spec, num_threads=max(1, run.num_workers // run.num_consumers), counts=counts):
            times.append(time.monotonic())
            check(batch.images, targets(batch.rows))
        epochs = [times[i : i + steps_per_epoch] for i in range(0, len(times), steps_per_epoch)]
        starts = [start, *(epoch[-1] for epoch in epochs)]
        return [Timed(*both) for both in zip(starts, epochs, strict=False)], str(counts)


def time_ours(uri: str, run: Run) -> tuple[list[Timed], str]:
    """Our stream, in actors of a cluster on this machine."""
    import ray

    from bit_ray.cluster.session import cluster
    from bit_ray.data.shards.manifest import read_manifest

    with cluster():
        manifest = read_manifest(uri)
        num_examples = sum(shard.num_examples for shard in manifest.shards)
        steps = num_examples // (BATCH_SIZE * run.num_consumers)
        actor = ray.remote(num_cpus=1)(_Consumer)
        consumers = [actor.remote() for _ in range(run.num_consumers)]
        ray.get([consumer.ready.remote() for consumer in consumers])
        taken = ray.get(
            [consumer.take.remote(uri, manifest.digest, i, steps, run) for i, consumer in enumerate(consumers)]
        )
    epochs = [
        Timed(min(epoch.start for epoch in of_all), sorted(t for epoch in of_all for t in epoch.batches))
        for of_all in zip(*(epochs for epochs, _ in taken), strict=True)
    ]
    return epochs, "; ".join(counts for _, counts in taken)


def time_peer(open_loader: Callable[[Path, Run], Callable[[], Epoch]], data: Path, run: Run) -> list[Timed]:
    """Take all epochs of a peer, whose modules are imported and whose cluster, if any, is up."""
    import torch

    torch.set_num_threads(1)
    timed = []
    epoch = open_loader(data, run)
    for _ in range(NUM_EPOCHS):
        start, times = time.monotonic(), []
        for images, targets in epoch():
            times.append(time.monotonic())
            check(images, targets)
        timed.append(Timed(start, times))
    return timed


def check(images: Any, targets: Any) -> None:
    assert sorted(images.shape) == sorted((3, BATCH_SIZE, CROP_SIZE, CROP_SIZE)), images.shape
    assert str(images.dtype) == "torch.uint8", images.dtype
    assert tuple(targets.shape) == (BATCH_SIZE,), targets.shape


class Candidate(NamedTuple):
    """A loader."""

    title: str
    data: str
    """Name of the stored form; candidates may share one, and "folder" is what there is to begin with."""
    write: Callable[[Path, Path], None] | None
    open: Callable[[Path, Run], Callable[[], Epoch]] | None
    """Returns what begins an epoch; None for ours."""
    packages: tuple[str, ...] = ()


def _write_seekable(folder: Path, data: Path) -> None:
    write_ours(folder, data, seekable=True)


CANDIDATES = {
    "dataloader": Candidate("DataLoader, ImageFolder, v2 (Pillow)", "folder", None, open_dataloader, ("pillow",)),
    "torchcodec": Candidate("DataLoader, torchcodec, v2", "folder", None, open_torchcodec, ("torchcodec",)),
    "webdataset": Candidate("WebDataset", "webdataset", write_webdataset, open_webdataset, ("webdataset",)),
    "mosaicml": Candidate("MosaicML Streaming", "mosaicml", write_mosaicml, open_mosaicml, ("mosaicml-streaming",)),
    "litdata": Candidate("LitData", "litdata", write_litdata, open_litdata, ("litdata",)),
    "spdl": Candidate("SPDL, Pillow", "folder", None, open_spdl, ("spdl",)),
    "ray_data": Candidate("Ray Data, map_batches", "ray_data", write_ray_data, open_ray_data, ("ray", "pyarrow")),
    "ours": Candidate("ours", "ours", write_ours, None),
    "ours_seekable": Candidate("ours, seekable", "ours_seekable", _write_seekable, None),
}


def main(what: str, name: str, *args: str) -> None:
    candidate = CANDIDATES[name]
    if what == "write":
        folder, data = (Path(arg).absolute() for arg in args)
        assert candidate.write is not None
        candidate.write(folder, data)
        return
    data, run = args[0], Run(**json.loads(args[1] if len(args) > 1 else "{}"))
    counts = ""
    if candidate.open is None:
        epochs, counts = time_ours(data, run)
    else:
        epochs = time_peer(candidate.open, Path(data), run)
    print(json.dumps({"epochs": epochs, "counts": counts}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
