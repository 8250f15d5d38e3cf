"""What breaks first with 1,000 nodes, 8,000 workers and 120,000 shards: manifest, order, records, messages, seats.

python benchmarks/control_plane.py

Everything measured is the project's own code at that size, in as few processes as it needs: one process plays all of
the workers' calls, and nodes are numbers in a resource. What needs real nodes is measured small, at several sizes, and
printed with its growth. Prints Markdown tables.
"""

import gc
import json
import multiprocessing
import os
import platform
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import torch
import torch.distributed as dist
import tyro

from bit_ray.cluster.seats import Seats
from bit_ray.cluster.slots import num_local_cores
from bit_ray.cluster.tasks import each
from bit_ray.data.shards.build import ShardResult, shard_name
from bit_ray.data.shards.manifest import MANIFEST, Manifest, Shard, read_manifest, write_manifest
from bit_ray.data.shards.row_group import CHECKSUM_DIGITS
from bit_ray.data.shards.writing import Writing
from bit_ray.data.stream.order import Order
from bit_ray.data.stream.settings import Shuffle
from bit_ray.run_folder import TRAINING_FILE, RunFolder
from bit_ray.tracking.config import TrackingConfig
from bit_ray.tracking.runs import TrackedRun
from bit_ray.training.agreement import Agreement
from bit_ray.training.messages import Messages, Sign, seconds_between_signs

