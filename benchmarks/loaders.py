"""Whole loaders, from stored JPEG files to uint8 batches in the training process: ours next to seven others.

python benchmarks/loaders.py

Prints a Markdown table. See benchmarks/README.md for what is compared with what.
"""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import psutil
import tyro
from candidates import BATCH_SIZE, CANDIDATES, Candidate, Run
from corpus import make_corpus
from measure import memory_bytes

from bit_ray.cluster.slots import num_local_cores
from bit_ray.errors import BitRayError, ConfigError

INTERVAL_S = 0.5
TIMEOUT_S = 900
# Batches at either end of an epoch that do not count: shuffle buffers of 1,000 images fill at its start, and at its end
# they run empty and workers out of work.
EDGE = 24
# Local disk ("") comes along, where ours reads from; then the epoch that counts: the first reads all from the store.
PLACES = {"": 1, "s3-cold": 0, "s3-warm": 1}
TORCH = "import torch, time; time.sleep(2)"
CLUSTER = "import time; from bit_ray.cluster.session import cluster\nwith cluster(): time.sleep(4)"
NAMES = (
    *(name for name, candidate in CANDIDATES.items() if candidate.open is not None),
    *(f"{name}{place and '-'}{place}" for name in ("ours", "ours_seekable") for place in PLACES),
)


@dataclass(frozen=True, kw_only=True)
class Config(Run):
    """What to measure."""

    num_images: int = 3000
    """Different images."""
    num_copies: int = 4
    """Names of each image: an epoch is so many times as long."""
    rounds: int = 3
    """Times that all loaders take turns."""
    only: tuple[str, ...] = ()
    """Loaders to measure; empty: all of them."""
    directory: str = ""
    """Folder that keeps the images in all their stored forms for the next time; empty: a temporary one."""
    output: str = ""
    """JSON file of all that was measured."""


@dataclass(frozen=True)
class Sample:
    """All processes of a run at one moment."""

    time: float
    cpu_s: float
    pss: int


@dataclass
class Ran:
    """One run of one loader."""

    images_per_s: float
    cpu_ms: float
    first_s: float
    next_epoch_s: float
    peak_mb: float
    """Above what ``import torch`` takes."""
    server_cpu_ms: float
    """CPU milliseconds per image of the S3 server."""
    counts: str


@dataclass
class Store:
    """The S3 server, if there is one."""

    environment: dict[str, str] = field(default_factory=dict)
    process: psutil.Process | None = None
    bucket: str = "loaders"


def cpu_seconds(root: psutil.Process, seen: dict[psutil.Process, float]) -> float:
    """CPU seconds of a process and its descendants, those that have ended included as they were last seen.

    Ray's daemons do not wait for the workers that they end, so that the system keeps no account of these.
    """
    for process in [root, *root.children(recursive=True)]:
        with suppress(psutil.Error):  # ended since it was listed
            times = process.cpu_times()
            seen[process] = times.user + times.system
    return sum(seen.values())


def sampled(command: list[str], store: Store, log: Path) -> tuple[str, list[Sample], list[Sample]]:
    """Run a command to its end.

    Args:
        command: What to run.
        store: Its environment is set.
        log: Where what the command says goes.

    Returns:
        What it printed, and samples of all its processes and of the server.
    """
    samples, of_server = [], []
    seen: dict[psutil.Process, float] = {}
    seen_of_server: dict[psutil.Process, float] = {}
    with log.open("w+") as out:
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **store.environment})
        root, deadline = psutil.Process(child.pid), time.monotonic() + TIMEOUT_S
        while True:
            try:
                now, tree = time.monotonic(), [root, *root.children(recursive=True)]
                # Telling the memory costs the process time, so it is asked every other time.
                pss = sum(map(memory_bytes, tree)) if len(samples) % 2 == 0 else 0
                samples.append(Sample(now, cpu_seconds(root, seen), pss))
                if store.process is not None:
                    of_server.append(Sample(now, cpu_seconds(store.process, seen_of_server), 0))
            except psutil.Error:  # it has just ended
                pass
            try:
                status = child.wait(INTERVAL_S)
                break
            except subprocess.TimeoutExpired:
                if time.monotonic() > deadline:
                    for process in reversed(root.children(recursive=True)):
                        process.kill()
                    child.kill()
        out.seek(0)
        said = out.read()
    if status != 0:
        raise RuntimeError(f"{' '.join(command)}: exit status {status}\n{said[-3000:]}")
    return said, samples, of_server


