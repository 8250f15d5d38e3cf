"""``bit-ray fewshot`` and the like: protocols of many trainings or of many probes, with their tables."""

from bit_ray.progress import console, print_table
from bit_ray.studies.config import FewShotConfig


def fewshot(config: FewShotConfig) -> None:
    """Run the few-shot protocol, and print medians and spread."""
    from bit_ray.data import store
    from bit_ray.evaluation.fewshot import summarize
    from bit_ray.studies.few_shot import fewshot_suite

    report = fewshot_suite(config)
    rows = []
    for row in report.rows:
        s = summarize(row.values)
        rate = f"{report.scratch_lr[row.k]:g}" if row.series != report.rows[0].series else ""
        spread = f"{s.lowest:.1%} to {s.highest:.1%}"
        rows.append((str(row.k), row.series, f"{s.median:.2%}", spread, f"{100 * s.std:.1f}", rate))
    header = ("per class", "method", "median", "lowest to highest", "std", "best lr")
    print_table(f"Top-1 of {config.init} on {config.test_shards}, {config.num_subsets} draws", rows, header)
    console.print(f"Index files: {config.subsets or store.join(config.storage, config.name, 'subsets')}")
