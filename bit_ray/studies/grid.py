"""Studies over a grid of settings: their trainings, and the scores of these by point."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bit_ray.data.sources.embedded.catalog import is_embedded
from bit_ray.errors import ConfigError
from bit_ray.evaluation.statistics import Spread, pooled_spread
from bit_ray.studies.catalog import GridStudy
from bit_ray.studies.cells import Cell, CellScore, Probe
from bit_ray.studies.conduct import Job
from bit_ray.studies.inputs import Inputs
from bit_ray.studies.outcome import CellOutcome
from bit_ray.studies.spaces import Axis, parse_space, shown
from bit_ray.studies.study_config import GridConfig, changed, read_settings


def grid_jobs(study: GridStudy, config: GridConfig, inputs: Inputs) -> list[Job]:
    """Return the trainings of a study.

    Raises:
        BitRayError: a setting is unknown or refused, or a set is missing.
    """
    base = changed(study.base, read_settings("set", config.set), "set")
    axes = {**study.axes, **{axis.name: _values(axis) for axis in parse_space(config.axes, "axes")}}
    probe = None
    if study.probe is not None:
        support, test, shots = study.probe
        probe = Probe(inputs.draw(inputs.part(support), shots, 0), shots, inputs.part(test))
    jobs: list[Job] = []
    names: set[str] = set()
    for values in itertools.product(*axes.values()):
        point = dict(zip(axes, values, strict=True))
        name = next(name for name in _names(point) if name not in names)
        names.add(name)
        for seed in range(config.seeds or study.seeds):
            settings = dict(point)
            if study.settings is not None:
                own = {name: settings.pop(name) for name in study.axes}
                settings |= study.settings(own, base, inputs)
            one = changed(base, {**settings, "seed": seed}, "axes")
            plan, part = inputs.training(one)
            val = inputs.part(_measured(config.val_shards or study.val, one.shards))
            inputs.check_classes(part, val, "val_shards")
            length = plan.schedule.num_steps
            cell = Cell(
                plan=plan,
                train=part,
                at_steps=tuple(sorted({max(1, round(share * length)) for share in study.at} - {length})),
                parts={"val": val},
                probe=probe,
                norms=study.norms,
            )
            jobs.append(Job(key=f"{name}-seed-{seed}", params={**point, "seed": seed}, cell=cell))
    return jobs


def _measured(val: str, shards: str) -> str:
    """Return the set to measure on; that of embedded data has their name and another ending."""
    if "SHARDS" in val and not is_embedded(shards):
        raise ConfigError.of("val_shards", f"empty, but shards is {shards}", "a set with its classes", "name one")
    return val.replace("SHARDS", shards)


def _values(axis: Axis) -> tuple[Any, ...]:
    if axis.kind != "choice":
        raise ConfigError.of("axes", f"{axis.name} is a range", "values between commas, such as 0,1e-4")
    return axis.values


def _names(point: Mapping[str, Any]) -> Iterator[str]:
    """Names of a point: two may have the same first, such as ``a/b`` and ``a-b``."""
    yield (name := key_of(point))
    yield from (f"{name}-{number}" for number in itertools.count(2))


def key_of(point: Mapping[str, Any]) -> str:
    """Return the name of a point as a file can have it."""

    def plain(value: Any) -> str:
        text = f"{value:g}" if isinstance(value, float) else str(value)
        return "".join(c if c.isascii() and c.isalnum() or c in ".+" else "-" for c in text).strip("-")[-40:]

    return "-".join(f"{name.rpartition('.')[2]}-{plain(value)}" for name, value in point.items())


class Grid:
    """The finished trainings of a grid, by point.

    Args:
        cells: All trainings.
        axes: Names of the axes.
    """

    def __init__(self, cells: Sequence[CellOutcome], axes: Sequence[str]) -> None:
        self.axes = tuple(axes)
        self.scores: dict[tuple[Any, ...], list[CellScore]] = {}
        """Scores of the finished trainings of each point, by seed."""
        for cell in cells:
            scores = self.scores.setdefault(tuple(_hashable(cell.params[axis]) for axis in self.axes), [])
            scores += [] if cell.score is None else [cell.score]
        self.points = list(self.scores)
        """Values of the axes at each point, in order."""

    def values(self, point: tuple[Any, ...], measure: str, step: int = 0) -> list[float]:
        """Return a value of each finished training of a point; at the end, or after some steps.

        A training that diverged has no loss.
        """
        found = []
        for score in self.scores.get(point, []):
            values = score.final if not step else next((p.values for p in score.points if p.step == step), {})
            if measure in values:
                found.append(values[measure])
        return found

    def steps(self, point: tuple[Any, ...]) -> list[int]:
        """Return the steps at which the trainings of a point were measured."""
        return sorted({p.step for score in self.scores[point] for p in score.points})

    def levels(self, axis: int) -> list[Any]:
        """Return the values of an axis, in order."""
        return list(dict.fromkeys(point[axis] for point in self.points))

    def spread(self, measure: str, step: int = 0) -> Spread | None:
        """Return the spread over seeds that all points have in common; None if no point has two."""
        cells = [self.values(point, measure, step) for point in self.points]
        return pooled_spread(cells) if any(len(cell) > 1 for cell in cells) else None

    def label(self, point: tuple[Any, ...]) -> str:
        """Return the point as text."""
        return shown({name.rpartition(".")[2]: value for name, value in zip(self.axes, point, strict=True)})


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
