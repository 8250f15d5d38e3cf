"""Studies and their reports by the user's settings: what the command line and the jobs call."""

from pathlib import Path

from bit_ray import store
from bit_ray.config import from_dict, from_json, to_dict
from bit_ray.errors import ConfigError
from bit_ray.run_folder import RunFolder
from bit_ray.studies.catalog import find_study
from bit_ray.studies.compare import compare_report
from bit_ray.studies.conduct import OUTCOME_FILE, SETTINGS, conducted, print_plan
from bit_ray.studies.display import Goal
from bit_ray.studies.grid import grid_jobs
from bit_ray.studies.grid_report import grid_report
from bit_ray.studies.hosted import check_hosted
from bit_ray.studies.inputs import Inputs
from bit_ray.studies.outcome import Outcome
from bit_ray.studies.report import Report, render
from bit_ray.studies.study_config import OWN, GridConfig, ReportConfig, changed, read_settings
from bit_ray.studies.sweep import sweep_report
from bit_ray.tracking.recorded import recorded_artifact
from bit_ray.training.checks import check_settings
from bit_ray.training.config import Runtime

# Settings that do not decide a score, and places: a set that has moved is the same.
_ELSEWHERE = OWN | {"shards", "init", "runtime"}


def run_study(config: GridConfig) -> Report | None:
    """Run a study over a grid, from where it was; None after a dry run.

    Raises:
        BitRayError: anything the user can fix.
    """
    study = find_study(config.study)
    name = config.name or config.study
    base = changed(study.base, read_settings("set", config.set), "set")
    runtime = base.runtime
    inputs = Inputs(config.storage, config.tracking)
    jobs = grid_jobs(study, config, inputs)
    for job in jobs:
        check_settings(job.cell.plan, Runtime())
        if config.where == "cluster":
            check_hosted(job.cell, runtime)
    if config.dry_run:
        print_plan(config, jobs, name, [inputs.before])
        return None
    if inputs.pretrained():
        jobs = grid_jobs(study, config, inputs)
    settings = {name: value for name, value in to_dict(base).items() if name not in _ELSEWHERE}
    decides = {SETTINGS: settings, **{job.key: job.cell.identity for job in jobs}}
    goal = Goal(measures=(study.measure,), better=study.better)
    with conducted(
        "grid", config, name, _report, tensors=inputs.tensors(), decides=decides, runtime=runtime, goal=goal
    ) as conduct:
        conduct.carry_out(jobs, title="trainings")
        return conduct.report()


def _report(outcome: Outcome) -> Report:
    if outcome.kind == "grid":
        return grid_report(find_study(from_dict(GridConfig, outcome.config).study), outcome)
    return sweep_report(outcome) if outcome.kind == "sweep" else compare_report(outcome)


def write_report(config: ReportConfig) -> tuple[Report, str]:
    """Write the report of a study from MLflow alone, and return it with its folder.

    Raises:
        BitRayError: MLflow has no such study, or its record is damaged.
    """
    data = recorded_artifact(config.tracking, config.storage, config.name, "study", OUTCOME_FILE)
    try:
        report = _report(from_json(Outcome, data))
    except ConfigError as error:
        raise ConfigError(f"{OUTCOME_FILE} of {config.name}: {error}; run the study again") from None
    folder = config.output or store.join(RunFolder.of(config.storage, config.name).uri, "report")
    for name, content in render(report).items():
        store.write_bytes(store.join(folder, *Path(name).parts), content)
    return report, folder
