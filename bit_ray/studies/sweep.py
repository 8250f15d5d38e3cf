"""Sweeps: a search over settings of pretrain or finetune, by what they score on a validation part."""

from collections.abc import Callable, Sequence
from typing import Any

from bit_ray import store
from bit_ray.config import from_dict, to_dict
from bit_ray.run_folder import RunFolder
from bit_ray.studies.cells import Cell, CellScore, Part
from bit_ray.studies.conduct import SETTINGS, Job, conducted, print_plan
from bit_ray.studies.display import Goal
from bit_ray.studies.halving import rung_steps
from bit_ray.studies.hosted import check_hosted
from bit_ray.studies.inputs import Inputs
from bit_ray.studies.outcome import Outcome, missing, settings_of
from bit_ray.studies.report import Report
from bit_ray.studies.search import Adaptive, draw
from bit_ray.studies.spaces import Axis, parse_space, shown
from bit_ray.studies.study_config import OWN, SweepConfig, changed, command, swept
from bit_ray.studies.trials import (
    HALVES,
    SELECTED_BY,
    best_trial,
    borders,
    early_stopping,
    fewer_trials,
    progress_plot,
    score_of,
    selected_by,
    stopped_early,
    trials_table,
)
from bit_ray.training.checks import check_settings
from bit_ray.training.config import FinetuneConfig, PretrainConfig, Runtime
from bit_ray.training.plan import TrainPlan


def run_sweep(config: SweepConfig) -> Report | None:
    """Run a sweep, from where it was; None after a dry run.

    Raises:
        BitRayError: anything the user can fix.
    """
    axes = parse_space(config.space)
    inputs = Inputs(config.storage, config.tracking)
    base = swept(config)
    maker = _jobs(config, base, inputs, axes)
    adaptive = config.search not in ("random", "sobol")

    def made() -> list[Job]:
        if adaptive:  # the first, which checks the settings
            return [maker(0, draw(axes, "random", config.search_seed, 0))]
        return [maker(number, draw(axes, config.search, config.search_seed, number)) for number in range(config.trials)]

    jobs = made()
    if config.dry_run:
        more = f"{config.trials - 1} more trials are proposed by {config.search} as it goes on" if adaptive else ""
        print_plan(config, jobs, config.name, [inputs.before, more])
        return None
    if inputs.pretrained():
        jobs = made()
    with conducted(
        "sweep",
        config,
        config.name,
        sweep_report,
        tensors=inputs.tensors(),
        decides=_decides(config, base),
        runtime=base.runtime,
        goal=Goal(measures=("val/top_1",) if config.where == "cluster" else SELECTED_BY),
    ) as conduct:
        if adaptive:
            proposer = _Proposer(config, axes, maker, RunFolder.of(config.storage, config.name))
            jobs = proposer.known()
            conduct.carry_out(
                jobs,
                title="trials",
                more=lambda: proposer.propose(conduct.study.scores),
                num_more=config.trials - len(jobs),
            )
        else:
            conduct.carry_out(jobs, title="trials")
        return conduct.report()


_DECIDES = ("command", "set", "space", "val_shards", "val_share", "search", "search_seed", "stop_early")


def _decides(config: SweepConfig, base: PretrainConfig | FinetuneConfig) -> dict[str, Any]:
    """Return what stays as it was when the sweep began, and the settings one by one, to name the one that differs."""
    decides = {name: value for name, value in to_dict(config).items() if name in _DECIDES}
    each = {name: value for name, value in to_dict(base).items() if name not in OWN}
    space = {
        axis.name: text.partition("=")[2] for axis, text in zip(parse_space(config.space), config.space, strict=True)
    }
    return {**decides, SETTINGS: {**decides, "set": each, "space": space}}


