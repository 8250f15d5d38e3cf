"""Images per second of the stream, of the step, of both and of fine-tuning, each next to a peer in the same run.

python benchmarks/throughput.py

Prints a Markdown table. See benchmarks/README.md for what is compared with what.
"""

import contextlib
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
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
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from bit_ray.cluster.session import cluster
from bit_ray.cluster.slots import num_local_cores
from bit_ray.data.images.views import TrainView
from bit_ray.data.shards.manifest import Manifest, read_manifest
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.embedded.glyphs import GlyphSource
from bit_ray.data.stream.batches import StreamSpec, batches
from bit_ray.data.stream.settings import Shuffle
from bit_ray.models.zoo import create_model, model_config
from bit_ray.recipes.hyperrule import hyperrule
from bit_ray.recipes.schedules import Schedule
from bit_ray.training.in_memory import Examples, fit
from bit_ray.training.objectives.classify import Classification
from bit_ray.training.optimizer import build_optimizer
from bit_ray.training.plan import TrainPlan, transfer_plan
from bit_ray.training.step import TrainStep

NUM_EXAMPLES = 5120  # more than the default windows hold, so that the stream reads as it does from a large set
NUM_PHOTOS = 1024  # different ones; each stands under five names
SMALL_MODEL = "R1-1-1-1x0.5"
AREA_RANGE = (0.05, 1.0)

# (number of the step, uint8 images, targets)
Step = Callable[[int, torch.Tensor, torch.Tensor], object]


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to measure, and for how long."""

    images: tuple[Literal["glyphs", "photos"], ...] = ("glyphs", "photos")
    """32-pixel PNG characters, and JPEG photographs of the size of ImageNet's."""
    seconds: float = 10.0
    """Length of each measurement, after its warm-up."""
    rows: tuple[Literal["step", "finetune", "stream"], ...] = ("step", "finetune", "stream")
    """The step on a fixed batch, transfer of images in memory, and the stream alone and with the step."""
    threads: int = 1
    """Threads of the step."""
    num_workers: int = 2
    """Threads that decode, and DataLoader worker processes."""


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


GLYPHS = Setting(name="glyphs", crop_size=32, model=SMALL_MODEL, batch_size=128, both_batch_size=64)
PHOTOS = Setting(name="photos", crop_size=224, model="R50x1", batch_size=8, both_batch_size=16)
STREAM_BATCH = 64  # images per batch of the stream alone
NUM_CLASSES = 1000


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


def row(what: str, peer_name: str, ours: Measured, peer: Measured) -> str:
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


def stream_batches(
    shards: Path, manifest: Manifest, size: int, batch_size: int, num_workers: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Our (images ``[B, S, S, 3] uint8``, targets), without end."""
    spec = StreamSpec(
        shards=str(shards),
        manifest_digest=manifest.digest,
        global_batch_size=batch_size,
        slots=range(batch_size),
        start_step=0,
        stop_step=1_000_000,
        seed=0,
        shuffle=Shuffle(),
        view=TrainView(crop="inception", crop_size=size, area_range=AREA_RANGE),
    )
    targets = Classification(loss="softmax", num_classes=manifest.num_classes).targets
    return ((batch.images, targets(batch.rows)) for batch in batches(spec, num_threads=num_workers))


def loader_batches(
    folder: Path, size: int, batch_size: int, num_workers: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The peer's (images ``[B, 3, S, S] uint8``, targets), without end."""
    transforms = (v2.RandomResizedCrop(size, scale=AREA_RANGE), v2.RandomHorizontalFlip(), v2.PILToTensor())
    loader = DataLoader(
        ImageFolder(folder, v2.Compose(transforms)),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=num_workers,
        persistent_workers=True,
    )
    while True:
        yield from loader


def our_step(model_name: str, size: int, batch_size: int) -> Step:
    plan = TrainPlan(
        kind="pretrain",
        model=model_name,
        num_classes=NUM_CLASSES,
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
    model = create_model(model_name, NUM_CLASSES).to(memory_format=torch.channels_last)
    step_fn = TrainStep(model, build_optimizer(model, plan), plan)
    return lambda step, images, targets: step_fn(step, [(images, targets)], 1)


def timm_network(model_name: str) -> nn.Module:
    """Network of the same size, by timm."""
    config = model_config(model_name, NUM_CLASSES)
    model = TimmResNetV2(
        config.units,
        width_factor=config.width,
        num_classes=NUM_CLASSES,
        stem_type="fixed",
        conv_layer=partial(StdConv2d, eps=1e-8),
        norm_layer=partial(GroupNormAct, num_groups=32),
    )
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, create_model(model_name, NUM_CLASSES))]
    assert sizes[0] == sizes[1], sizes
    return model


