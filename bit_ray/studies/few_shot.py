"""The few-shot protocol of the paper (§3.5): k examples per class, several seeded draws, the full test set, the median.

Beside the transferred network the suite can train the same network from scratch on the same subsets with the same
budget; its learning rate is the best of several, judged on the test set, which favours the baseline.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch

from bit_ray.cluster import Resources, cluster
from bit_ray.config import to_dict
from bit_ray.data import store
from bit_ray.data.augment import eval_view
from bit_ray.data.decode import decode_image
from bit_ray.data.manifest import Manifest, read_manifest
from bit_ray.data.shards import read_tables
from bit_ray.errors import ConfigError, root_cause
from bit_ray.evaluation.fewshot import Subset, few_shot_subset, save_subset, summarize
from bit_ray.evaluation.metrics import ClassificationMetrics
from bit_ray.evaluation.plots import ComparisonRow, comparison_figure
from bit_ray.progress import track
from bit_ray.recipes.hyperrule import hyperrule
from bit_ray.studies.config import FewShotConfig
from bit_ray.tracking.runs import TrackedRun
from bit_ray.tracking.server import tracking_uri
from bit_ray.training.finetune import given, read_init
from bit_ray.training.fit import Examples, fit
from bit_ray.training.loop import build_model
from bit_ray.training.plan import TrainPlan, transfer_plan
from bit_ray.training.step import normalize

PRE_TRAINED, FROM_SCRATCH = "pre-trained", "from scratch"


@dataclass(frozen=True)
class FewShotReport:
    """Accuracies of every method, number of shots and draw."""

    rows: tuple[ComparisonRow, ...]
    scratch_lr: dict[int, float]
    """The learning rate from scratch that came out best, per number of shots."""

    def median(self, series: str, k: int) -> float:
        """Median accuracy, a fraction of 1."""
        return summarize(next(r.values for r in self.rows if (r.series, r.k) == (series, k))).median


@dataclass(frozen=True)
class _Trial:
    series: str
    k: int
    seed: int
    lr: float
    plan: TrainPlan


def fewshot_suite(config: FewShotConfig) -> FewShotReport:
    """Run the protocol, one Ray task per training, as many side by side as the cluster has places.

    Raises:
        BitRayError: Anything the user can put right.
    """
    manifest, test_manifest = read_manifest(config.shards), read_manifest(config.test_shards)
    if manifest.class_names != test_manifest.class_names:
        raise ConfigError("test_shards: other classes than the training shards; write both with the same class list")
    if manifest.multi_label:
        raise ConfigError("shards: few-shot subsets need one label per image; use a single-label set")
    init = read_init(config.init, tracking_uri(config.tracking.uri, config.storage))
    train, test = read_examples(config.shards, manifest), read_examples(config.test_shards, test_manifest)
    place = store.join(config.storage, config.name)
    subsets: dict[tuple[int, int], npt.NDArray[np.int64]] = {}
    trials: list[_Trial] = []
    for k in config.shots:
        for seed in range(config.num_subsets):
            chosen = few_shot_subset(train.labels, k, seed, class_names=manifest.class_names)
            subsets[k, seed] = chosen
            index = Subset(manifest_digest=manifest.digest, k=k, seed=seed, ids=tuple(train.ids[i] for i in chosen))
            save_subset(index, store.join(place, "subsets", f"{k}-per-class-seed-{seed}.json"))
            overrides = given(config.rule)
            for lr in (None, *config.scratch_lrs):
                rule = hyperrule(
                    len(chosen),
                    manifest.median_image_size,
                    config.profile,
                    init.model,
                    random_crop=config.random_crop,
                    random_flip=config.random_flip,
                    **(overrides if lr is None else {**overrides, "base_lr": lr}),
                )
                plan = transfer_plan(
                    rule,
                    model=init.model,
                    num_classes=manifest.num_classes,
                    manifest_digest=manifest.digest,
                    init=config.init if lr is None else "",
                    init_digest=init.digest if lr is None else "",
                    seed=seed,
                )
                trials.append(_Trial(PRE_TRAINED if lr is None else FROM_SCRATCH, k, seed, rule.base_lr, plan))
    run = TrackedRun.open(
        config.tracking,
        run_name=config.name,
        storage=config.storage,
        params=to_dict(config),
        tags={"bit_ray.manifest_digest": manifest.digest, "bit_ray.weights_sha256": init.digest},
        kind="evaluate",
    )
    try:
        with cluster() as resources:
            scores = _run(trials, subsets, init.tensors, train, test, resources)
        report = _summarize(config, trials, scores)
        for row in report.rows:
            series = row.series.replace(" ", "_").replace("-", "_")
            run.log_metrics({f"few_shot/{series}": summarize(row.values).median}, step=row.k)
        run.log_figure(comparison_figure(report.rows), "few_shot.png")
    except BaseException:
        run.close("FAILED")
        raise
    run.close()
    return report


def _run(
    trials: list[_Trial],
    subsets: Mapping[tuple[int, int], npt.NDArray[np.int64]],
    tensors: Mapping[str, torch.Tensor],
    train: Examples,
    test: Examples,
    resources: Resources,
) -> list[float]:
    task = ray.remote(
        num_cpus=resources.num_cpus // resources.num_places, num_gpus=1 if resources.num_gpus else 0, max_retries=3
    )(_train_and_test)
    weights, train_ref, test_ref = ray.put(dict(tensors)), ray.put(train), ray.put(test)
    # Longest first, so that no core idles at the end.
    todo = sorted(range(len(trials)), key=lambda i: -trials[i].k)
    refs = {
        task.remote(
            weights if trials[i].series == PRE_TRAINED else None,
            train_ref,
            subsets[trials[i].k, trials[i].seed],
            test_ref,
            trials[i].plan,
        ): i
        for i in todo
    }
    scores = [0.0] * len(trials)
    pending = list(refs)
    try:
        with track("few-shot", len(trials), "trainings") as advance:
            while pending:
                done, pending = ray.wait(pending)
                scores[refs[done[0]]] = ray.get(done[0])
                advance(1)
    except ray.exceptions.RayError as error:
        raise root_cause(error) or error from None
    return scores


def _train_and_test(
    tensors: dict[str, torch.Tensor] | None,
    train: Examples,
    chosen: npt.NDArray[np.int64],
    test: Examples,
    plan: TrainPlan,
) -> float:
    """Top-1 on the test set after one training; runs in a Ray task and may run again."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)  # one place is one core: several trainings side by side
    model = build_model(plan, tensors).to(device)
    fit(model, train.subset(chosen), plan)
    metrics = ClassificationMetrics(plan.num_classes)
    size = plan.view.crop_size
    with torch.inference_mode():
        for start in range(0, len(test.ids), 128):
            views = [
                eval_view(image, resize_mode=plan.resize_mode, resize_size=plan.resize_size, crop_size=size)
                for image in test.images[start : start + 128]
            ]
            x = normalize(torch.from_numpy(np.stack(views)), torch.device(device))
            metrics.update(model(x), torch.from_numpy(test.labels[start : start + 128]))
    return metrics.result()["top_1"]


