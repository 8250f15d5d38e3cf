"""The space of a sweep: which settings are searched, and over which values. Imports neither PyTorch nor Ray."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from bit_ray.errors import ConfigError, brief

Method = Literal["random", "sobol", "tpe", "gp"]
"""How a sweep chooses its trials; see `bit_ray.studies.search`."""

_FORMS = "log:LOW:HIGH, uniform:LOW:HIGH, int:LOW:HIGH, logint:LOW:HIGH, or values such as 0,0.1,0.4"
_RANGES = ("log", "uniform", "int", "logint")
# YAML 1.1 reads 1e-4 as text.
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


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
            different = [(isinstance(value, bool), value) for value in self.values]  # True == 1
            if not self.values or any(different.count(value) > 1 for value in different):
                raise _refused(f"{self.name} has no values, or one twice", "different values")
            return
        ends = f"{self.name} from {self.low:g} to {self.high:g}"
        if not -math.inf < self.low < self.high < math.inf:
            raise _refused(ends, "a lower and a higher finite number")
        if self._is_log and self.low <= 0:
            raise _refused(ends, "above 0 on a logarithmic scale")
        if self._is_whole and (self.low % 1 or self.high % 1):
            raise _refused(ends, "whole numbers")

    @property
    def _is_log(self) -> bool:
        return self.kind in ("log", "logint")

    @property
    def _is_whole(self) -> bool:
        return self.kind in ("int", "logint")

    def at(self, u: float) -> Any:
        """Return the value at ``u`` in [0, 1), which is uniform in the distribution."""
        if self.kind == "choice":
            return self.values[int(u * len(self.values))]
        end = self.high + 1 if self._is_whole else self.high
        if self._is_log:
            value = math.exp((1 - u) * math.log(self.low) + u * math.log(end))
        else:
            value = (1 - u) * self.low + u * end
        value = min(max(value, self.low), self.high)  # rounding may exceed the ends
        return math.floor(value) if self._is_whole else value

    def is_near_border(self, value: Any) -> str:
        """Return ``lower`` or ``upper`` if a value lies in the outer twentieth of a range, else an empty text."""
        if self.kind == "choice":
            return ""
        low, high, x = self.low, self.high, float(value)
        if self._is_log:
            low, high, x = math.log(low), math.log(high), math.log(x)
        share = (x - low) / (high - low)
        return "lower" if share < 0.05 else "upper" if share > 0.95 else ""


def parse_space(texts: Sequence[str], field: str = "space") -> tuple[Axis, ...]:
    """Read axes such as ``rule.base-lr=log:1e-4:1e-1`` and ``rule.mixup-alpha=0,0.1,0.4``.

    Args:
        texts: The axes.
        field: The setting they come from, for errors.

    Raises:
        ConfigError: one has another form, an empty or inverted range, or a setting twice.
    """
    try:
        axes = tuple(_parse(text) for text in texts)
        names = [axis.name for axis in axes]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise _refused(f"{twice} is given twice", "each setting once", "remove one")
    except ConfigError as error:
        raise error.renamed(field) from None
    return axes


def _refused(given: str, accepted: str, remedy: str = "correct it") -> ConfigError:
    return ConfigError.of("space", given, accepted, remedy)


def _parse(text: str) -> Axis:
    name, given, spec = text.partition("=")
    name = name.strip().replace("-", "_")
    if not given or not name or not spec.strip():
        raise _refused(brief(text), f"SETTING=VALUES with {_FORMS}")
    kind, *ends = spec.split(":")
    is_range = len(ends) == 2 and all(map(_is_number, ends))
    if kind in _RANGES and is_range:
        return Axis(name=name, kind=kind, low=float(ends[0]), high=float(ends[1]))  # type: ignore[arg-type]
    if is_range or (ends and kind in _RANGES):
        raise _refused(brief(text), f"{_FORMS}; numbers as the ends of a range")
    return Axis(name=name, kind="choice", values=parse_values(spec))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def parse_values(text: str, field: str = "space") -> tuple[Any, ...]:
    """Read values between commas as YAML reads them: numbers, true, false, null, text, and lists in brackets.

    Args:
        text: The values.
        field: The setting they come from, for errors.

    Raises:
        ConfigError: a value cannot be read.
    """
    try:
        values = _plain(yaml.safe_load(f"[{text}]"))
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError also from YAML: a date that does not exist
        raise ConfigError.of(
            field, brief(text), "values between commas, such as 0,0.1,0.4 or [30,60],[45]", "correct them"
        ) from None
    return tuple(values)


def _plain(value: Any) -> Any:
    """Return a value of YAML if it is a finite number, true, false, null, text, or a list of them."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        value = float(value)
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ValueError(value)


def shown(values: Mapping[str, Any]) -> str:
    """Return values as text: ``rule.base_lr 0.0123, rule.num_steps 100``."""
    return ", ".join(f"{name} {short(value)}" for name, value in values.items())


def short(value: Any) -> str:
    """Return a value as text, a number with three digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
