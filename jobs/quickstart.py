"""The main job, end to end, on data that needs no download: rendered characters first, then handwritten digits.

    python jobs/quickstart.py

It writes the shards, pre-trains a small BiT, transfers it to a few digits per class by BiT-HyperRule, next to the
same network trained from scratch, fine-tunes on all training digits, evaluates, registers, loads the model back from
the registry and predicts on image files. Everything lands in ``bit_ray_runs``.
"""

import shlex
import shutil
import sys
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

import bit_ray
from bit_ray import store
from bit_ray.cli.main import run_job
from bit_ray.cluster.session import cluster
from bit_ray.config import DEFAULT_STORAGE
from bit_ray.data.images.decode import decode_image
from bit_ray.data.shards.manifest import MANIFEST
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.base import Example
from bit_ray.data.sources.embedded.catalog import open_embedded
from bit_ray.data.sources.embedded.digits import NUM_TEST
from bit_ray.plots.comparison import comparison_figure
from bit_ray.plots.predictions import prediction_figure
from bit_ray.plots.style import save_figure
from bit_ray.progress import console, print_table
from bit_ray.recipes.embedded import DIGITS, EMBEDDED_MODEL, GLYPHS
from bit_ray.recipes.hyperrule import RuleOverrides
from bit_ray.recipes.upstream import UpstreamRecipe
from bit_ray.studies.config import FewShotConfig
from bit_ray.studies.few_shot import FROM_SCRATCH, PRE_TRAINED, fewshot_suite
from bit_ray.tracking.address import tracking_uri
from bit_ray.training.config import FinetuneConfig, PretrainConfig
from bit_ray.training.finetune import finetune
from bit_ray.training.pretrain import pretrain
from bit_ray.uris import shown


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """Pre-train, transfer, register and predict on the embedded data."""

    storage: str = DEFAULT_STORAGE
    """Local folder for shards, runs, registry and pictures."""
    upstream: str = "glyphs:m"
    """Upstream data: glyphs:s, glyphs:m or glyphs:l."""
    model: str = EMBEDDED_MODEL
    """Network; the real class, shallow and narrow."""
    shots: tuple[int, ...] = (1, 5, 10)
    """Digits per class in the few-shot comparison."""
    scratch_lrs: tuple[float, ...] = (0.01, 0.03, 0.05, 0.1)
    """Learning rates from scratch; the best on validation images counts."""
    recipe: UpstreamRecipe = GLYPHS
    """Upstream recipe."""
    rule: RuleOverrides = DIGITS
    """Downstream settings on top of the HyperRule."""