def cpu_between(samples: list[Sample], start: float, stop: float) -> float:
    """CPU seconds between two moments."""
    at = np.interp([start, stop], [s.time for s in samples], [s.cpu_s for s in samples])
    return float(at[1] - at[0])


def idle_pss(program: str, log: Path) -> int:
    """Peak memory of a program that does nothing."""
    _, samples, _ = sampled([sys.executable, "-c", program], Store(), log)
    return max(sample.pss for sample in samples)


def measure(name: str, data: str, epoch: int, config: Config, store: Store, directory: Path, base: int) -> Ran:
    """Run a loader once."""
    cache = directory / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    run = {key: value for key, value in asdict(config).items() if key in Run.__dataclass_fields__}
    run["cache"] = str(cache)
    command = [sys.executable, str(Path(__file__).with_name("candidates.py")), "run", name, data, json.dumps(run)]
    said, samples, of_server = sampled(command, store, directory / f"{name}.log")
    shutil.rmtree(cache, ignore_errors=True)
    result = json.loads(said.splitlines()[-1])
    (first_start, first), (next_start, second) = result["epochs"]
    times = (first, second)[epoch]
    edge = min(EDGE, len(times) // 8)
    start, stop = times[edge], times[-1 - edge]
    images = BATCH_SIZE * (len(times) - 1 - 2 * edge)
    return Ran(
        images_per_s=images / (stop - start),
        cpu_ms=1000 * cpu_between(samples, start, stop) / images,
        first_s=first[0] - first_start,
        next_epoch_s=second[0] - next_start,
        peak_mb=(max(sample.pss for sample in samples) - base) / 1e6,
        server_cpu_ms=1000 * cpu_between(of_server, start, stop) / images if of_server else 0.0,
        counts=result["counts"],
    )


def split(name: str) -> tuple[Candidate, str, str]:
    """A candidate, its name, and the place it reads from."""
    name, _, place = name.partition("-")
    return CANDIDATES[name], name, place


def prepare(names: list[str], config: Config, directory: Path) -> dict[str, Path]:
    """Store the images in all forms that are needed and not there yet."""
    wanted = {"folder": "", **{split(name)[0].data: split(name)[1] for name in names}}
    paths = {form: directory / f"{form}-{config.num_images}x{config.num_copies}" for form in wanted}
    for form, path in paths.items():
        if path.exists():
            continue
        print(f"storing {form}", file=sys.stderr, flush=True)
        part = path.with_name(f"{path.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        if form == "folder":
            for image in make_corpus(directory / f"corpus-{config.num_images}", config.num_images):
                (part / image.parent.name).mkdir(parents=True, exist_ok=True)
                for copy in range(config.num_copies):
                    os.link(image, part / image.parent.name / f"{image.stem}-{copy}.jpg")
        else:
            script = str(Path(__file__).with_name("candidates.py"))
            command = [sys.executable, script, "write", wanted[form], str(paths["folder"]), str(part)]
            sampled(command, Store(), directory / f"{form}.log")
        part.rename(path)
    return paths


@contextmanager
def s3_store(paths: list[Path], directory: Path) -> Iterator[Store]:
    """A real S3 server on this machine that holds some shard sets."""
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "integration"))
    from s3_server import Bucket, S3Server

    if not paths:
        yield Store()
        return
    with tempfile.TemporaryDirectory(prefix="s3-", dir=directory) as where:
        server = S3Server(Path(where) / "server")
        server.start()
        try:
            client = server.client()
            store = Store(Bucket(server.endpoint, "", client, server).environment, psutil.Process(server.process.pid))
            client.create_bucket(Bucket=store.bucket)
            for path in paths:
                print(f"uploading {path.name}", file=sys.stderr, flush=True)
                for file in path.rglob("*"):
                    if file.is_file():
                        client.upload_file(str(file), store.bucket, str(file.relative_to(path.parent)))
            yield store
        finally:
            server.stop()


