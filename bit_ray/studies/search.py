"""How a sweep chooses its trials: random (as the paper), a scrambled Sobol sequence, or Optuna's TPE and GP.

Trial i of a random or Sobol sweep is a function of the seed and i alone: its list of trials is known before the first
one runs. Trial i of an adaptive one is a function of the seed, i, and the scores of the trials that were finished then:
a new start proposes what the earlier one would have proposed.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from scipy.stats import qmc

from bit_ray.studies.spaces import Axis, Method


def draw(axes: Sequence[Axis], method: Method, seed: int, number: int) -> dict[str, Any]:
    """Return the values of one trial of a random or Sobol sweep.

    Args:
        axes: The space.
        method: ``random`` or ``sobol``.
        seed: Of the sweep.
        number: Of the trial, from 0.
    """
    assert method in ("random", "sobol")
    if method == "random":
        u = np.random.default_rng([seed, number]).random(len(axes))
    else:
        sequence = qmc.Sobol(len(axes), scramble=True, rng=np.random.default_rng(seed))
        if number:  # SciPy cannot go forward by 0
            sequence.fast_forward(number)
        u = sequence.random(1)[0]
    return {axis.name: axis.at(float(x)) for axis, x in zip(axes, u, strict=True)}


class Adaptive:
    """Proposes trials from the scores of the earlier ones, through Optuna.

    Args:
        axes: The space.
        method: ``tpe`` or ``gp``.
        seed: Of the sweep. With several trials at a time the proposals also depend on which ends first.
        better: Whether lower or higher scores are better.
    """

    def __init__(self, axes: Sequence[Axis], method: Method, seed: int, better: Literal["lower", "higher"]) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._study = optuna.create_study(direction="minimize" if better == "lower" else "maximize")
        self._sampler = optuna.samplers.TPESampler if method == "tpe" else optuna.samplers.GPSampler
        self._seed = seed
        self._axes = {axis.name: axis for axis in axes}
        self._distributions = {axis.name: _distribution(axis) for axis in axes}
        self._running: dict[str, Any] = {}

    def propose(self, number: int) -> dict[str, Any]:
        """Return the values of trial ``number``, counted from 0."""
        # A sampler that went on from the first seed would propose the first trials again after a new start.
        [seed] = np.random.SeedSequence((self._seed, number)).generate_state(1)
        self._study.sampler = self._sampler(seed=int(seed))
        trial = self._study.ask(self._distributions)
        values = {name: self._value(name, trial.params[name]) for name in self._axes}
        self._running[repr(values)] = trial
        return values

    def tell(self, values: Mapping[str, Any], score: float) -> None:
        """Take the score of a trial; also of one that an earlier start has proposed."""
        import optuna

        trial = self._running.pop(repr(dict(values)), None)
        if trial is not None:
            self._study.tell(trial, score)
            return
        params = {
            name: list(map(repr, axis.values)).index(repr(values[name])) if axis.kind == "choice" else values[name]
            for name, axis in self._axes.items()
        }
        done = optuna.trial.create_trial(params=params, distributions=self._distributions, value=score)
        self._study.add_trial(done)

    def _value(self, name: str, found: Any) -> Any:
        axis = self._axes[name]
        return axis.values[found] if axis.kind == "choice" else found


def _distribution(axis: Axis) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if axis.kind == "choice":
        return CategoricalDistribution(tuple(range(len(axis.values))))
    log = axis.kind in ("log", "logint")
    if axis.kind in ("int", "logint"):
        return IntDistribution(int(axis.low), int(axis.high), log=log)
    return FloatDistribution(axis.low, axis.high, log=log)
