"""The few-shot protocol of the paper (§3.5): k examples per class, several seeded draws, the full test set, the median.

The study can also train the same network from scratch on the same subsets with the same budget. Its learning rate is
the best of several on training images outside the draw: the test set is not used to choose anything.
"""

import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from bit_ray import store
from bit_ray.claim import claimed_run
from bit_ray.config import digest, to_dict
from bit_ray.data.shards.manifest import Manifest, check_same_classes, read_manifest
from bit_ray.errors import ConfigError
from bit_ray.evaluation.subsets import draw_subsets, summarize
from bit_ray.inference.features import check_single_label
from bit_ray.plots.comparison import ComparisonRow, few_shot_figure
from bit_ray.recipes.hyperrule import hyperrule
from bit_ray.run_folder import RunFolder
from bit_ray.studies.config import FewShotConfig
from bit_ray.studies.engine import Bar, Study
from bit_ray.studies.transfer import Score, train_and_test
from bit_ray.studies.tuner import Trial
from bit_ray.tracking.address import tracking_uri
from bit_ray.tracking.runs import TrackedRun
from bit_ray.training.initial_weights import InitialWeights, read_init
from bit_ray.training.plan import transfer_plan

PRE_TRAINED, FROM_SCRATCH = "pre-trained", "from scratch"
_MOST_VALIDATION_IMAGES = 500


@dataclass(frozen=True)
class FewShotReport:
    """Accuracies of every method, number of shots and draw."""

    rows: tuple[ComparisonRow, ...]
    scratch_lr: dict[int, float]
    """The learning rate from scratch that came out best, per number of shots."""

    def median(self, series: str, k: int) -> float:
        """Median accuracy, a fraction of 1."""
        return summarize(next(r.values for r in self.rows if (r.series, r.k) == (series, k))).median


def fewshot_suite(config: FewShotConfig) -> FewShotReport:
    """Run the protocol, one Ray task per training, as many in parallel as the cluster has GPUs or cores.

    Scores are kept in ``STORAGE/NAME/scores``, so that a study of the same name continues.

    Raises:
        BitRayError: Anything the user can fix.
    """
    manifest, test_manifest = read_manifest(config.shards), read_manifest(config.test_shards)
    check_single_label(manifest, config.shards)
    check_same_classes(manifest, test_manifest, config.test_shards)
    init = read_init(config.init, tracking_uri(config.tracking.uri, config.storage))
    with claimed_run(config.storage, config.name):
        return _study(config, manifest, test_manifest, init)


def _study(config: FewShotConfig, manifest: Manifest, test_manifest: Manifest, init: InitialWeights) -> FewShotReport:
    folder = RunFolder.of(config.storage, config.name)
    trials = _trials(config, manifest, test_manifest, init, folder)
    study = Study(folder, trials, partial(_load, test_digest=test_manifest.digest))
    with TrackedRun.open(
        config.tracking,
        run_name=config.name,
        storage=config.storage,
        params=to_dict(config),
        tags={"bit_ray.manifest_digest": manifest.digest, "bit_ray.weights_sha256": init.digest},
        kind="fewshot",
    ) as run:
        # Always one thread each: a score must not depend on which of the others are done already.
        study.run(train_and_test, dict(init.tensors), run, Bar("few-shot", "trainings"), num_threads=1)
        report = _summarize(config, study)
        for row in report.rows:
            series = row.series.replace(" ", "_").replace("-", "_")
            summary = summarize(row.values)
            run.log_metrics({f"few_shot/{series}": summary.median, f"few_shot/{series}_std": summary.std}, step=row.k)
        run.log_text(json.dumps([asdict(row) for row in report.rows], indent=1), "few_shot.json")
        run.log_figure(few_shot_figure({"": report.rows}, test_manifest.name, config.init), "few_shot.png")
    return report


