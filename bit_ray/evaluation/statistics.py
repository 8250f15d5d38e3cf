"""An estimate with its confidence interval. Pure functions of numbers; no Ray, no MLflow, no PyTorch."""

from dataclasses import dataclass

from scipy import stats

from bit_ray.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate with its confidence interval."""

    estimate: float
    """The most likely value."""
    low: float
    """Lower end."""
    high: float
    """Upper end."""

    @property
    def excludes_zero(self) -> bool:
        """Whether the sign of the value is certain at the level of the interval."""
        return self.low > 0 or self.high < 0


def t_interval(estimate: float, error: float, degrees: int, level: float = 0.95) -> Interval:
    """Return Student's t interval of an estimate.

    Args:
        estimate: The estimate.
        error: Its standard error.
        degrees: Degrees of freedom of the standard error.
        level: Share of such intervals that contain the true value.

    Raises:
        ConfigError: the level is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise ConfigError(f"level: {level}; between 0 and 1, such as 0.95; correct it")
    half = float(stats.t.ppf((1 + level) / 2, degrees)) * error
    return Interval(estimate=estimate, low=estimate - half, high=estimate + half)