def _jobs(
    config: SweepConfig, base: PretrainConfig | FinetuneConfig, inputs: Inputs, axes: Sequence[Axis]
) -> Callable[[int, dict[str, Any]], Job]:
    """Return the function that makes a trial from its number and values."""
    whole = inputs.part(base.shards)
    if isinstance(base, FinetuneConfig) and base.shots:
        whole = inputs.draw(whole, base.shots, base.subset_seed)
    rows = whole.rows
    if config.val_shards:
        val = inputs.part(config.val_shards)
        inputs.check_classes(whole, val, "val_shards")
    else:
        fit, val = inputs.split(whole, config.val_share, 0)
        rows = fit.rows
    # A Ray Train run is measured on whole sets: nothing can be read on another half then.
    parts = {"val": val} if config.where == "cluster" else dict(zip(HALVES, inputs.halves(val, 0), strict=True))
    rungs = store.join(RunFolder.of(config.storage, config.name).uri, "rungs") if config.stop_early else ""

    def make(number: int, values: dict[str, Any]) -> Job:
        one = changed(base, {**values, "seed": number}, "space")
        plan, part = inputs.training(one, rows)
        check_settings(plan, Runtime())
        job = trial_job(f"trial-{number:04d}", {"trial": number, **values}, plan, part, parts, rungs)
        if config.where == "cluster":
            check_hosted(job.cell, base.runtime)
        return job

    return make


def trial_job(
    key: str, params: dict[str, Any], plan: TrainPlan, part: Part, halves: dict[str, Part], rungs: str = ""
) -> Job:
    """Return a trial that is measured on both halves of a validation part, also where it is or could be stopped."""
    at_steps = rung_steps(plan.schedule.num_steps)
    return Job(key=key, params=params, cell=Cell(plan=plan, train=part, at_steps=at_steps, parts=halves, rungs=rungs))


class _Proposer:
    """Proposes trials by an adaptive search; each is written down before it runs, so that a restart knows it."""

    def __init__(
        self, config: SweepConfig, axes: Sequence[Axis], maker: Callable[[int, dict[str, Any]], Job], folder: RunFolder
    ) -> None:
        self._search = Adaptive(axes, config.search, config.search_seed, "higher")
        self._maker, self._folder, self._trials = maker, folder, config.trials
        self._jobs: dict[str, Job] = {}
        self._told: set[str] = set()

    def known(self) -> list[Job]:
        """Return the trials that an earlier start has proposed."""
        root = store.join(self._folder.uri, "proposed")
        for name in sorted(store.list_files(root))[: self._trials]:
            values = store.read_json(store.join(root, name))
            number = int(name.partition(".")[0])
            job = self._maker(number, values)
            self._jobs[job.key] = job
        return list(self._jobs.values())

    def propose(self, scores: dict[str, CellScore]) -> Job | None:
        """Return the next trial, from the scores so far."""
        number = len(self._jobs)
        if number >= self._trials:
            return None
        for key, job in self._jobs.items():
            if key in scores and key not in self._told:
                self._told.add(key)
                self._search.tell(_values(job.params), selected_by(scores[key]))
        values = self._search.propose(number)
        job = self._maker(number, values)
        store.write_json(store.join(self._folder.uri, "proposed", f"{number:04d}.json"), values)
        self._jobs[job.key] = job
        return job


def _values(params: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in params.items() if name != "trial"}


def sweep_report(outcome: Outcome) -> Report:
    """Return the report of a sweep, of what is finished."""
    config = from_dict(SweepConfig, outcome.config)
    axes = parse_space(config.space)
    done = [cell for cell in outcome.cells if cell.score is not None]
    left = list(missing(outcome))
    if len(outcome.cells) < config.trials:
        left.append(f"{config.trials - len(outcome.cells)} trials are not proposed yet")
    best = best_trial(done)
    findings: list[str] = []
    tables, plots = [trials_table(done, axes, config.price)], [progress_plot(done, "progress")]
    if best is not None:
        findings.append(
            f"The best of {len(done)} trials has {shown(_values(best.params))}: top-1 "
            f"{100 * selected_by(score_of(best)):.1f} % on the validation part it was selected by, which is optimistic."
        )
        findings += borders(axes, _values(best.params))
        if config.stop_early:
            findings.append(stopped_early(done))
        elif len(done) >= 6 and config.where == "memory":
            findings.append(early_stopping(done))
    if config.fewer != "never" and config.against_fewer:
        findings.append(f"What fewer trials would reach is not said: {config.against_fewer}.")
    elif config.fewer != "never" and len(done) >= 2:
        table, plot = fewer_trials(done, "fewer-trials")
        tables.append(table)
        plots.append(plot)
    return Report(
        title=f"Sweep of {config.command}: {config.name}",
        command=command("sweep", config),
        findings=tuple(findings) if best is not None else ("No trial is finished.",),
        tables=tuple(tables),
        plots=tuple(plots),
        missing=tuple(left),
        settings=settings_of(outcome),
    )