def _trials(
    config: FewShotConfig, manifest: Manifest, test_manifest: Manifest, init: InitialWeights, folder: RunFolder
) -> list[Trial]:
    """All trainings of the study, whose subsets are drawn and saved here.

    Raises:
        BitRayError: A subset or a plan is not possible.
    """
    draws = draw_subsets(
        config.shards, manifest, config.shots, config.num_subsets, saved=folder.subsets, given=config.subsets
    )
    shards, test_shards = store.absolute(config.shards), store.absolute(config.test_shards)
    trials: list[Trial] = []
    for (k, seed), chosen in draws.items():
        validation = _validation(config, manifest, chosen) if len(config.scratch_lrs) > 1 else None
        for lr in (None, *config.scratch_lrs):
            rule = hyperrule(
                len(chosen),
                manifest.median_image_size,
                config.profile,
                init.model,
                random_crop=config.random_crop,
                random_flip=config.random_flip,
                overrides=config.rule if lr is None else replace(config.rule, base_lr=lr),
            )
            plan = transfer_plan(
                rule,
                model=init.model,
                num_classes=manifest.num_classes,
                manifest_digest=manifest.digest,
                init=config.init if lr is None else "",
                init_digest=init.digest if lr is None else "",
                seed=seed,
                train=config.train if lr is None else "all",
            )
            series = PRE_TRAINED if lr is None else FROM_SCRATCH
            identity: dict[str, Any] = {"plan": plan.digest, "chosen": chosen.tolist()}
            looked_at = None if lr is None else validation
            if looked_at is not None:
                identity["validation"] = looked_at.tolist()
            trials.append(
                Trial(
                    key=f"{series.replace(' ', '-')}-{k}-per-class-seed-{seed}-lr-{rule.base_lr:g}",
                    identity=digest(identity),
                    params={"series": series, "k": k, "seed": seed, "lr": rule.base_lr},
                    arguments=(digest(identity), plan, shards, chosen, looked_at, test_shards, test_manifest.digest),
                    size=k,
                )
            )
    return trials


def _validation(config: FewShotConfig, manifest: Manifest, chosen: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the indices of the images that a learning rate is chosen by: spread over the examples outside the draw.

    Raises:
        ConfigError: Nothing is left after the draw.
    """
    left = np.setdiff1d(np.arange(manifest.num_examples), chosen)
    if not len(left):
        raise ConfigError.of(
            "scratch_lrs",
            f"{len(config.scratch_lrs)} rates, but {len(chosen)} examples are all of {config.shards}, and none are "
            "left to choose one by",
            "fewer shots, or one rate",
        )
    return left[:: -(-len(left) // _MOST_VALIDATION_IMAGES)]


def _load(uri: str, identity: str, test_digest: str) -> Score | None:
    if not store.exists(uri):
        return None
    score = store.read_record(Score, uri, "delete it to run the training again")
    return score if (score.identity, score.test_digest) == (identity, test_digest) else None


def _summarize(config: FewShotConfig, study: Study[Score]) -> FewShotReport:
    rows: list[ComparisonRow] = []
    best: dict[int, float] = {}
    for k in config.shots:
        for series in (PRE_TRAINED, FROM_SCRATCH):
            tried: dict[float, list[Score]] = {}
            for trial in study.trials.values():
                if (trial.params["k"], trial.params["series"]) == (k, series):
                    tried.setdefault(trial.params["lr"], []).append(study.scores[trial.key])
            if tried:
                lr = max(tried, key=lambda lr: _validated(tried[lr]))
                rows.append(ComparisonRow(series=series, k=k, values=tuple(score.top_1 for score in tried[lr])))
                if series == FROM_SCRATCH:
                    best[k] = lr
    return FewShotReport(tuple(rows), best)


def _validated(scores: list[Score]) -> tuple[float, float]:
    """Return the key to compare rates by: median and, if two have the same, mean over the draws."""
    values = [score.validation_top_1 or 0.0 for score in scores]
    return summarize(values).median, float(np.mean(values))
