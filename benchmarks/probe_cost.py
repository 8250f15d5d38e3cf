"""What probes of checkpoints cost the training that they watch.

    python benchmarks/probe_cost.py

The same pre-training with and without probes, in turns, one worker, checkpoints so often that a probe is nearly always
running. Two cases: a core is free, and all cores train. Prints the rate of each, and how much of the time was probed.
"""

import statistics
import sys
import tempfile
import time
from dataclasses import dataclass

import tyro
from mlflow import MlflowClient
from transfer import shards, upstream_recipe

from bit_ray.cluster.session import cluster
from bit_ray.cluster.slots import num_local_cores
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.evaluation.config import ProbeConfig
from bit_ray.training.config import PretrainConfig, Runtime
from bit_ray.training.pretrain import pretrain


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to measure."""

    steps: int = 200
    """Steps of 128 images of each run."""
    every: int = 20
    """Steps between checkpoints."""
    rounds: int = 3
    """Pairs of runs."""
    model: str = "R1-1-1-1x0.5"
    """Network."""
    busy: bool = True
    """Also measure where all cores train."""


def run(config: Config, storage: str, name: str, num_workers: int, probe: ProbeConfig) -> tuple[list[float], float]:
    """Images per second of each stretch between two checkpoints, but the first, and seconds of probes."""
    place = shards("glyphs:s", storage)
    trained = pretrain(
        PretrainConfig(
            name=name,
            shards=place,
            model=config.model,
            recipe=upstream_recipe(config.steps, read_manifest(place).num_examples),
            storage=storage,
            probe=probe,
            runtime=Runtime(
                num_workers=num_workers,
                num_decode_threads=1,
                log_every_steps=config.every,
                checkpoint_every_steps=config.every,
            ),
        )
    )
    assert trained is not None
    client = MlflowClient(tracking_uri=f"sqlite:///{storage}/mlflow.db")

    def history(metric: str) -> list[float]:
        return [m.value for m in client.get_metric_history(trained.result.run_id, metric)]

    return history("speed/images_per_s")[1:], sum(history("probe/seconds"))


def main(config: Config) -> None:
    print("| workers | cores | images/s | with probes | ratio | share of the time probed |", flush=True)
    print("| ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    with tempfile.TemporaryDirectory() as storage, cluster():
        train, test = (shards(f"digits:{split}", storage) for split in ("train", "test"))
        probe = ProbeConfig(shards=train, test_shards=test)
        cores = num_local_cores()
        for num_workers in sorted({max(1, cores - 1), cores} if config.busy else {max(1, cores - 1)}):
            rates: dict[str, list[float]] = {"plain": [], "probed": []}
            share = []
            run(config, storage, f"warm-up-{num_workers}", num_workers, ProbeConfig())
            for number in range(config.rounds):
                for kind in ("plain", "probed") if number % 2 else ("probed", "plain"):  # neither always first
                    started = time.perf_counter()
                    name = f"{kind}-{num_workers}-{number}"
                    found, seconds = run(
                        config, storage, name, num_workers, probe if kind == "probed" else ProbeConfig()
                    )
                    rates[kind] += found
                    took = time.perf_counter() - started
                    if kind == "probed":
                        share.append(seconds / took)
                    print(f"{name}: {statistics.median(found):.0f} images/s, {took:.0f} s", file=sys.stderr, flush=True)
            plain, probed = (statistics.median(rates[kind]) for kind in ("plain", "probed"))
            print(
                f"| {num_workers} | {cores} | {plain:,.0f} | {probed:,.0f} | {probed / plain:.3f} | "
                f"{statistics.median(share):.0%} |",
                flush=True,
            )
    print(f"\n{config}")


if __name__ == "__main__":
    main(tyro.cli(Config))