Rows = list[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to measure."""

    parts: tuple[str, ...] = ("manifest", "writing", "tasks", "messages", "seats", "agreement", "folder", "tracking")
    """Which parts."""
    num_shards: int = 120_000
    """Shards of the set."""
    images_per_shard: int = 2_500
    """300 million images in all."""
    row_group_size: int = 64
    """Images of a row group."""
    num_workers: int = 8_000
    """Training workers, on nodes of eight."""
    batch_size: int = 16_384
    """Images of a step: two or three for each worker."""
    num_tasks: int = 2_000
    """Empty Ray tasks."""
    ranks: tuple[int, ...] = (8, 16, 32, 64)
    """Processes that really agree with each other."""


def shards(config: Config) -> tuple[Shard, ...]:
    groups = -(-config.images_per_shard // config.row_group_size)
    return tuple(
        Shard(
            path=shard_name(i),
            num_examples=config.images_per_shard,
            num_bytes=config.images_per_shard * 110_000,
            sha256=secrets.token_hex(32),
            checksums=secrets.token_hex(groups * CHECKSUM_DIGITS // 2),
        )
        for i in range(config.num_shards)
    )


def timed(
    action: Callable[[], Any], times: int = 1, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, Any]:
    """Best seconds of some runs, and the last result."""
    best, result = float("inf"), None
    for _ in range(times):
        started = clock()
        result = action()
        best = min(best, clock() - started)
    return best, result


cpu_timed = partial(timed, clock=time.process_time)
"""Seconds of a processor, for what one process does alone: a busy machine does not change them much."""


def memory() -> float:
    gc.collect()
    return float(psutil.Process().memory_info().rss)


def manifest_and_order(config: Config, place: Path) -> Rows:
    """What every worker does before its first batch."""
    made: Manifest | None = Manifest(
        name="many",
        class_names=tuple(f"class-{i}" for i in range(18_291)),
        multi_label=True,
        row_group_size=config.row_group_size,
        median_image_size=(375, 500),
        num_examples=config.num_shards * config.images_per_shard,
        shards=shards(config),
    )
    wrote, _ = cpu_timed(partial(write_manifest, place, made))
    size = os.path.getsize(place / MANIFEST)
    made = None
    before = memory()
    read, manifest = cpu_timed(lambda: read_manifest(place))
    digest, _ = cpu_timed(lambda: manifest.digest)
    with_manifest = memory()
    order = Order(
        shard_sizes=np.array([shard.num_examples for shard in manifest.shards]),
        row_group_size=config.row_group_size,
        global_batch_size=config.batch_size,
        seed=0,
        shuffle=Shuffle(num_lanes=config.num_workers),
    )
    slots = range(0, max(1, config.batch_size // config.num_workers))

    def first_unit() -> Any:
        return order.unit(order.unit_range(slots, 0, 10**6).start, slots)

    first, unit = cpu_timed(first_unit)
    after, _ = cpu_timed(lambda: order.unit(order.unit_range(slots, 0, 10**6).start + 1, slots), 3)
    middle = order.num_examples // config.batch_size // 2
    late, _ = cpu_timed(lambda: order.unit(order.unit_range(slots, middle, 10**6).start, slots))
    with_order = memory()
    groups = len(np.unique(unit.shards * 10**6 + unit.rows // config.row_group_size))
    return [
        ("manifest written", f"{wrote:.1f} s of CPU, {size / 1e6:,.1f} MB"),
        ("manifest read and checked, by the driver", f"{read:.1f} s of CPU, and {digest:.2f} s for its digest"),
        ("memory of a worker for it", f"{(with_manifest - before) / 1e6:,.0f} MB"),
        (
            "it comes to each node once, as Ray packs it",
            f"{len(ray.cloudpickle.dumps(manifest)) * config.num_workers / 8e9:,.0f} GB over the network at a start",
        ),
        ("first window of an epoch, with the permutation of its row groups", f"{first:.2f} s of CPU"),
        ("a window after it", f"{after * 1e3:.1f} ms for {len(unit.steps):,} images in {groups:,} row groups"),
        ("first window in the middle of an epoch", f"{late * 1e3:.0f} ms"),
        ("memory of a worker for the order", f"{(with_order - with_manifest) / 1e6:,.0f} MB"),
    ]


def writing_record(config: Config, place: Path) -> Rows:
    """What the driver of `shards write` records while shards are finished."""
    rows = []
    writing = Writing(str(place), {"source": "many"}, on_bad="error")
    results = [
        ShardResult(index=i, shard=shard, median_image_size=(375, 500)) for i, shard in enumerate(shards(config))
    ]
    for count in (len(results) // 12, len(results) // 3, len(results)):
        for result in results[len(writing.done) : count]:
            writing.done[result.index] = result
        seconds, _ = cpu_timed(writing.save)
        size = os.path.getsize(next(place.glob("_writing.json")))
        rows.append((f"record saved with {count:,} shards done", f"{seconds:.2f} s of CPU, {size / 1e6:,.1f} MB"))
    again, _ = cpu_timed(writing.save)
    rows.append(("the same again, with no shard more", f"{again:.2f} s of CPU"))
    return rows


def nothing(number: int) -> int:
    return number


def tasks(config: Config, place: Path) -> Rows:
    """Empty tasks from one driver, as `shards write --num-workers` gives them out."""
    with small_cluster():
        list(each(nothing, ((i,) for i in range(64)), 2 * num_local_cores()))  # starts the worker processes
        seconds, _ = timed(lambda: list(each(nothing, ((i,) for i in range(config.num_tasks)), 2 * num_local_cores())))
        many, _ = timed(lambda: list(each(nothing, ((i,) for i in range(config.num_tasks)), 1_000)))
    rate = config.num_tasks / seconds
    return [
        ("tasks of one driver", f"{rate:,.0f} a second; {config.num_shards:,} take {config.num_shards / rate:,.0f} s"),
        ("the same with 1,000 in flight", f"{config.num_tasks / many:,.0f} a second"),
    ]


def messages(config: Config, place: Path) -> Rows:
    """Signs of life of all workers through the one actor, and what the driver asks four times a second."""
    with small_cluster():
        actor = Messages()
        node = ray.get_runtime_context().get_node_id()
        signs = [
            Sign(rank=rank, node_id=node, host="10.0.0.1", step=7, phase="computing", since_s=0.1)
            for rank in range(config.num_workers)
        ]
        actor.signs(1)
        ray.get([actor.show(1, sign) for sign in signs[:100]])

        def all_show() -> None:
            ray.get([actor.show(1, sign) for sign in signs])

        seconds, _ = timed(all_show, 3)
        asked, found = timed(lambda: actor.signs(1), 3)
        assert len(found[0]) == config.num_workers
        report = {"step": 1, **{f"metric/{i}": 0.5 for i in range(20)}}
        sent, _ = timed(lambda: ray.get([actor.send(report) for _ in range(1_000)]))
        actor.end()
    rate = config.num_workers / seconds
    return [
        ("signs of life that one actor takes", f"{rate:,.0f} a second"),
        (
            f"what {config.num_workers:,} workers would send at two a second each",
            f"{2 * config.num_workers:,} a second, {2 * config.num_workers / rate:.1f} times that",
        ),
        ("what they send", f"one each in {seconds_between_signs(config.num_workers):g} s"),
        ("the driver's question for all signs", f"{asked * 1e3:,.0f} ms; it is asked four times a second"),
        ("reports of metrics that it takes", f"{1_000 / sent:,.0f} a second; one worker sends them"),
    ]


def seats(config: Config, place: Path) -> Rows:
    """The placement groups that count how many workers there is room for."""
    rows = []
    with small_cluster(resources={"seat": config.num_workers}):
        for number in (config.num_workers // 16, config.num_workers // 4, config.num_workers):
            started = time.perf_counter()
            held = Seats({"seat": 1.0}, number)
            asked, groups = time.perf_counter() - started, len(held._groups)
            while held.ready() < number and time.perf_counter() - started < 240:
                time.sleep(0.25)
            stood = time.perf_counter() - started
            look, ready = timed(held.ready)
            held.release()
            rows.append(
                (
                    f"room for {number:,} workers in {groups} placement groups",
                    f"asked for in {asked:.1f} s, {ready:,} stood after {stood:.1f} s; one look {look * 1e3:,.0f} ms",
                )
            )
    return rows


def agree(rank: int, size: int, port: int, lazy: bool, queue: Any) -> None:
    """One rank: seconds until all can agree, and of one exchange."""
    if lazy:
        os.environ["TORCH_GLOO_LAZY_INIT"] = "1"
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0)
    # Any backend for the world, as NCCL on GPUs: the group of the agreement is what is measured.
    dist.init_process_group("fake" if size == 1 else "gloo", store=store, rank=rank, world_size=size)
    dist.barrier()
    started = time.perf_counter()
    agreement = Agreement(size)
    made = time.perf_counter() - started
    agreement.exchange(False, False)
    agreement.finish()
    begun = time.perf_counter() - started
    started = time.perf_counter()
    for _ in range(20):
        agreement.exchange(False, False)
    agreement.finish()
    each_s = (time.perf_counter() - started) / 20
    sockets = len([c for c in psutil.Process().net_connections(kind="tcp") if c.status == "ESTABLISHED"])
    if rank == 0:
        queue.put((made, begun, each_s, sockets))
    dist.barrier()


def agreement(config: Config, place: Path) -> Rows:
    """The workers' group that agrees on leaving and saving, of real processes."""
    rows, context = [], multiprocessing.get_context("fork")
    for lazy in (False, True):
        for size in config.ranks:
            queue: Any = context.Queue()
            port = dist.TCPStore("127.0.0.1", 0, 1, is_master=True).port
            processes = [context.Process(target=agree, args=(rank, size, port, lazy, queue)) for rank in range(size)]
            for process in processes:
                process.start()
            made, begun, each_s, sockets = queue.get(timeout=300)
            for process in processes:
                process.join()
            rows.append(
                (
                    f"group of {size} workers" + (", connected as needed" if lazy else ", all connected"),
                    f"{made * 1e3:,.0f} ms, first exchange after {begun * 1e3:,.0f} ms, others {each_s * 1e3:.1f} ms; "
                    f"{sockets} connections of rank 0",
                )
            )
    return rows


def folder(config: Config, place: Path) -> Rows:
    """A run's folder with the checkpoints that registered versions keep."""
    run = RunFolder(str(place))
    rows = []
    for number in (10, 1_000):
        for step in range(1, number + 1):
            checkpoint = Path(run.checkpoint(step))
            if not checkpoint.exists():
                checkpoint.mkdir()
                for name in (TRAINING_FILE, "model.safetensors", "model.json", "optimizer.safetensors"):
                    (checkpoint / name).touch()
        seconds, newest = timed(run.newest_checkpoint, 3)
        assert newest == number
        rows.append((f"newest of {number:,} checkpoints found", f"{seconds * 1e3:,.1f} ms"))
    return rows


def tracking(config: Config, place: Path) -> Rows:
    """The metrics of a log line, from the driver to MLflow."""
    metrics = {f"train/m{i}": 0.5 for i in range(20)}
    with TrackedRun.open(
        TrackingConfig(), run_name="many", storage=str(place), params={}, tags={}, kind="pretrain"
    ) as run:
        run.log_metrics(metrics, step=0)
        seconds, _ = timed(lambda: [run.log_metrics(metrics, step=step) for step in range(1, 101)])
    return [("a log line of 20 metrics, from one process, whatever the number of workers", f"{seconds * 10:.1f} ms")]


@contextmanager
def small_cluster(**settings: Any) -> Iterator[None]:
    """A Ray of this machine's cores on free ports."""
    ray.init(
        "local",
        num_cpus=num_local_cores(),
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        **settings,
    )
    try:
        yield
    finally:
        ray.shutdown()


PARTS: dict[str, Callable[[Config, Path], Rows]] = {
    "manifest": manifest_and_order,
    "writing": writing_record,
    "agreement": agreement,
    "tasks": tasks,
    "messages": messages,
    "seats": seats,
    "folder": folder,
    "tracking": tracking,
}


def main(config: Config) -> None:
    """Measure and print."""
    print(
        f"{platform.processor() or platform.machine()}, {num_local_cores()} cores, Python {platform.python_version()}, "
        f"ray {ray.__version__}, torch {torch.__version__}; {json.dumps(os.getloadavg())}"
    )
    for name, part in PARTS.items():
        if name in config.parts:
            with tempfile.TemporaryDirectory(prefix="control-") as directory:
                print(f"\n| {name} | |\n| --- | --- |", flush=True)
                for row in part(config, Path(directory)):
                    print(f"| {row[0]} | {row[1]} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
