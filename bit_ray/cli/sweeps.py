"""``bit-ray study ...`` and ``bit-ray sweep``: many trainings with Ray Tune, and their report."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bit_ray.progress import console, print_table
from bit_ray.studies.study_config import CompareConfig, GridConfig, ReportConfig, SweepConfig

if TYPE_CHECKING:
    from bit_ray.studies.report import Report


@dataclass(frozen=True, kw_only=True)
class ListConfig:
    """List the studies of what the paper found."""


def study_run(config: GridConfig) -> None:
    """Run a study over a grid, and print what was found."""
    from bit_ray.studies.run import run_study

    _print(run_study(config), config.storage, config.name or config.study)


def study_compare(config: CompareConfig) -> None:
    """Compare the rule with a sweep, and print what was found."""
    from bit_ray.studies.compare import compare_hyperrule

    _print(compare_hyperrule(config), config.storage, config.name)


def sweep(config: SweepConfig) -> None:
    """Run a sweep, and print what was found."""
    from bit_ray.studies.sweep import run_sweep

    _print(run_sweep(config), config.storage, config.name)


def study_list(config: ListConfig) -> None:
    """Print the studies, with their grids."""
    from bit_ray.studies.catalog import STUDIES

    rows = [
        (name, study.title, " x ".join(f"{k} {v}" for k, v in study.axes.items())) for name, study in STUDIES.items()
    ]
    print_table("bit-ray study run STUDY", rows, ("study", "question", "grid"))


def study_report(config: ReportConfig) -> None:
    """Write the report of a study from MLflow, and print what was found."""
    from bit_ray.studies.run import write_report

    report, folder = write_report(config)
    _print_report(report, folder)


def _print(report: "Report | None", storage: str, name: str) -> None:
    from bit_ray import store

    if report is not None:
        _print_report(report, store.join(storage, name, "report"))


def _print_report(report: "Report", folder: str) -> None:
    for line in (*report.missing, *report.findings):
        console.print(line)
    console.print(f"Report: {folder}/report.html")
