"""The studies by name: each is data, at the size of a laptop; docs/studies.md has the commands at full size."""

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from bit_ray.errors import ConfigError
from bit_ray.recipes.embedded import DIGITS, EMBEDDED_INIT, EMBEDDED_MODEL
from bit_ray.recipes.upstream import UpstreamRecipe
from bit_ray.studies.study_config import changed
from bit_ray.training.config import FinetuneConfig, PretrainConfig

if TYPE_CHECKING:  # a list of the studies needs no PyTorch
    from bit_ray.studies.grid import Grid
    from bit_ray.studies.inputs import Inputs

Sentences = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class GridStudy:
    """A study: its grid, what is measured, and what may be said of it."""

    title: str
    """What it asks."""
    base: PretrainConfig | FinetuneConfig
    """Settings of all trainings at the size of a laptop; ``shards`` may name embedded data."""
    axes: Mapping[str, tuple[Any, ...]]
    """Dotted name of a setting, or a name of the study's own, -> values; the others are compared with the first."""
    val: str
    """Shard set, or embedded data, to measure on; SHARDS in it is the training set."""
    settings: Callable[[Mapping[str, Any], Any, "Inputs"], dict[str, Any]] | None = None
    """Settings of a point, from the study's own axes, the base and the sets; None: they are settings themselves."""
    seeds: int = 3
    """Trainings of each point."""
    at: tuple[float, ...] = (0.05, 0.1, 0.2, 0.35, 0.5, 0.6, 0.7, 0.85)
    """Shares of a training after which it is measured; it always is at the end."""
    measure: str = "val/top_1"
    """The value that is compared."""
    better: Literal["higher", "lower"] = "higher"
    """Which values of it are better."""
    probe: tuple[str, str, int] | None = None
    """Few-shot accuracy of the features: training set, test set, examples per class."""
    norms: bool = False
    """Whether norms and turns of the kernels are measured."""
    paper: Sentences = ()
    """What the paper found, and what is different here."""
    findings: Callable[["Grid"], Sentences] | None = None
    """Sentences beyond the comparison along each axis."""


_RECIPE = UpstreamRecipe(
    name="small",
    epochs=14,
    decay_epochs=(8.75, 12.25),
    global_batch_size=32,
    base_lr_per_256=0.16,
    warmup_steps=50,
    weight_decay=1e-4,
    crop_size=32,
    area_range=(0.4, 1.0),
    random_flip=False,
)
_UPSTREAM = PretrainConfig(name="cell", shards="glyphs:s", model=EMBEDDED_MODEL, recipe=_RECIPE)
_DOWNSTREAM = FinetuneConfig(
    name="cell",
    shards="digits:train",
    init=EMBEDDED_INIT,
    random_flip=False,
    rule=replace(DIGITS, num_steps=100),
)
_DIGITS_PROBE = ("digits:train", "digits:test", 10)


def _decay(grid: "Grid") -> Sentences:
    """Compare the extreme decays, the other axes being equal: which leads early, and which ends better."""
    from bit_ray.studies.findings import crossing

    low, high = min(grid.levels(0)), max(grid.levels(0))
    said = [
        crossing(grid, point, (high, *point[1:]), "train/loss")
        for point in grid.points
        if point[0] == low and (high, *point[1:]) in grid.points and low != high
    ]
    largest = max(score.decay_exposure for scores in grid.scores.values() for score in scores)
    said.append(
        f"The largest sum of learning rate x weight decay / (1 - momentum) over the steps is {largest:.2g} here; in "
        "the paper it is about 48 for 1e-4 and 4.8 for 1e-5. What needs the larger one cannot show here."
    )
    return tuple(said)


def _schedule(point: Mapping[str, Any], base: PretrainConfig, inputs: "Inputs") -> dict[str, Any]:
    """Return a run of so many times the images of the base on its own set; early decays come at 30 and 50 %."""
    length, decays = point["length"], point["decays"]
    if not isinstance(length, (int, float)) or length <= 0:
        raise ConfigError.of("axes", f"length {length!r}", "times the images of the base, above 0")
    if decays not in ("usual", "early"):
        raise ConfigError.of("axes", f"decays {decays!r}", "usual or early", "choose one")
    shards = changed(base, {"shards": point["shards"]}, "axes").shards
    images = length * base.recipe.epochs * inputs.num_examples(base.shards)
    epochs = images / inputs.num_examples(shards)
    usual = tuple(epoch / base.recipe.epochs for epoch in base.recipe.decay_epochs)
    shares = usual if decays == "usual" else (0.3, 0.5)
    return {
        "shards": shards,
        "recipe.epochs": epochs,
        "recipe.decay_epochs": tuple(share * epochs for share in shares),
    }


