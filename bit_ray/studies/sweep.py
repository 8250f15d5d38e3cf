"""Sweeps: a search over settings of pretrain or finetune, by what they score on a validation part."""

from collections.abc import Callable, Sequence
from typing import Any

from bit_ray import store
from bit_ray.config import from_dict, to_dict
from bit_ray.evaluation.statistics import expected_best_band, expected_choice
from bit_ray.plots.lines import Line, LinePlot
from bit_ray.run_folder import RunFolder
from bit_ray.studies.cells import Cell, CellScore, Part
from bit_ray.studies.conduct import SETTINGS, CellOutcome, Job, Outcome, conducted, print_plan
from bit_ray.studies.display import Goal
from bit_ray.studies.findings import missing, settings_of
from bit_ray.studies.halving import RUNGS, num_kept, rung_steps
from bit_ray.studies.hosted import check_hosted
from bit_ray.studies.inputs import Inputs
from bit_ray.studies.report import Report, Table
from bit_ray.studies.search import Adaptive, draw
from bit_ray.studies.spaces import Axis, parse_space, short, shown
from bit_ray.studies.study_config import OWN, SweepConfig, changed, command, swept
from bit_ray.training.checks import check_settings
from bit_ray.training.config import FinetuneConfig, PretrainConfig, Runtime
from bit_ray.training.plan import TrainPlan

# A validation part in two halves: trials are ranked by both together; what a choice is worth is read on one of them
# after ranking by the other.
HALVES = ("val-a", "val-b")
SELECTED_BY = tuple(f"{name}/top_1" for name in HALVES)
"""Values whose mean a trial in memory is selected by."""
NUMBERS_OF_TRIALS = (1, 2, 5, 10, 20, 40)
_SHOWN = 10


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


def selected_by(score: CellScore) -> float:
    """Return the top-1 on the whole validation part, which a trial is selected by."""
    names = ("val/top_1",) if "val/top_1" in score.final else SELECTED_BY
    return sum(score.final[name] for name in names) / len(names)


def best_trial(cells: Sequence[CellOutcome]) -> CellOutcome | None:
    """Return the trial that ran to its end with the highest top-1 on the validation part; of equals, the cheapest."""
    done = [cell for cell in cells if cell.score is not None and not cell.score.stopped_at]
    return min(done, key=_rank) if done else None


def _rank(cell: CellOutcome) -> tuple[bool, float, int]:
    score = _score(cell)
    return score.stopped_at > 0, -selected_by(score), score.images


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
            f"{100 * selected_by(_score(best)):.1f} % on the validation part it was selected by, which is optimistic."
        )
        findings += borders(axes, _values(best.params))
        if config.stop_early:
            findings.append(_stopped_early(done))
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


def trials_table(done: Sequence[CellOutcome], axes: Sequence[Axis], price: float) -> Table:
    """Return the best trials."""
    rows = []
    for cell in sorted(done, key=_rank)[:_SHOWN]:
        score = _score(cell)
        row = [cell.key, *(short(cell.params[axis.name]) for axis in axes)]
        mark = " (diverged)" if score.diverged else f" (stopped at {score.stopped_at:,})" if score.stopped_at else ""
        row += [f"{100 * selected_by(score):.1f} %{mark}"]
        row += [f"{score.images:,}", f"{score.device_s:,.1f}"]
        row += [f"{score.device_s / 3600 * price:.3g}"] if price else []
        rows.append(tuple(row))
    names = [axis.name.rpartition(".")[2] for axis in axes]
    header = ("trial", *names, "validation top-1", "images", "device s", *(("price",) if price else ()))
    return Table(title=f"The best {len(rows)} of {len(done)} trials", header=header, rows=tuple(rows))