def _summarize(config: FewShotConfig, trials: list[_Trial], scores: list[float]) -> FewShotReport:
    rows: list[ComparisonRow] = []
    best: dict[int, float] = {}
    for k in config.shots:
        values: dict[tuple[str, float], list[float]] = {}
        for trial, score in zip(trials, scores, strict=True):
            if trial.k == k:
                values.setdefault((trial.series, trial.lr), []).append(score)
        for series in (PRE_TRAINED, FROM_SCRATCH):
            tried = {lr: v for (name, lr), v in values.items() if name == series}
            if tried:
                lr = max(tried, key=lambda lr: (summarize(tried[lr]).median, float(np.mean(tried[lr]))))
                rows.append(ComparisonRow(series=series, k=k, values=tuple(tried[lr])))
                if series == FROM_SCRATCH:
                    best[k] = lr
    return FewShotReport(tuple(rows), best)


def read_examples(shards: str, manifest: Manifest) -> Examples:
    """A whole single-label set, decoded, in memory.

    Raises:
        DataError: A shard is missing or damaged, or an image cannot be decoded.
    """
    ids: list[str] = []
    images: list[npt.NDArray[np.uint8]] = []
    labels: list[Any] = []
    for table in read_tables(shards, manifest):
        ids += table["id"].to_pylist()
        images += [decode_image(image.as_py(), convert=manifest.convert_images) for image in table["image"]]
        labels += [names[0] for names in table["labels"].to_pylist()]
    return Examples(tuple(ids), images, np.array(labels, np.int64))