def peer_step(model: nn.Module, layout: torch.memory_format, weight_decay: float = 1e-4) -> Step:
    """A plain training loop over a network, on images ``[B, 3, H, W] uint8``."""
    model.to(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.003, momentum=0.9, weight_decay=weight_decay)

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


def measure_batches(
    opened: Callable[[], Iterator[tuple[torch.Tensor, torch.Tensor]]], step: Step | None, seconds: float, block: int
) -> Measured:
    """Take batches, with a step on each if there is one, until the time is over.

    Args:
        opened: Starts the source.
        step: What to do with a batch.
        seconds: Least length, after a warm-up of half of it.
        block: Batches that are measured together; the time is taken at the first of them.
    """
    settle()
    me = psutil.Process()
    start = time.perf_counter()
    first_s, num_images, begun = 0.0, 0, None
    for number, (images, targets) in enumerate(opened()):
        now = time.perf_counter()
        if number == 0:
            first_s = now - start
        elif number % block == 0:
            if begun is None and now - start - first_s >= seconds / 2:
                num_images, begun = 0, (now, cpu_seconds(me))
            elif begun is not None and now - begun[0] >= seconds:
                return Measured(num_images, now - begun[0], cpu_seconds(me) - begun[1], (first_s,))
        if step is not None:
            step(number, images, targets)
        num_images += len(images)
    raise AssertionError("the source has no end")


def step_rows(setting: Setting, config: Config) -> Iterator[str]:
    size, batch_size = setting.crop_size, setting.batch_size
    images = torch.randint(256, (batch_size, size, size, 3), dtype=torch.uint8)
    targets = torch.randint(NUM_CLASSES, (batch_size,))
    peer_images = images.permute(0, 3, 1, 2).contiguous()
    ours, peer, eager = measure_steps(
        [
            (our_step(setting.model, size, batch_size), images),
            (peer_step(timm_network(setting.model), torch.channels_last), peer_images),
            (peer_step(timm_network(setting.model), torch.contiguous_format), peer_images),
        ],
        targets,
        config.seconds,
    )
    what = f"step, {setting.model}, {size} px, batch {batch_size}"
    yield row(what, "timm, channels_last", ours, peer)
    yield row(what, "timm, NCHW", ours, eager)


def finetune_rows(setting: Setting, config: Config) -> Iterator[str]:
    """Transfer of images in memory, views included: `fit` next to plain loops that take turns with it, step by step."""
    size, batch_size = setting.crop_size, setting.batch_size
    resize, count = size * 5 // 4, 8 * batch_size
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(256, size=(count, resize, resize, 3), dtype=np.uint8), rng.integers(10, size=count)
    examples = Examples(tuple(map(str, range(count))), list(pixels), labels)
    rule = hyperrule(
        count, (size, size), resize=resize, crop=size, batch_size=batch_size, num_steps=100_000, warmup_steps=0
    )
    plan = transfer_plan(
        rule, model=setting.model, num_classes=NUM_CLASSES, manifest_digest="", init="", init_digest="", seed=0
    )
    images, targets = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)
    view = v2.Compose((v2.RandomCrop(size), v2.RandomHorizontalFlip()))
    networks = (timm_network(setting.model), create_model(setting.model, NUM_CLASSES))
    peers = [peer_step(network, torch.channels_last, weight_decay=0.0) for network in networks]
    times: list[list[tuple[float, float]]] = [[] for _ in range(1 + len(peers))]
    started = time.perf_counter()
    mark = started, time.process_time()

    def taken() -> tuple[float, float]:
        nonlocal mark
        before, mark = mark, (time.perf_counter(), time.process_time())
        return mark[0] - before[0], mark[1] - before[1]

    def take_turns(step: int, loss: float) -> None:
        times[0].append(taken())
        for run, column in zip(peers, times[1:], strict=True):
            chosen = torch.randint(count, (batch_size,)).tolist()
            run(step, torch.stack([view(images[i]) for i in chosen]), targets[chosen])
            column.append(taken())
        if step >= 3 and time.perf_counter() - started > config.seconds * len(times):
            raise StopIteration

    with contextlib.suppress(StopIteration):
        fit(plan, examples, on_step=take_turns)
    ours, timm, same = (
        Measured(batch_size, *(statistics.median(c) for c in zip(*column[1:], strict=True))) for column in times
    )
    what = f"fine-tuning, {setting.model}, {size} px, batch {batch_size}"
    yield row(what, "plain loop, timm", ours, timm)
    yield row(what, "plain loop, same network", ours, same)


