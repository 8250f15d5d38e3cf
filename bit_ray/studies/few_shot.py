"""The few-shot protocol of the paper (§3.5): k examples per class, several seeded draws, the full test set, the median.

Beside the transferred network the suite can train the same network from scratch on the same subsets with the same
budget; its learning rate is the best of several, judged on the test set, which favours the baseline.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import numpy as np
import numpy.typing as npt
import ray
import torch

from bit_ray import store
from bit_ray.claim import claimed_run
from bit_ray.cluster.session import Resources, cluster
from bit_ray.config import digest, to_dict
from bit_ray.data.images.resize import eval_view, resize
from bit_ray.data.shards.manifest import Manifest, check_same_classes, read_manifest
from bit_ray.data.shards.scan import read_views, row_groups, single_labels
from bit_ray.errors import root_cause
from bit_ray.evaluation.metrics import ClassificationMetrics
from bit_ray.evaluation.subsets import draw_subsets, summarize
from bit_ray.inference.features import check_single_label
from bit_ray.models.network import Network
from bit_ray.plots.comparison import ComparisonRow, few_shot_figure
from bit_ray.progress import track
from bit_ray.recipes.hyperrule import hyperrule
from bit_ray.studies.config import FewShotConfig
from bit_ray.tracking.runs import TrackedRun
from bit_ray.tracking.server import tracking_uri
from bit_ray.training.device import normalize
from bit_ray.training.finetune import InitialWeights, read_init
from bit_ray.training.in_memory import Examples, fit
from bit_ray.training.plan import TrainPlan, transfer_plan

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
    chosen: npt.NDArray[np.int64]

    @property
    def file(self) -> str:
        """Name of the file of its score."""
        return f"{self.series.replace(' ', '-')}-{self.k}-per-class-seed-{self.seed}-lr-{self.lr:g}.json"

    @property
    def identity(self) -> str:
        """Digest of what it learns, and from which examples."""
        return digest({"plan": self.plan.digest, "chosen": self.chosen.tolist()})


@dataclass(frozen=True, kw_only=True)
class _Score:
    """The content of a trial's file."""

    identity: str
    test_digest: str
    top_1: float


def fewshot_suite(config: FewShotConfig) -> FewShotReport:
    """Run the protocol, one Ray task per training, as many side by side as the cluster has places.

    Scores are kept in ``STORAGE/NAME/scores``, so that a suite of the same name continues.

    Raises:
        BitRayError: Anything the user can put right.
    """
    manifest, test_manifest = read_manifest(config.shards), read_manifest(config.test_shards)
    check_single_label(manifest, config.shards)
    check_same_classes(manifest, test_manifest, config.test_shards)
    init = read_init(config.init, tracking_uri(config.tracking.uri, config.storage))
    with claimed_run(config.storage, config.name):
        return _suite(config, manifest, test_manifest, init)


def _suite(config: FewShotConfig, manifest: Manifest, test_manifest: Manifest, init: InitialWeights) -> FewShotReport:
    place = store.join(store.absolute(config.storage), config.name)
    saved = store.join(place, "subsets")
    draws = draw_subsets(config.shards, manifest, config.shots, config.num_subsets, saved=saved, given=config.subsets)
    trials: list[_Trial] = []
    for (k, seed), chosen in draws.items():
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
            trials.append(_Trial(PRE_TRAINED if lr is None else FROM_SCRATCH, k, seed, rule.base_lr, plan, chosen))
    run = TrackedRun.open(
        config.tracking,
        run_name=config.name,
        storage=config.storage,
        params=to_dict(config),
        tags={"bit_ray.manifest_digest": manifest.digest, "bit_ray.weights_sha256": init.digest},
        kind="fewshot",
    )
    try:
        with cluster() as resources:
            scores = _run(trials, init.tensors, config, test_manifest.digest, resources, store.join(place, "scores"))
        report = _summarize(config, trials, scores)
        for row in report.rows:
            series = row.series.replace(" ", "_").replace("-", "_")
            summary = summarize(row.values)
            run.log_metrics({f"few_shot/{series}": summary.median, f"few_shot/{series}_std": summary.std}, step=row.k)
        run.log_text(json.dumps([asdict(row) for row in report.rows], indent=1), "few_shot.json")
        run.log_figure(few_shot_figure({"": report.rows}, test_manifest.name, config.init), "few_shot.png")
    except BaseException:
        run.close("FAILED")
        raise
    run.close()
    return report


