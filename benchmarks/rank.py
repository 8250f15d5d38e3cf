"""Does `bit-ray models rank` say beforehand which model fine-tunes best? Rank correlations on the embedded data.

    python benchmarks/rank.py

Pre-trains six small networks on rendered characters, with different data, budgets and widths, ranks them for three
tasks of handwritten digits by one pass of features each, then really fine-tunes all of them, medians of five draws of
ten digits per class on all test digits of the task. Prints Markdown tables; Spearman's and Kendall's coefficients by
scipy. Stopped and started again, it continues.
"""

import time
from dataclasses import dataclass

import numpy as np
import tyro
from scipy.stats import kendalltau, spearmanr
from transfer import shards, upstream_recipe

from bit_ray import store
from bit_ray.cluster.session import cluster
from bit_ray.data.shards.manifest import MANIFEST, read_manifest
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.base import Example
from bit_ray.data.sources.embedded.catalog import open_embedded
from bit_ray.evaluation.rank import rank_models
from bit_ray.recipes.hyperrule import RuleOverrides
from bit_ray.studies.config import FewShotConfig
from bit_ray.studies.few_shot import PRE_TRAINED, fewshot_suite
from bit_ray.training.config import PretrainConfig
from bit_ray.training.pretrain import pretrain

# Upstream size, steps and network.
MODELS = (
    ("s", 40, "R1-1-1-1x0.5"),
    ("s", 300, "R1-1-1-1x0.5"),
    ("m", 40, "R1-1-1-1x0.5"),
    ("m", 300, "R1-1-1-1x0.5"),
    ("m", 900, "R1-1-1-1x0.5"),
    ("m", 150, "R1-1-1-1x1"),
)
TASKS = {"all digits": "0123456789", "0 to 4": "01234", "5 to 9": "56789"}
SCORES = ("ridge", "knn", "logme")


@dataclass(frozen=True, kw_only=True)
class Config:
    """How much of it to run."""

    scale: float = 1.0
    """Factor on all steps of pre-training and fine-tuning."""
    shots: int = 10
    """Digits per class of the fine-tuning."""
    num_subsets: int = 5
    """Draws."""
    num_steps: int = 30
    """Steps of 64 images of the fine-tuning."""
    storage: str = "bit_ray_runs/rank"
    """Folder of everything."""


def digits(split: str, classes: str, storage: str) -> str:
    """Write the digits of some classes, unless they are there."""
    place = store.join(storage, "shards", f"digits-{split}-{classes}")
    if not store.exists(store.join(place, MANIFEST)):
        source = open_embedded(f"digits:{split}")
        found = [e for e in source.part(np.arange(len(source), dtype=np.int64)) if isinstance(e, Example)]
        examples = [
            Example(e.id, e.image, (classes.index(source.class_names[e.labels[0]]),))
            for e in found
            if source.class_names[e.labels[0]] in classes
        ]
        write_shards(iter(examples), place, name=f"digits {classes}", class_names=list(classes))
    return place


def main(config: Config) -> None:
    started = time.perf_counter()
    with cluster() as resources:
        uris = {}
        for size, steps, model in MODELS:
            place = shards(f"glyphs:{size}", config.storage)
            steps = max(4, round(config.scale * steps))
            trained = pretrain(
                PretrainConfig(
                    name=f"{size}-{steps}-{model}",
                    shards=place,
                    model=model,
                    recipe=upstream_recipe(steps, read_manifest(place).num_examples),
                    storage=config.storage,
                )
            )
            assert trained is not None
            uris[f"{model}, {size.upper()}, {steps} steps"] = trained.result.package_uri
        correlations = {}
        for task, classes in TASKS.items():
            train, test = (digits(split, classes, config.storage) for split in ("train", "test"))
            ranked, broken = rank_models(list(uris.values()), train, read_manifest(train), resources)
            assert not broken, broken
            scores = {row.uri: row for row in ranked}
            tuned = {}
            for name, uri in uris.items():
                report = fewshot_suite(
                    FewShotConfig(
                        name=f"{task} {name}".replace(",", ""),
                        init=uri,
                        shards=train,
                        test_shards=test,
                        shots=(config.shots,),
                        num_subsets=config.num_subsets,
                        rule=RuleOverrides(
                            resize=36,
                            crop=32,
                            num_steps=max(2, round(config.scale * config.num_steps)),
                            batch_size=64,
                            base_lr=0.01,
                        ),
                        random_flip=False,
                        storage=config.storage,
                    )
                )
                tuned[uri] = report.median(PRE_TRAINED, config.shots)
            print(f"\n| {task} | ridge | nearest neighbours | LogME | seconds | fine-tuned |")
            print("| --- | ---: | ---: | ---: | ---: | ---: |")
            for name, uri in sorted(uris.items(), key=lambda item: -tuned[item[1]]):
                row = scores[uri]
                cells = f"{row.ridge:.1%} | {row.knn:.1%} | {row.logme:.4f} | {row.seconds:.1f}"
                print(f"| {name} | {cells} | {tuned[uri]:.1%} |")
            truth = [tuned[uri] for uri in uris.values()]
            for score in SCORES:
                values = [getattr(scores[uri], score) for uri in uris.values()]
                correlations[task, score] = (spearmanr(values, truth).statistic, kendalltau(values, truth).statistic)
    print("\n| rank correlation with fine-tuning, Spearman / Kendall | ridge | nearest neighbours | LogME |")
    print("| --- | ---: | ---: | ---: |")
    for task in TASKS:
        cells = (f"{r:.2f} / {tau:.2f}" for r, tau in (correlations[task, score] for score in SCORES))
        print(f"| {task} | {' | '.join(cells)} |")
    means = (np.mean([correlations[task, score] for task in TASKS], axis=0) for score in SCORES)
    print(f"| mean | {' | '.join(f'{r:.2f} / {tau:.2f}' for r, tau in means)} |")
    print(f"\n{config}; {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Config))
