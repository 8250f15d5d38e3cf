"""Images per second of the stream, of the step and of both, each beside a peer in the same run.

python benchmarks/throughput.py

Prints a Markdown table. See benchmarks/README.md for what is compared with what.
"""

import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch
import torch.nn.functional as F
import tyro
from measure import cpu_seconds
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.layers import GroupNormAct, StdConv2d
from timm.models.resnetv2 import ResNetV2 as TimmResNetV2
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from bit_ray.cluster import cluster, num_local_cores
from bit_ray.data.augment import TrainView
from bit_ray.data.glyphs import GlyphSource
from bit_ray.data.manifest import Manifest, read_manifest
from bit_ray.data.order import Shuffle
from bit_ray.data.stream import StreamSpec, batches
from bit_ray.data.write import write_shards
from bit_ray.models.zoo import create_model, model_config
from bit_ray.recipes.schedules import Schedule
from bit_ray.training.plan import TrainPlan
from bit_ray.training.step import TrainStep, build_optimizer

NUM_EXAMPLES = 5120  # more than the default windows hold, so that the stream reads as it does from a large set
NUM_PHOTOS = 1024  # different ones; each stands under five names
SMALL_MODEL = "R1-1-1-1x0.5"
AREA_RANGE = (0.05, 1.0)
# Reading ahead of a step by the 4,096 images of the default windows would take longer than a measurement.
SHORT = Shuffle(lane_window=64)

# (number of the step, uint8 images, targets)
Step = Callable[[int, torch.Tensor, torch.Tensor], object]


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to measure, and for how long."""

    images: tuple[Literal["glyphs", "photos"], ...] = ("glyphs", "photos")
    """32-pixel PNG characters, and JPEG photographs of the size of ImageNet's."""
    seconds: float = 10.0
    """Length of each measurement, after its warm-up."""
    threads: int = 1
    """Threads of the step."""
    num_readers: int = 2
    """Ray Data read tasks, and DataLoader worker processes."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is measured with a set of images."""

    name: str
    crop_size: int
    """Side of what the network sees, pixels."""
    model: str
    """Network of the step alone."""
    batch_size: int
    """Images per step of the step alone."""
    both_batch_size: int
    """Images per step of stream and step together, with the small network."""
    both_burst: int
    """Batches that then come at once; 1 where the step is so slow that the stream is always ahead of it."""


GLYPHS = Setting(name="glyphs", crop_size=32, model=SMALL_MODEL, batch_size=128, both_batch_size=64, both_burst=8)
PHOTOS = Setting(name="photos", crop_size=224, model="R50x1", batch_size=8, both_batch_size=16, both_burst=1)
STREAM_BATCH = 64


@dataclass(frozen=True)
class Measured:
    """One measurement, or several added up."""

    num_images: int
    wall_s: float
    cpu_s: float
    first_s: tuple[float, ...] = ()
    """Seconds to the first batch."""

    def __add__(self, other: "Measured") -> "Measured":
        return Measured(
            self.num_images + other.num_images,
            self.wall_s + other.wall_s,
            self.cpu_s + other.cpu_s,
            self.first_s + other.first_s,
        )

    @property
    def images_per_s(self) -> float:
        """Images per second of wall time."""
        return self.num_images / self.wall_s


def row(what: str, ours: Measured, peer_name: str, peer: Measured) -> str:
    """Return a line of the table, ours before the peer's."""
    both = (ours, peer)
    speed = [f"{m.images_per_s:,.0f}" if m.images_per_s >= 100 else f"{m.images_per_s:.2f}" for m in both]
    cpu = [f"{1000 * m.cpu_s / m.num_images:.3g}" for m in both]
    first = [f"{statistics.mean(m.first_s):.1f}" if m.first_s else "" for m in both]
    ratio = f"{ours.images_per_s / peer.images_per_s:.2f}"
    return f"| {' | '.join((what, peer_name, *speed, ratio, *cpu, *first))} |"


