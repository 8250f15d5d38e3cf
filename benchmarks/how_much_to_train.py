"""All of a network or a part of it: parameters, memory, time and accuracy of each choice of ``--train``, side by side.

python benchmarks/how_much_to_train.py

Pre-trains a small network on rendered characters and transfers it to a few handwritten digits per class, every choice
on the same draws with the same settings. Prints a Markdown table; about four minutes on two cores.
"""

import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import torch
import tyro

from bit_ray.cluster.slots import num_local_cores
from bit_ray.data.images.decode import decode_image
from bit_ray.data.images.views import TrainView
from bit_ray.data.sources.embedded.catalog import open_embedded
from bit_ray.evaluation.subsets import few_shot_subset
from bit_ray.recipes.hyperrule import hyperrule
from bit_ray.recipes.schedules import Schedule
from bit_ray.training.device import normalize, to_channels_last
from bit_ray.training.in_memory import Examples, fit
from bit_ray.training.learner import build_model
from bit_ray.training.optimizer import build_optimizer
from bit_ray.training.parts import count_parameters
from bit_ray.training.plan import TrainPlan, transfer_plan
from bit_ray.training.step import TrainStep

SIZE = 32


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to compare."""

    train: tuple[str, ...] = ("all", "stages:2", "stages:1", "adapters:8", "adapters:2", "norm_bias", "head")
    """Choices of what is trained."""
    lrs: tuple[float, ...] = (0.01, 0.03, 0.1)
    """Learning rates; the first is the setting of the quickstart, and the best of all is shown next to it."""
    model: str = "R1-1-1-1x0.5"
    """Network."""
    upstream: str = "glyphs:s"
    """Upstream data."""
    upstream_steps: int = 400
    """Steps of 128 images of the pre-training."""
    shots: int = 10
    """Digits per class."""
    num_subsets: int = 5
    """Draws; the median is shown."""
    num_steps: int = 30
    """Steps of the transfer."""
    batch_size: int = 64
    """Images per step of it."""
    rounds: int = 15
    """Steps of each choice that are timed."""


def read(name: str, limit: int = 0) -> Examples:
    source = open_embedded(name)
    indices = np.arange(len(source), dtype=np.int64)
    if limit:
        indices = np.sort(np.random.default_rng(0).permutation(indices)[:limit])
    found = list(source.part(indices))
    labels = np.array([example.labels[0] for example in found])
    return Examples(tuple(e.id for e in found), [decode_image(e.image) for e in found], labels)


def pretrained(config: Config, examples: Examples) -> dict[str, torch.Tensor]:
    steps = config.upstream_steps
    schedule = Schedule(
        base_lr=0.06, num_steps=steps, warmup_steps=steps // 10, boundaries=(steps * 6 // 10, steps * 9 // 10)
    )
    plan = TrainPlan(
        kind="pretrain",
        model=config.model,
        num_classes=int(examples.labels.max()) + 1,
        manifest_digest="",
        num_examples=len(examples.ids),
        view=TrainView(crop="inception", crop_size=SIZE, area_range=(0.4, 1.0), random_flip=False),
        resize_mode="shorter_side",
        resize_size=SIZE,
        loss="softmax",
        schedule=schedule,
        global_batch_size=128,
        weight_decay=1e-4,
    )
    losses: list[float] = []
    model = fit(plan, examples, on_step=lambda step, loss: losses.append(loss))
    print(f"pre-trained, loss {np.mean(losses[:5]):.2f} to {np.mean(losses[-5:]):.2f}", file=sys.stderr)
    return model.state_dict()


def plan_of(config: Config, train: str, lr: float, num_examples: int, seed: int) -> TrainPlan:
    rule = hyperrule(
        num_examples,
        (SIZE, SIZE),
        random_flip=False,
        resize=36,
        crop=SIZE,
        num_steps=config.num_steps,
        batch_size=config.batch_size,
        base_lr=lr,
    )
    return transfer_plan(
        rule,
        model=config.model,
        num_classes=10,
        manifest_digest="",
        init="upstream",
        init_digest="",
        seed=seed,
        train=train,
    )


def accuracy(plan: TrainPlan, tensors: dict[str, torch.Tensor], examples: Examples, test: Examples) -> float:
    torch.set_num_threads(1)
    model = fit(plan, examples, tensors)
    with torch.inference_mode():
        logits = model(normalize(torch.from_numpy(np.stack(test.images)), torch.device("cpu")))
    return float((logits.argmax(1).numpy() == test.labels).mean())


def step_of(plan: TrainPlan, tensors: dict[str, torch.Tensor]) -> TrainStep:
    model = build_model(plan, tensors)
    to_channels_last(model)
    return TrainStep(model, build_optimizer(model, plan), plan)


def memory(step: TrainStep, batch: tuple[torch.Tensor, torch.Tensor]) -> int:
    """Bytes of gradients and momentum, and of what the forward pass keeps for the backward pass."""
    weights = {p.untyped_storage().data_ptr() for p in step.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in weights:
            kept[place] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step(0, [batch], 1)
    return sum(kept.values()) + 2 * sum(p.numel() * p.element_size() for p in step.parameters)


def main(config: Config) -> None:
    torch.set_num_threads(1)
    started = time.perf_counter()
    tensors = pretrained(config, read(config.upstream, limit=20_000))
    digits, test = read("digits:train"), read("digits:test")
    jobs = []
    with ProcessPoolExecutor(num_local_cores(), mp_context=get_context("spawn")) as pool:
        for train in config.train:
            for lr in config.lrs:
                for seed in range(config.num_subsets):
                    drawn = digits.subset(few_shot_subset(digits.labels, config.shots, seed))
                    plan = plan_of(config, train, lr, len(drawn.ids), seed)
                    jobs.append((train, lr, pool.submit(accuracy, plan, tensors, drawn, test)))
        scores: dict[tuple[str, float], list[float]] = {}
        for train, lr, job in jobs:
            scores.setdefault((train, lr), []).append(job.result())

    images = torch.randint(256, (config.batch_size, SIZE, SIZE, 3), dtype=torch.uint8)
    batch = images, torch.randint(10, (config.batch_size,))
    steps = {train: step_of(plan_of(config, train, 0.01, 100, 0), tensors) for train in config.train}
    sizes = {train: memory(step, batch) for train, step in steps.items()}
    taken: dict[str, list[float]] = {train: [] for train in config.train}
    for number in range(config.rounds):  # in turns, so that a drift of the machine's speed meets all
        for train, step in steps.items():
            before = time.perf_counter()
            step(number % config.num_steps, [batch], 1)
            step.check()
            taken[train].append(time.perf_counter() - before)

    median = {key: statistics.median(values) for key, values in scores.items()}
    header = (
        "train",
        "parameters",
        "share",
        "MB to train",
        "ms/step",
        "vs. all",
        f"top-1 at lr {config.lrs[0]:g}",
        "range",
        "best",
        "at lr",
    )
    print(f"| {' | '.join(header)} |\n| --- |{' ---: |' * (len(header) - 1)}")
    first = statistics.median(taken[config.train[0]])
    for train in config.train:
        trained, total = count_parameters(config.model, 10, train)
        seconds, values = statistics.median(taken[train]), scores[train, config.lrs[0]]
        best = max(config.lrs, key=lambda lr, train=train: median[train, lr])
        cells = (
            f"`{train}`",
            f"{trained:,}",
            f"{trained / total:.1%}",
            f"{sizes[train] / 1e6:.1f}",
            f"{1000 * seconds:.1f}",
            f"{seconds / first:.2f}",
            f"{median[train, config.lrs[0]]:.1%}",
            f"{min(values):.1%} to {max(values):.1%}",
            f"{median[train, best]:.1%}",
            f"{best:g}",
        )
        print(f"| {' | '.join(cells)} |")
    print(f"\n{config}; {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Config))