def stream_rows(setting: Setting, folder: Path, config: Config) -> Iterator[str]:
    name, size = setting.name, setting.crop_size
    shards = folder.with_name(f"{name}-shards")
    write_shards(folder, shards, name=name, num_workers=num_local_cores())
    manifest = read_manifest(str(shards))

    def measure(steps: tuple[Step | None, Step | None], batch_size: int, block: int) -> list[Measured]:
        def ours() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            return stream_batches(shards, manifest, size, batch_size, config.num_workers)

        def peer() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            return loader_batches(folder, size, batch_size, config.num_workers)

        # Ours between two halves of the peer, so that a drift of the machine's speed meets both.
        before = measure_batches(peer, steps[1], config.seconds / 2, 1)
        between = measure_batches(ours, steps[0], config.seconds, block)
        return [between, before + measure_batches(peer, steps[1], config.seconds / 2, 1)]

    # Whole epochs, because it reads several rounds of windows at a time.
    whole_epoch = NUM_EXAMPLES // STREAM_BATCH
    yield row(
        f"stream, {name}, {size} px",
        "DataLoader",
        *measure((None, None), STREAM_BATCH, whole_epoch),
    )
    steps = (
        our_step(SMALL_MODEL, size, setting.both_batch_size),
        peer_step(timm_network(SMALL_MODEL), torch.channels_last),
    )
    yield row(
        f"both, {name}, {SMALL_MODEL}, {size} px, batch {setting.both_batch_size}",
        "DataLoader and timm, channels_last",
        *measure(steps, setting.both_batch_size, 1),
    )


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

    settings = {name: {"glyphs": GLYPHS, "photos": PHOTOS}[name] for name in config.images}
    with tempfile.TemporaryDirectory(prefix="bit-ray-throughput-") as directory:
        folders = {name: Path(directory, name) for name in settings}
        for setting in settings.values():
            if "step" in config.rows:
                add(step_rows(setting, config))
            if "finetune" in config.rows:
                add(finetune_rows(setting, config))
        with cluster() if "stream" in config.rows else contextlib.nullcontext():
            for name, setting in settings.items():
                if "stream" in config.rows:
                    {"glyphs": write_glyphs, "photos": write_photos}[name](folders[name])
                    add(stream_rows(setting, folders[name], config))
            wall = time.perf_counter() - started
            others = (busy_seconds() - busy - (cpu_seconds(me) - own)) / wall
            settle()
    packages = ("torch", "torchvision", "ray", "timm", "pillow", "simplejpeg")
    columns = ("", "peer", "images/s", "peer's", "ratio", "CPU ms/image", "peer's", "first batch s", "peer's")
    print(f"`{' '.join(('python benchmarks/throughput.py', *sys.argv[1:]))}`, ", end="")
    print(f"{cpu_name()}, {num_local_cores()} cores, {platform.system()} {platform.machine()};")
    print(f"Python {platform.python_version()}, {', '.join(f'{name} {version(name)}' for name in packages)};")
    print(f"{wall:.0f} s in all; other processes used {others:.2f} cores meanwhile.\n")
    print(f"| {' | '.join(columns)} |\n| --- | --- |{' ---: |' * (len(columns) - 2)}")
    print("\n".join(rows))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