def _normaliser(point: Mapping[str, Any], base: PretrainConfig, inputs: "Inputs") -> dict[str, Any]:
    """Return the network of the base with GroupNorm, or with BatchNorm over so many images."""
    found = re.fullmatch(r"(?:gn|(bn))(-nows)?(?(1)-(\d+))", str(point["normaliser"]))
    if found is None:
        given = f"normaliser {point['normaliser']!r}"
        raise ConfigError.of("axes", given, "gn, gn-nows, bn-IMAGES or bn-nows-IMAGES")
    model = f"{base.model}{'-bn' if found[1] else ''}{found[2] or ''}"
    return {"model": model, "norm_batch": int(found[3] or 0)}


STUDIES: dict[str, GridStudy] = {
    "weight-decay": GridStudy(
        title="Does a smaller weight decay only look better early?",
        base=_UPSTREAM,
        axes={"recipe.weight_decay": (0.0, 1e-4, 2e-3, 1e-2), "recipe.base_lr_per_256": (0.16, 0.04)},
        val="SHARDS:val",
        measure="val/loss",
        better="lower",
        probe=_DIGITS_PROBE,
        norms=True,
        findings=_decay,
        paper=(
            "The paper (section 4.2, figure 7 right) trains on JFT with 1e-4 and 1e-5 for 100,000 steps: 1e-5 leads "
            "early and loses at the end, as the norms of the weights grow and the effective learning rate falls.",
            "At a laptop's number of steps, 1e-4 is the same experiment as 0: compare them as a check. A smaller "
            "network and a million times fewer images: this study shows the mechanism, not the paper's figure.",
        ),
    ),
    "schedule": GridStudy(
        title="How long must the schedule be, and what does an early decay of the rate cost?",
        base=replace(_UPSTREAM, recipe=replace(_RECIPE, epochs=1.28, decay_epochs=(0.8, 1.12), warmup_steps=20)),
        axes={"length": (1, 3, 10), "shards": ("glyphs:s", "glyphs:m"), "decays": ("usual", "early")},
        settings=_schedule,
        val="SHARDS:val",
        measure="probe/top_1",
        probe=_DIGITS_PROBE,
        paper=(
            "The paper (section 4.2, figure 7 left and middle): with the budget of ILSVRC-2012 (90 epochs), "
            "ImageNet-21k is worse after transfer; with 3 and 10 times as many steps it is better. Decaying the rate "
            "too early ends much lower.",
        ),
    ),
    "normalisers": GridStudy(
        title="BatchNorm or GroupNorm, with and without Weight Standardization, by images per device",
        base=replace(_UPSTREAM, recipe=replace(_RECIPE, epochs=6, decay_epochs=(4.0, 5.25))),
        axes={"normaliser": ("gn", "gn-nows", "bn-32", "bn-nows-32", "bn-8", "bn-nows-8")},
        settings=_normaliser,
        val="SHARDS:val",
        probe=_DIGITS_PROBE,
        paper=(
            "The paper (table 4, R50x1 from scratch on ILSVRC, batch 4096, 32 images per chip): BN 75.6, BN + WS 75.8, "
            "GN 70.2, GN + WS 76.0 %; after transfer to VTAB-1k (table 5) 67.72, 66.78, 68.77 and 70.39 %.",
            "bn-8 is BatchNorm with statistics over 8 images, as if a device held so many, whatever the number of real "
            "devices; bn-32 is over the whole batch here, as SyncBN is at any number of devices. nows is without "
            "Weight Standardization. GroupNorm (gn) does not depend on the other images.",
        ),
    ),
    "size-data": GridStudy(
        title="Do a larger network and more data help each other?",
        base=replace(
            _UPSTREAM,
            recipe=replace(_RECIPE, epochs=1.6, decay_epochs=(1.0, 1.4), global_batch_size=64, warmup_steps=20),
        ),
        axes={"shards": ("glyphs:s", "glyphs:m"), "model": (EMBEDDED_MODEL, "R1-1-1-1x1")},
        val="SHARDS:val",
        measure="probe/top_1",
        probe=_DIGITS_PROBE,
        paper=("The paper (section 4.1, figure 5): size of network and data must grow in tandem.",),
    ),
    "recipe": GridStudy(
        title="Which parts of the transfer recipe matter: MixUp, dropout, weight decay, by data size",
        base=_DOWNSTREAM,
        axes={
            "rule.mixup_alpha": (0.0, 0.1),
            "rule.dropout": (0.0, 0.5),
            "rule.weight_decay": (0.0, 1e-3),
            "shots": (5, 50),
        },
        val="digits:test",
        seeds=5,
        at=(),
        paper=(
            "The paper (section 3.3): no MixUp below 20,000 examples, alpha 0.1 above; neither weight decay nor "
            "dropout in fine-tuning.",
        ),
    ),
}


def find_study(name: str) -> GridStudy:
    """Return a study by its name.

    Raises:
        ConfigError: there is none.
    """
    if name not in STUDIES:
        near = difflib.get_close_matches(name, STUDIES, n=1)
        hint = f"did you mean {near[0]}?" if near else "choose one"
        raise ConfigError.of("study", name, ", ".join(STUDIES), hint)
    return STUDIES[name]
