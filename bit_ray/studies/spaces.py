"""The space of a sweep: which settings are searched, and over which values. Imports neither PyTorch nor Ray."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from bit_ray.errors import ConfigError

Method = Literal["random", "sobol", "tpe", "gp"]
"""How a sweep chooses its trials; see `bit_ray.studies.search`."""

_FORMS = "log:LOW:HIGH, uniform:LOW:HIGH, int:LOW:HIGH, logint:LOW:HIGH, or values such as 0,0.1,0.4"


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One setting that is searched."""

    name: str
    """Dotted name of the setting, such as ``rule.base_lr``."""
    kind: Literal["log", "uniform", "int", "logint", "choice"]
    """Distribution: log-uniform or uniform, of numbers or whole numbers, or one of some values."""
    low: float = 0.0
    """Least value of a range."""
    high: float = 0.0
    """Greatest value of a range."""
    values: tuple[Any, ...] = ()
    """Values of ``choice``."""

    def __post_init__(self) -> None:
        if self.kind == "choice":
            if not self.values or len({repr(value) for value in self.values}) < len(self.values):
                raise ConfigError(f"space: {self.name} has no values, or one twice; different values; correct them")
            return
        if not -math.inf < self.low < self.high < math.inf:
            raise ConfigError(
                f"space: {self.name} from {self.low:g} to {self.high:g}; a lower and a higher finite number; correct it"
            )
        if self.kind in ("log", "logint") and self.low <= 0:
            raise ConfigError(f"space: {self.name} from {self.low:g}; above 0 on a logarithmic scale; raise it")
        if self.kind in ("int", "logint") and (self.low % 1 or self.high % 1):
            raise ConfigError(f"space: {self.name} from {self.low:g} to {self.high:g}; whole numbers; correct them")

    def at(self, u: float) -> Any:
        """Return the value at ``u`` in [0, 1), which is uniform in the distribution."""
        if self.kind == "choice":
            return self.values[int(u * len(self.values))]
        if self.kind == "uniform":
            return self.low + u * (self.high - self.low)
        if self.kind == "log":
            return self.low * (self.high / self.low) ** u
        if self.kind == "int":
            return int(self.low) + int(u * (self.high - self.low + 1))
        return min(int(self.high), math.floor(self.low * ((self.high + 1) / self.low) ** u))

    def is_near_border(self, value: Any) -> str:
        """Return ``lower`` or ``upper`` if a value lies in the outer twentieth of a range, else an empty text."""
        if self.kind == "choice":
            return ""
        low, high, x = self.low, self.high, float(value)
        if self.kind in ("log", "logint"):
            low, high, x = math.log(low), math.log(high), math.log(x)
        share = (x - low) / (high - low)
        return "lower" if share < 0.05 else "upper" if share > 0.95 else ""


def parse_space(texts: Sequence[str]) -> tuple[Axis, ...]:
    """Read axes such as ``rule.base-lr=log:1e-4:1e-1`` and ``rule.mixup-alpha=0,0.1,0.4``.

    Raises:
        ConfigError: one has another form, an empty or inverted range, or a setting twice.
    """
    axes = tuple(_parse(text) for text in texts)
    names = [axis.name for axis in axes]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"space: {twice} is given twice; each setting once; remove one")
    return axes


def _parse(text: str) -> Axis:
    name, given, spec = text.partition("=")
    name = name.strip().replace("-", "_")
    if not given or not name or not spec.strip():
        raise ConfigError(f"space: {text!r}; SETTING=VALUES with {_FORMS}; correct it")
    kind, colon, rest = spec.partition(":")
    if not colon:
        return Axis(name=name, kind="choice", values=parse_values(spec))
    ends = rest.split(":")
    if kind not in ("log", "uniform", "int", "logint") or len(ends) != 2:
        raise ConfigError(f"space: {text!r}; {_FORMS}; correct it")
    try:
        low, high = (float(end) for end in ends)
    except ValueError:
        raise ConfigError(f"space: {text!r}; numbers as the ends of a range, {_FORMS}; correct it") from None
    return Axis(name=name, kind=kind, low=low, high=high)  # type: ignore[arg-type]


def parse_values(text: str) -> tuple[Any, ...]:
    """Read values between commas as YAML reads them: numbers, true, false, null, text, and lists in brackets.

    Raises:
        ConfigError: a value cannot be read.
    """
    try:
        values = yaml.safe_load(f"[{text}]")
    except yaml.YAMLError:
        raise ConfigError(f"space: {text!r}; values between commas, such as 0,0.1,0.4; correct them") from None
    return tuple(_number(value) for value in values)


def _number(value: Any) -> Any:
    # YAML 1.1 reads 1e-4 as text.
    return float(value) if isinstance(value, str) and re.fullmatch(r"[-+]?[\d.]+[eE][-+]?\d+", value) else value


def shown(values: Mapping[str, Any]) -> str:
    """Return values as one reads them: ``rule.base_lr 0.0123, rule.num_steps 100``."""
    return ", ".join(f"{name} {_short(value)}" for name, value in values.items())


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
