"""Peak memory of each worker of real pre-trainings on this machine's CPUs, next to what the plan says.

python benchmarks/memory.py --cases R50x1:64:16:1 R50x1:64:16:2

A case is NETWORK:PIXELS:IMAGES:WORKERS, with the images that each worker has at a time. It runs `bit-ray pretrain` for
a few steps; a worker's peak is the VmHWM of its process, from Linux's /proc.
"""

import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import tyro

from bit_ray.config_files import write_config
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.recipes.upstream import bit_m
from bit_ray.training.config import PretrainConfig, Runtime
from bit_ray.training.memory import worker_memory
from bit_ray.training.pretrain import pretrain_plan

_STEPS = 3
_CASES = (
    "R1-1-1-1x0.5:32:64:1",
    "R1-1-1-1x0.5:32:64:2",
    "R1-1-1-1x0.5:128:32:1",
    "R26x1:64:32:1",
    "R50x1:64:16:1",
    "R50x1:64:16:2",
    "R50x1:128:16:1",
    "R50x1:128:8:2",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure."""

    cases: tuple[str, ...] = _CASES
    """NETWORK:PIXELS:IMAGES:WORKERS."""
    source: str = "glyphs:s"
    """What is trained on: an embedded set, or a folder of class folders."""


def peaks(root: psutil.Process) -> dict[int, int]:
    """VmHWM of each training worker below a process, bytes by process id."""
    found = {}
    for process in root.children(recursive=True):
        try:
            if "TrainWorker" in " ".join(process.cmdline()):
                status = Path(f"/proc/{process.pid}/status").read_text()
                found[process.pid] = 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])
        except (psutil.Error, OSError, TypeError):  # it ends
            continue
    return found


def main(config: Config) -> None:
    command = [sys.executable, "-m", "bit_ray.cli.main"]
    print("| network | pixels | images | workers | plan, GB | measured, GB | plan / measured |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        shards = f"{folder}/shards"
        convert = () if ":" in config.source else ("--name", "photographs", "--convert-images", "--upright")
        subprocess.run([*command, "shards", "write", config.source, shards, *convert], check=True, capture_output=True)
        manifest = read_manifest(shards)
        for i, case in enumerate(config.cases):
            model, *numbers = case.split(":")
            pixels, num_images, workers = map(int, numbers)
            batch = num_images * workers
            recipe = replace(
                bit_m(),
                epochs=_STEPS * batch / manifest.num_examples,
                global_batch_size=batch,
                crop_size=pixels,
                warmup_steps=0,
                decay_epochs=(),
            )
            runtime = Runtime(num_workers=workers, micro_batch_size=num_images, precision="fp32")
            settings = PretrainConfig(
                name=f"case-{i}",
                shards=shards,
                storage=f"{folder}/runs",
                model=model,
                recipe=recipe,
                runtime=runtime,
            )
            write_config(settings, f"{folder}/config.json")
            told = worker_memory(pretrain_plan(settings, manifest), runtime, workers, num_images) / 1e9
            with open(f"{folder}/log", "w") as log:
                child = subprocess.Popen(
                    [*command, "pretrain", "--config", f"{folder}/config.json"], stdout=log, stderr=log
                )
                found: dict[int, int] = {}
                while child.poll() is None:
                    found |= peaks(psutil.Process(child.pid))
                    time.sleep(0.1)
            if child.returncode or len(found) != workers:
                print(Path(f"{folder}/log").read_text()[-2000:], file=sys.stderr)
                sys.exit(f"{case}: exit status {child.returncode}, {len(found)} workers were seen")
            measured = max(found.values()) / 1e9
            print(
                f"| {model} | {pixels} | {num_images} | {workers} | {told:.2f} | {measured:.2f} | "
                f"{told / measured:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