def package_versions(names: list[str]) -> str:
    """Packages that take part, with their versions."""
    packages = ["torch", "torchvision", "ray", "pillow", "simplejpeg"]
    packages += sorted({package for name in names for package in split(name)[0].packages}.difference(packages))
    try:
        return ", ".join(f"{package} {version(package)}" for package in packages)
    except PackageNotFoundError as error:
        raise ConfigError(
            f"only: {error.name} is not installed; accepted: installed loaders; run pip install -r "
            "benchmarks/requirements.txt, or name others"
        ) from None


def rows(ran: dict[str, list[Ran]]) -> Iterator[tuple[str, ...]]:
    """Lines of the table: the best images/s, and medians."""
    for name, runs in ran.items():
        candidate, _, place = split(name)

        def median(column: str, runs: list[Ran] = runs) -> float:
            return statistics.median(getattr(run, column) for run in runs)

        yield (
            candidate.title + {"": "", "s3-cold": ", S3, empty cache", "s3-warm": ", S3, warm cache"}[place],
            f"{max(run.images_per_s for run in runs):,.0f}",
            f"{median('cpu_ms'):.2f}",
            f"{median('first_s'):.2f}",
            f"{median('next_epoch_s'):.2f}",
            f"{median('peak_mb'):,.0f}",
            f"{median('server_cpu_ms'):.2f}" if place == "s3-cold" else "",
        )


def main(config: Config) -> int:
    if unknown := set(config.only).difference(NAMES):
        raise ConfigError(f"only: {', '.join(sorted(unknown))}; accepted: {', '.join(NAMES)}; choose among them")
    names = [name for name in NAMES if not config.only or name in config.only]
    versions = package_versions(names)
    ran: dict[str, list[Ran]] = {name: [] for name in names}
    failed: set[str] = set()
    idle_clusters: list[float] = []
    with tempfile.TemporaryDirectory(prefix="bit-ray-loaders-") as temporary:
        directory = Path(config.directory or temporary).absolute()
        directory.mkdir(parents=True, exist_ok=True)
        paths = prepare(names, config, directory)
        of_store = {paths[split(name)[0].data] for name in names if split(name)[2]}
        with s3_store(sorted(of_store), directory) as store:
            for number in range(config.rounds):
                base = idle_pss(TORCH, directory / "torch.log")
                idle_clusters.append(idle_pss(CLUSTER, directory / "cluster.log") / 1e6)
                for name in names:
                    if name in failed:
                        continue
                    candidate, own_name, place = split(name)
                    path = paths[candidate.data]
                    data = f"s3://{store.bucket}/{path.name}" if place else str(path)
                    try:
                        result = measure(own_name, data, PLACES[place], config, store, directory, base)
                    except RuntimeError as error:
                        failed.add(name)
                        print(f"{name} failed: {error}", file=sys.stderr, flush=True)
                        continue
                    ran[name].append(result)
                    print(f"round {number + 1}, {name}: {result}", file=sys.stderr, flush=True)
    if config.output:
        measured = {name: [asdict(run) for run in runs] for name, runs in ran.items()}
        Path(config.output).write_text(json.dumps({"config": asdict(config), "ran": measured}, indent=1))
    print(f"`{' '.join(('python benchmarks/loaders.py', *sys.argv[1:]))}`, {num_local_cores()} cores,", end=" ")
    print(f"{platform.system()} {platform.machine()}; Python {platform.python_version()},", end=" ")
    print(f"{versions}. Loaders on Ray include an idle cluster of {statistics.median(idle_clusters):,.0f} MB.\n")
    columns = (
        "images/s",
        "CPU ms/image",
        "first batch s",
        "next epoch's s",
        "MB above torch",
        "S3 server's CPU ms/image",
    )
    print(f"| loader | {' | '.join(columns)} |\n| --- |{' ---: |' * len(columns)}")
    for row in rows({name: runs for name, runs in ran.items() if runs}):
        print(f"| {' | '.join(row)} |")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Config, description=__doc__)))
    except BitRayError as error:
        sys.exit(f"error: {error}")
