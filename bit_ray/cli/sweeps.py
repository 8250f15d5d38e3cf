"""``bit-ray study ...`` and ``bit-ray sweep``: many trainings with Ray Tune, and their report."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bit_ray.progress import console, print_table
from bit_ray.studies.study_config import (
    CompareConfig,
    GridConfig,
    ReportConfig,
    SweepConfig,
    changed,
    read_settings,
    swept,
)
from bit_ray.tracking.address import recorded_uri

if TYPE_CHECKING:
    from bit_ray.studies.report import Report


@dataclass(frozen=True, kw_only=True)
class ListConfig:
    """List the studies of what the paper found."""


def study_run(config: GridConfig) -> None:
    """Run a study over a grid, and print what was found."""
    from bit_ray.studies.catalog import find_study

    base = changed(find_study(config.study).base, read_settings("set", config.set), "set")
    _look(f"study {config.study}", config, getattr(base, "init", ""), base.shards, config.val_shards)
    from bit_ray.studies.run import run_study

    _print(run_study(config), config.storage, config.name or config.study)


def study_compare(config: CompareConfig) -> None:
    """Compare the rule with a sweep, and print what was found."""
    _look("study compare", config, config.init, *(uri for task in config.tasks for uri in task.split(",")[:2]))
    from bit_ray.studies.compare import compare_hyperrule

    _print(compare_hyperrule(config), config.storage, config.name)


def sweep(config: SweepConfig) -> None:
    """Run a sweep, and print what was found."""
    base = swept(config)
    _look(f"sweep {config.command}", config, getattr(base, "init", ""), base.shards, config.val_shards)
    from bit_ray.studies.sweep import run_sweep

    _print(run_sweep(config), config.storage, config.name)


def study_list(config: ListConfig) -> None:
    """Print the studies, with their grids."""
    from bit_ray.studies.catalog import STUDIES
    from bit_ray.studies.spaces import short

    rows = [
        (name, study.title, "\n".join(f"{k}: {', '.join(map(short, v))}" for k, v in study.axes.items()))
        for name, study in STUDIES.items()
    ]
    print_table("bit-ray study run STUDY", rows, ("study", "question", "grid"))


def study_report(config: ReportConfig) -> None:
    """Write the report of a study from MLflow, and print what was found."""
    recorded_uri(config.tracking.uri, config.storage)  # before PyTorch is imported
    from bit_ray.studies.run import write_report

    report, folder = write_report(config)
    _print_report(report, folder)


def _look(verb: str, config: GridConfig | CompareConfig | SweepConfig, init: str, *sets: str) -> None:
    """Check what is not made by the study itself."""
    from bit_ray.cli.first_look import look
    from bit_ray.data.sources.embedded.catalog import is_embedded
    from bit_ray.recipes.embedded import EMBEDDED_INIT

    own = [uri for uri in sets if not is_embedded(uri)]
    look(verb, init if init != EMBEDDED_INIT else "", *own, tracking=config.tracking, storage=config.storage)


def _print(report: "Report | None", storage: str, name: str) -> None:
    from bit_ray import store

    if report is not None:
        _print_report(report, store.join(storage, name, "report"))


def _print_report(report: "Report", folder: str) -> None:
    for line in (*report.missing, *report.findings):
        console.print(line)
    console.print(f"Report: {folder}/report.html")