def write_photos(folder: Path) -> None:
    """Write about 100 KB of 500x375 JPEG per image: crops of two photographs, with the noise of a camera."""
    photographs = load_sample_images().images

    def write(index: int) -> None:
        rng = np.random.default_rng(index)
        photograph = photographs[rng.integers(len(photographs))]
        height = int(rng.uniform(0.5, 1.0) * photograph.shape[0])
        width = height * 4 // 3
        top, left = (rng.integers(n - m + 1) for n, m in zip(photograph.shape, (height, width), strict=False))
        crop = photograph[top : top + height, left : left + width][:, :: rng.choice((-1, 1))]
        image = np.asarray(Image.fromarray(crop).resize((500, 375), Image.Resampling.BICUBIC))
        noisy = (image + rng.normal(0, 8, (375, 500, 1))).clip(0, 255).astype(np.uint8)
        names = [folder / f"{index % 10}" / f"{index:04d}-{copy}.jpg" for copy in range(NUM_EXAMPLES // NUM_PHOTOS)]
        names[0].parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy).save(names[0], quality=int(rng.integers(92, 97)))
        for name in names[1:]:
            os.link(names[0], name)

    with ThreadPoolExecutor(num_local_cores()) as pool:
        list(pool.map(write, range(NUM_PHOTOS)))


def write_glyphs(folder: Path) -> None:
    """Write the embedded characters, 16 of each class."""
    for i, example in enumerate(GlyphSource("l", examples_per_class=16).part(np.arange(NUM_EXAMPLES))):
        path = folder / f"{example.labels[0]:04d}" / f"{i:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(example.image)


def stream_batches(shards: Path, manifest: Manifest, size: int, shuffle: Shuffle, num_readers: int) -> Iterator:
    """Our (images ``[B, S, S, 3] uint8``, targets), without end."""
    spec = StreamSpec(
        shards=str(shards),
        manifest_digest=manifest.digest,
        global_batch_size=BATCH,
        slots=range(BATCH),
        start_step=0,
        stop_step=1_000_000,
        seed=0,
        shuffle=shuffle,
        view=TrainView(crop="inception", crop_size=size, area_range=AREA_RANGE),
    )
    return ((images, targets) for _, images, targets in batches(spec, num_readers=num_readers))


def loader_batches(folder: Path, size: int, num_workers: int) -> Iterator:
    """The peer's (images ``[B, 3, S, S] uint8``, targets), without end."""
    transforms = (v2.RandomResizedCrop(size, scale=AREA_RANGE), v2.RandomHorizontalFlip(), v2.PILToTensor())
    loader = DataLoader(
        ImageFolder(folder, v2.Compose(transforms)),
        BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=num_workers,
        persistent_workers=True,
    )
    while True:
        yield from loader


def our_step(model_name: str, num_classes: int, size: int, batch_size: int) -> Step:
    plan = TrainPlan(
        kind="pretrain",
        model=model_name,
        num_classes=num_classes,
        manifest_digest="",
        num_examples=NUM_EXAMPLES,
        view=TrainView(crop="inception", crop_size=size),
        resize_mode="shorter_side",
        resize_size=size,
        loss="softmax",
        schedule=Schedule(base_lr=0.003, num_steps=1_000_000),
        global_batch_size=batch_size,
        weight_decay=1e-4,
    )
    model = create_model(model_name, num_classes).to(memory_format=torch.channels_last)
    step_fn = TrainStep(model, build_optimizer(model, plan), plan)
    return lambda step, images, targets: step_fn(step, [(images, targets)], 1)


def peer_step(model_name: str, num_classes: int, layout: torch.memory_format) -> Step:
    """A plain training loop over timm's network of the same size."""
    config = model_config(model_name, num_classes)
    model = TimmResNetV2(
        config.units,
        width_factor=config.width,
        num_classes=num_classes,
        stem_type="fixed",
        conv_layer=partial(StdConv2d, eps=1e-8),
        norm_layer=partial(GroupNormAct, num_groups=32),
    ).to(memory_format=layout)
    ours = create_model(model_name, num_classes)
    assert [sum(p.numel() for p in m.parameters()) for m in (model, ours)] == [
        sum(p.numel() for p in ours.parameters())
    ] * 2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.003, momentum=0.9, weight_decay=1e-4)

    def run(step: int, images: torch.Tensor, targets: torch.Tensor) -> None:
        x = images.to(torch.float32, memory_format=layout).div_(127.5).sub_(1)
        optimizer.zero_grad()
        F.cross_entropy(model(x), targets).backward()
        optimizer.step()

    return run


def measure_steps(runs: list[tuple[Step, torch.Tensor]], targets: torch.Tensor, seconds: float) -> list[Measured]:
    """Step after step of each in turn on one fixed batch; the median step counts."""
    times: list[list[tuple[float, float]]] = [[] for _ in runs]
    started = time.perf_counter()
    step = 0
    while step < 3 or time.perf_counter() - started < seconds * len(runs):
        for (run, images), taken in zip(runs, times, strict=True):
            wall, cpu = time.perf_counter(), time.process_time()
            run(step, images, targets)
            taken.append((time.perf_counter() - wall, time.process_time() - cpu))
        step += 1
    # The first step of each also plans and allocates.
    medians = [[statistics.median(column) for column in zip(*taken[1:], strict=True)] for taken in times]
    return [Measured(len(targets), wall, cpu) for wall, cpu in medians]


def settle() -> None:
    """Wait until what is left of the last measurement has come to rest."""
    me = psutil.Process()
    for _ in range(30):
        before = cpu_seconds(me)
        time.sleep(0.5)
        if cpu_seconds(me) - before < 0.1:
            return