def _run(
    trials: list[_Trial],
    tensors: Mapping[str, torch.Tensor],
    config: FewShotConfig,
    test_digest: str,
    resources: Resources,
    place: str,
) -> list[float]:
    """Top-1 of each trial; those that an earlier start has done are read back."""
    scores = [_recorded(store.join(place, trial.file), trial.identity, test_digest) for trial in trials]
    task = ray.remote(
        num_cpus=resources.num_cpus // resources.num_places, num_gpus=1 if resources.num_gpus else 0, max_retries=3
    )(_train_and_test)
    weights = ray.put(dict(tensors))
    shards, test_shards = store.absolute(config.shards), store.absolute(config.test_shards)
    # Longest first, so that no core idles at the end.
    todo = sorted((i for i, score in enumerate(scores) if score is None), key=lambda i: -trials[i].k)
    refs = {}
    for i in todo:
        start = weights if trials[i].series == PRE_TRAINED else None
        refs[task.remote(start, shards, trials[i].chosen, test_shards, test_digest, trials[i].plan)] = i
    pending = list(refs)
    try:
        with track("few-shot", len(todo), "trainings") as advance:
            while pending:
                [done], pending = ray.wait(pending)
                trial, top_1 = trials[refs[done]], ray.get(done)
                score = _Score(identity=trial.identity, test_digest=test_digest, top_1=top_1)
                store.write_json(store.join(place, trial.file), asdict(score))
                scores[refs[done]] = top_1
                advance(1)
    except ray.exceptions.RayError as error:
        raise root_cause(error) or error from None
    finally:
        for ref in pending:
            ray.cancel(ref)
    return [score for score in scores if score is not None]


def _recorded(uri: str, identity: str, test_digest: str) -> float | None:
    if not store.exists(uri):
        return None
    score = store.read_record(_Score, uri, "delete it to run the training again")
    return score.top_1 if (score.identity, score.test_digest) == (identity, test_digest) else None


def _train_and_test(
    tensors: dict[str, torch.Tensor] | None,
    shards: str,
    chosen: npt.NDArray[np.int64],
    test_shards: str,
    test_digest: str,
    plan: TrainPlan,
) -> float:
    """Top-1 on the test set after one training; runs in a Ray task and may run again."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)  # one place is one core: several trainings side by side
    manifest, test_manifest = read_manifest(shards, plan.manifest_digest), read_manifest(test_shards, test_digest)
    model = fit(plan, read_examples(shards, manifest, chosen, plan), tensors, device=device)
    return top_1_on(model, test_shards, test_manifest, plan)


def read_examples(shards: str, manifest: Manifest, chosen: npt.NDArray[np.int64] | None, plan: TrainPlan) -> Examples:
    """Training examples of a single-label set, as `fit` takes them for a plan.

    Args:
        shards: The set.
        manifest: Its manifest.
        chosen: ``[N]`` ascending places in the set; None: all.
        plan: Says the size of the square that they are resized to, which is done here once.

    Raises:
        DataError: A shard is missing or damaged, or an image cannot be decoded.
    """
    side = {"resize_crop": plan.view.resize_size, "resize": plan.view.crop_size}.get(plan.view.crop, 0)

    def view(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        return resize(image, side, side) if side else image

    parts = list(read_views(shards, manifest, row_groups(manifest, chosen), view))
    return Examples(
        tuple(name for ids, _, _ in parts for name in ids),
        [image for _, images, _ in parts for image in images],
        np.concatenate([single_labels(labels) for _, _, labels in parts]),
    )


@torch.inference_mode()
def top_1_on(model: Network, shards: str, manifest: Manifest, plan: TrainPlan, batch_size: int = 128) -> float:
    """Top-1 of a network on a whole single-label set, by the plan's view for evaluation.

    Raises:
        DataError: A shard is missing or damaged, or an image cannot be decoded.
    """
    device = next(model.parameters()).device
    metrics = ClassificationMetrics(plan.num_classes)

    def view(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        return eval_view(
            image, resize_mode=plan.resize_mode, resize_size=plan.resize_size, crop_size=plan.view.crop_size
        )

    for _, images, names in read_views(shards, manifest, row_groups(manifest), view):
        labels = single_labels(names)
        for start in range(0, len(images), batch_size):
            x = normalize(torch.from_numpy(np.stack(images[start : start + batch_size])), device)
            metrics.update(model(x), torch.from_numpy(labels[start : start + batch_size]))
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
