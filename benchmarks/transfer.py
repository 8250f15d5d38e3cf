"""What transfer is worth on the embedded data: more upstream images, a wider network, few examples per class.

    python benchmarks/transfer.py

Networks are pre-trained on rendered characters of 50, 500 and 2,993 classes with the same number of steps, and brought
to 1, 5, 10 and 50 handwritten digits per class in three ways: fine-tuned by BiT-HyperRule (at a laptop's size), the
same network trained from scratch with the same budget and the best of several learning rates, which needs no upstream
and is run once per network, and ridge regression on frozen features. Medians of five draws, the same for all, on all
800 test digits. Prints a Markdown table and writes the plot. Stopped and started again, it continues.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from bit_ray import store
from bit_ray.cluster.session import cluster
from bit_ray.data.shards.manifest import MANIFEST, read_manifest
from bit_ray.data.shards.write import write_shards
from bit_ray.evaluation.config import ProbeConfig
from bit_ray.evaluation.probe import probe, probe_task
from bit_ray.evaluation.subsets import summarize
from bit_ray.inference.classifier import load_model
from bit_ray.plots.comparison import ComparisonRow, few_shot_figure
from bit_ray.plots.style import save_figure
from bit_ray.recipes.hyperrule import RuleOverrides
from bit_ray.recipes.upstream import UpstreamRecipe
from bit_ray.studies.config import FewShotConfig
from bit_ray.studies.few_shot import FROM_SCRATCH, PRE_TRAINED, fewshot_suite
from bit_ray.training.config import PretrainConfig
from bit_ray.training.pretrain import pretrain

BATCH = 128
SCRATCH, RULE, PROBE = "from scratch", "HyperRule", "linear probe"


@dataclass(frozen=True, kw_only=True)
class Config:
    """How large the table is."""

    upstreams: tuple[str, ...] = ("s", "m", "l")
    """Sizes of the upstream data."""
    models: tuple[str, ...] = ("R1-1-1-1x0.5", "R1-1-1-1x1")
    """Networks, the small one first."""
    shots: tuple[int, ...] = (1, 5, 10, 50)
    """Digits per class."""
    num_subsets: int = 5
    """Draws."""
    upstream_steps: int = 600
    """Steps of 128 images, for every upstream alike: 26, 2.6 and 0.43 epochs."""
    num_steps: int = 30
    """Steps of 64 images of a transfer."""
    lr: float = 0.01
    """Learning rate of a transfer."""
    scratch_lrs: tuple[float, ...] = (0.03, 0.1)
    """Learning rates from scratch; the best counts."""
    storage: str = "bit_ray_runs/transfer"
    """Folder of everything."""
    plot: str = "docs/transfer_table.png"
    """Where the plot goes."""


def upstream_recipe(num_steps: int, num_examples: int) -> UpstreamRecipe:
    """BiT's recipe for so many steps: warm-up, and two drops at 62.5 and 87.5 %, as in the main job."""
    epochs = num_steps * BATCH / num_examples
    return UpstreamRecipe(
        name="glyphs",
        epochs=epochs,
        decay_epochs=(0.625 * epochs, 0.875 * epochs),
        global_batch_size=BATCH,
        base_lr_per_256=0.12,
        warmup_steps=min(75, num_steps // 4),
        crop_size=32,
        area_range=(0.4, 1.0),
        random_flip=False,
    )


def shards(name: str, storage: str) -> str:
    """Write an embedded data set, unless it is there."""
    place = store.join(storage, "shards", name.replace(":", "-"))
    if not store.exists(store.join(place, MANIFEST)):
        write_shards(name, place, name=name, num_workers=2)
    return place


def pretrained(config: Config, model: str, size: str) -> str:
    """Pre-train on one size and return the place of the model."""
    place = shards(f"glyphs:{size}", config.storage)
    trained = pretrain(
        PretrainConfig(
            name=f"glyphs-{size}-{model}",
            shards=place,
            model=model,
            recipe=upstream_recipe(config.upstream_steps, read_manifest(place).num_examples),
            storage=config.storage,
        )
    )
    assert trained is not None
    return trained.result.package_uri


def compare(config: Config, model: str) -> dict[tuple[str, str], list[ComparisonRow]]:
    """(method, upstream) -> accuracies of every draw; from scratch belongs to no upstream."""
    train, test = (shards(f"digits:{split}", config.storage) for split in ("train", "test"))
    found: dict[tuple[str, str], list[ComparisonRow]] = {}
    for number, size in enumerate(config.upstreams):
        uri = pretrained(config, model, size)
        report = fewshot_suite(
            FewShotConfig(
                name=f"digits-from-{size}-{model}",
                init=uri,
                shards=train,
                test_shards=test,
                shots=config.shots,
                num_subsets=config.num_subsets,
                scratch_lrs=config.scratch_lrs if number == 0 else (),
                rule=RuleOverrides(resize=36, crop=32, num_steps=config.num_steps, batch_size=64, base_lr=config.lr),
                random_flip=False,
                storage=config.storage,
            )
        )
        found[RULE, size] = [row for row in report.rows if row.series == PRE_TRAINED]
        if number == 0:
            found[SCRATCH, ""] = [row for row in report.rows if row.series == FROM_SCRATCH]
        task = probe_task(
            ProbeConfig(shards=train, test_shards=test, shots=config.shots, num_subsets=config.num_subsets)
        )
        with cluster() as resources:
            scores = probe(load_model(uri), task, resources)
        found[PROBE, size] = [ComparisonRow(series=PROBE, k=score.k, values=score.ridge) for score in scores]
    return found


def main(config: Config) -> None:
    started = time.perf_counter()
    with cluster():
        tables = {model: compare(config, model) for model in config.models}
    print(f"| network | method | upstream | {' | '.join(f'{k} per class' for k in config.shots)} |")
    print(f"| --- | --- | --- |{' ---: |' * len(config.shots)}")
    panels = {}
    for model, table in tables.items():
        for (method, size), rows in sorted(table.items(), key=lambda item: (SCRATCH, RULE, PROBE).index(item[0][0])):
            medians = (summarize(row.values) for row in rows)
            cells = (f"{s.median:.1%} ({100 * s.lowest:.0f}-{100 * s.highest:.0f})" for s in medians)
            print(f"| {model} | {method} | {size.upper() or '-'} | {' | '.join(cells)} |")
        for method in (RULE, PROBE):
            panel = [
                (size.upper() or SCRATCH, row)
                for (m, size), rows in table.items()
                if m in (method, SCRATCH)
                for row in rows
            ]
            panels[f"{method}, {model}"] = [
                ComparisonRow(series=series if series == SCRATCH else f"upstream {series}", k=row.k, values=row.values)
                for series, row in panel
            ]
    seconds = time.perf_counter() - started
    print(f"\n{config}; {seconds:.0f} s")
    place = Path(config.storage, "transfer.json")
    written = {name: [asdict(row) for row in rows] for name, rows in panels.items()}
    place.write_text(json.dumps({"config": asdict(config), "seconds": seconds, "panels": written}, indent=1))
    Path(config.plot).parent.mkdir(parents=True, exist_ok=True)
    subtitle = (
        f"upstream: rendered characters, {config.upstream_steps} steps of {BATCH}; line: median, dots: every draw"
    )
    save_figure(few_shot_figure(panels, "Handwritten digits from a few examples per class", subtitle), config.plot)


if __name__ == "__main__":
    main(tyro.cli(Config))