def fewer_trials(done: Sequence[CellOutcome], name: str) -> tuple[Table, LinePlot]:
    """Return what n random trials are expected to reach, as a table and as a figure."""
    scores = [selected_by(_score(cell)) for cell in done]
    first, second = ([_score(cell).final[f"{half}/top_1"] for cell in done] for half in HALVES)
    images = sum(_score(cell).images for cell in done) / len(done)
    rows, curve = [], []
    for n in [n for n in NUMBERS_OF_TRIALS if n <= len(done)]:
        band = expected_best_band(scores, n)
        read = (expected_choice(first, second, n) + expected_choice(second, first, n)) / 2
        curve.append((n, band.estimate, band.low, band.high, read))
        mark = "" if n <= len(done) / 2 else " (as measured: no more than this sample)"
        rows.append(
            (
                f"{n}{mark}",
                f"{100 * band.estimate:.1f} %",
                f"{100 * band.low:.1f} to {100 * band.high:.1f} %",
                f"{100 * read:.1f} %",
                f"{n * images:,.0f}",
            )
        )
    table = Table(
        title="What fewer trials would have reached",
        header=("trials", "expected best", "95 % band", "read on the other half", "images"),
        rows=tuple(rows),
        note="The band is exact for independent trials and holds for all numbers at once. The best of a sweep is "
        "optimistic on what it was selected by: ranked on one half of the validation part and read on the other, it is "
        "not.",
    )
    x = tuple(float(n) for n, *_ in curve)
    best = Line(
        label="selected and read on the same images",
        x=x,
        y=tuple(c[1] for c in curve),
        low=tuple(c[2] for c in curve),
        high=tuple(c[3] for c in curve),
    )
    honest = Line(label="read on the other half", x=x, y=tuple(c[4] for c in curve))
    plot = LinePlot(
        name=name,
        title="Expected best of n random trials",
        x_label="trials",
        y_label="validation top-1",
        lines=(best, honest),
        log_x=True,
        percent_y=True,
        caption="With the exact 95 % band for all numbers of trials at once.",
    )
    return table, plot


def progress_plot(done: Sequence[CellOutcome], name: str) -> LinePlot:
    """Return the best so far against the images trained on, in the order of the trials."""
    images, best, x, y = 0, 0.0, [], []
    for cell in done:
        images += _score(cell).images
        best = max(best, selected_by(_score(cell)) if not _score(cell).stopped_at else 0.0)
        x.append(float(images))
        y.append(best)
    return LinePlot(
        name=name,
        title="Best trial so far",
        x_label="training images of all trials",
        y_label="validation top-1",
        lines=(Line(label="best so far", x=tuple(x), y=tuple(y)),) if x else (),
        percent_y=True,
    )


def borders(axes: Sequence[Axis], values: dict[str, Any]) -> list[str]:
    """Say which settings of the best trial are at the border of the space."""
    near = [(axis.name, end) for axis in axes if (end := axis.is_near_border(values[axis.name]))]
    return [f"The best is at the {end} border of {name}: a wider space may have a better one." for name, end in near]


def early_stopping(done: Sequence[CellOutcome]) -> str:
    """Say what successive halving at a quarter and half of each trial would have saved and thrown away."""
    alive = list(done)
    saved = 0.0
    for rung, share in enumerate(RUNGS):
        at = [(cell, _score(cell).points[rung]) for cell in alive if len(_score(cell).points) > rung + 1]
        if len(at) < len(alive):
            return "What early stopping would have saved cannot be said: some trials diverged or are too short."
        ranked = sorted(at, key=lambda one: -sum(one[1].values[f"{half}/top_1"] for half in HALVES))
        kept = [cell for cell, _ in ranked[: num_kept(len(ranked))]]
        saved += sum(_score(cell).images * (1 - share) for cell in alive if cell not in kept)
        alive = kept
    best, left = best_trial(done), best_trial(alive)
    assert best is not None
    assert left is not None
    total = sum(_score(cell).images for cell in done)
    loss = selected_by(_score(best)) - selected_by(_score(left))
    kept_best = (
        "would have kept the best trial"
        if left.key == best.key
        else f"would have thrown away the best trial, and its own best is {100 * loss:.1f} points below"
    )
    return (
        f"Early stopping that keeps a third at 25 % and at 50 % of each trial's steps would have saved "
        f"{100 * saved / total:.0f} % of the images and {kept_best}."
    )


def _stopped_early(done: Sequence[CellOutcome]) -> str:
    """Say what early stopping has ended."""
    stopped = [score for cell in done if (score := _score(cell)).stopped_at]
    return (
        f"Early stopping ended {len(stopped)} of {len(done)} trials at 25 % or 50 % of their steps. What they would "
        "have reached is not known; run the sweep without it, under another name, to see."
    )


def _score(cell: CellOutcome) -> CellScore:
    assert cell.score is not None
    return cell.score