def measure_batches(opened: Callable[[], Iterable], step: Step | None, seconds: float, every: int = 1) -> Measured:
    """Take batches, with a step on each if there is one, until the time is over.

    Args:
        opened: Starts the source.
        step: What to do with a batch.
        seconds: Least length.
        every: Batches that come at once: the time is taken at the first of them, and the first lot is warm-up.
    """
    settle()
    me = psutil.Process()
    start = time.perf_counter()
    first_s, begun = 0.0, None
    for number, (images, targets) in enumerate(opened()):
        now = time.perf_counter()
        if number == 0:
            first_s = now - start
        elif number % every == 0:
            if begun is None:
                begun = number, now, cpu_seconds(me)
            elif now - begun[1] >= seconds:
                return Measured((number - begun[0]) * BATCH, now - begun[1], cpu_seconds(me) - begun[2], (first_s,))
        if step is not None:
            step(number, images, targets)
    raise AssertionError("the source has no end")


def between(ours: Callable[[float], Measured], peer: Callable[[float], Measured], seconds: float) -> list[Measured]:
    """Ours between two halves of the peer, so that a drift of the machine's speed meets both."""
    before = peer(seconds / 2)
    return [ours(seconds), before + peer(seconds / 2)]


def step_rows(name: str, config: Config) -> Iterator[str]:
    model_name, size, batch_size, num_classes = (
        ("R50x1", 224, 8, 1000) if name == "photos" else (SMALL_MODEL, 32, 128, 500)
    )
    images = torch.randint(256, (batch_size, size, size, 3), dtype=torch.uint8)
    targets = torch.randint(num_classes, (batch_size,))
    peer_images = images.permute(0, 3, 1, 2).contiguous()
    ours, peer, eager = measure_steps(
        [
            (our_step(model_name, num_classes, size, batch_size), images),
            (peer_step(model_name, num_classes, torch.channels_last), peer_images),
            (peer_step(model_name, num_classes, torch.contiguous_format), peer_images),
        ],
        targets,
        config.seconds,
    )
    what = f"step, {model_name}, {size} px, batch {batch_size}"
    yield row(what, ours, "timm, channels_last", peer)
    yield row(what, ours, "timm, NCHW", eager)


def stream_rows(name: str, folder: Path, config: Config) -> Iterator[str]:
    size = 224 if name == "photos" else 32
    shards = folder.with_name(f"{name}-shards")
    write_shards(folder, shards, name=name, num_workers=num_local_cores())
    manifest = read_manifest(str(shards))

    def measure(step: Step | None, peers: Step | None, shuffle: Shuffle, every: int) -> list[Measured]:
        return between(
            lambda s: measure_batches(
                lambda: stream_batches(shards, manifest, size, shuffle, config.num_readers), step, s, every
            ),
            lambda s: measure_batches(lambda: loader_batches(folder, size, config.num_readers), peers, s),
            config.seconds,
        )

    ours, peer = measure(None, None, Shuffle(), NUM_EXAMPLES // BATCH)
    yield row(f"stream, {name}, {size} px", ours, "DataLoader", peer)
    ours, peer = measure(
        our_step(SMALL_MODEL, manifest.num_classes, size, BATCH),
        peer_step(SMALL_MODEL, manifest.num_classes, torch.channels_last),
        SHORT,
        SHORT.num_lanes * SHORT.lane_window // BATCH,
    )
    yield row(f"stream and step, {name}, {SMALL_MODEL}, {size} px", ours, "DataLoader and timm, channels_last", peer)


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())


def busy_seconds() -> float:
    """CPU seconds of everything on this machine."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0) - getattr(times, "guest", 0)


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    me = psutil.Process()
    started, busy, own = time.perf_counter(), busy_seconds(), cpu_seconds(me)
    rows = []

    def add(lines: Iterator[str]) -> None:
        for line in lines:
            print(line, file=sys.stderr, flush=True)
            rows.append(line)

    with tempfile.TemporaryDirectory(prefix="bit-ray-throughput-") as directory:
        folders = {name: Path(directory, name) for name in config.images}
        for name, folder in folders.items():
            write_photos(folder) if name == "photos" else write_glyphs(folder)
            add(step_rows(name, config))
        with cluster():
            for name, folder in folders.items():
                add(stream_rows(name, folder, config))
            wall = time.perf_counter() - started
            others = (busy_seconds() - busy - (cpu_seconds(me) - own)) / wall
    packages = ("torch", "torchvision", "ray", "timm", "pillow", "simplejpeg")
    columns = ("", "peer", "images/s", "peer's", "ratio", "CPU ms/image", "peer's", "first batch s", "peer's")
    print(f"`python benchmarks/throughput.py {' '.join(sys.argv[1:])}`".replace(" `", "`"), end=", ")
    print(f"{cpu_name()}, {num_local_cores()} cores, {platform.system()} {platform.machine()};")
    print(f"Python {platform.python_version()}, {', '.join(f'{name} {version(name)}' for name in packages)};")
    print(f"{wall:.0f} s in all, in which other processes kept {others:.2f} cores busy.\n")
    print(f"| {' | '.join(columns)} |\n| --- | --- |{' ---: |' * (len(columns) - 2)}")
    print("\n".join(rows))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