def main(config: QuickstartConfig) -> None:
    """Run the whole path and print what came out."""
    marks = [("start", time.perf_counter())]

    def mark(stage: str) -> None:
        marks.append((stage, time.perf_counter()))

    console.print(
        "Shards, pre-training, few-shot transfer against training from scratch, transfer to all digits, predictions: "
        "about 8 minutes on two idle cores"
    )
    with cluster():
        shards = {name: _shards(name, config.storage) for name in (config.upstream, "digits:train", "digits:test")}
        mark("write shards")
        upstream_name = config.upstream.replace(":", "-")
        pretrained = pretrain(
            PretrainConfig(
                name=upstream_name,
                shards=shards[config.upstream],
                model=config.model,
                recipe=config.recipe,
                storage=config.storage,
            )
        )
        assert pretrained is not None
        mark("pre-train")
        upstream_uri = f"models:/{pretrained.version.name}@{pretrained.version.alias}"
        report = fewshot_suite(
            FewShotConfig(
                name="digits-few-shot",
                init=upstream_uri,
                shards=shards["digits:train"],
                test_shards=shards["digits:test"],
                shots=config.shots,
                scratch_lrs=config.scratch_lrs,
                rule=config.rule,
                random_flip=False,
                storage=config.storage,
            )
        )
        mark("few-shot comparison")
        finetuned = finetune(
            FinetuneConfig(
                name="digits",
                init=upstream_uri,
                shards=shards["digits:train"],
                test_shards=shards["digits:test"],
                rule=replace(config.rule, num_steps=200),
                random_flip=False,
                storage=config.storage,
            )
        )
        assert finetuned is not None
        mark("fine-tune, evaluate, register")
    digits_uri = f"models:/{finetuned.version.name}@{finetuned.version.alias}"
    predictions = _predict(digits_uri, config.storage)
    mark("load from registry, predict")
    save_figure(
        comparison_figure(
            report.rows, "Handwritten digits from a few examples per class", "upstream: rendered characters"
        ),
        Path(config.storage) / "few_shot.png",
    )
    rows = []
    for k in config.shots:
        medians = [report.median(series, k) for series in (PRE_TRAINED, FROM_SCRATCH)]
        rows.append(
            (
                str(k),
                *(f"{m:.1%}" for m in medians),
                f"{100 * (medians[0] - medians[1]):+.1f}",
                f"{report.scratch_lr[k]:g}",
            )
        )
    header = ("per class", PRE_TRAINED, FROM_SCRATCH, "difference", "best lr from scratch")
    print_table(f"Top-1 on {NUM_TEST} test digits, median of 5 draws", rows, header)
    print_table("Predictions from the registry", predictions, ("image", "predicted", "probability"))
    test = finetuned.result.metrics
    print_table(
        "Registered",
        [
            (f"models:/{pretrained.version.name}@{pretrained.version.alias}", str(pretrained.version.version), "-"),
            (digits_uri, str(finetuned.version.version), f"{test['test/top_1']:.1%}"),
        ],
        ("model", "version", "top-1 on test digits"),
    )
    times = [(stage, f"{t - before:.0f}") for (_, before), (stage, t) in pairwise(marks)]
    print_table("Time", [*times, ("in all", f"{marks[-1][1] - marks[0][1]:.0f}")], ("stage", "seconds"))
    storage = Path(config.storage).resolve()
    console.print(f"Pictures: {storage}/few_shot.png, {storage}/predictions.png")
    registry = shown(tracking_uri("", config.storage))
    # Plain prints: long lines must stay lines, to be copied into a shell.
    print("\nNext, for example:")
    if Path(shutil.which("bit-ray") or "").parent != Path(sys.executable).parent:
        print(f"  source {shlex.quote(str(Path(sys.executable).parent / 'activate'))}")
    print(f"  export MLFLOW_TRACKING_URI={shlex.quote(registry)}")
    print(f"  bit-ray predict {shlex.quote(str(storage / 'images'))}/*.png --model {digits_uri}")
    print("  bit-ray models list")
    print("  mlflow ui --backend-store-uri $MLFLOW_TRACKING_URI")
    print("Your own images: bit-ray train FOLDER; see README.md")


def _shards(name: str, storage: str) -> str:
    """Write an embedded data set, unless it is there already."""
    output = store.join(storage, "shards", name.replace(":", "-"))
    if not store.exists(store.join(output, MANIFEST)):
        report = write_shards(name, output, name=name)
        console.print(f"{name}: {report.num_examples:,} images in {report.num_shards} shards, {report.seconds:.1f} s")
    return output


def _predict(uri: str, storage: str) -> list[tuple[str, str, str]]:
    """Predict on test digits as a user would: from image files, with a model pulled from the registry."""
    folder = Path(storage, "images")
    folder.mkdir(parents=True, exist_ok=True)
    source = open_embedded("digits:test")
    examples = [e for e in source.part(np.arange(24, dtype=np.int64)) if isinstance(e, Example)]
    paths = [folder / f"{example.id.replace('/', '-')}.png" for example in examples]
    for path, example in zip(paths, examples, strict=True):
        path.write_bytes(example.image)
    model = bit_ray.load_model(uri, tracking_uri=tracking_uri("", storage))
    best = [prediction[0] for prediction in model.predict(paths)]
    truths = [source.class_names[example.labels[0]] for example in examples]
    images = [decode_image(example.image) for example in examples]
    save_figure(
        prediction_figure(images, truths, best, title="Test digits", columns=8), Path(storage, "predictions.png")
    )
    return [(path.name, name, f"{p:.1%}") for path, (name, p) in list(zip(paths, best, strict=True))[:4]]


if __name__ == "__main__":
    run_job(main, QuickstartConfig)
