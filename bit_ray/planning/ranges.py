"""Numbers with an interval, and the arithmetic of positive ones."""

import math
from typing import NamedTuple

_PREFIXES = {1.0: "", 1e3: "k", 1e6: "M", 1e9: "G", 1e12: "T", 1e15: "P"}
_TIMES = {1e-3: "ms", 1.0: "s", 60.0: "min", 3600.0: "hours", 86_400.0: "days"}


class Range(NamedTuple):
    """A number that is not known exactly: the least and the most it may be, and what is likely."""

    low: float
    likely: float
    high: float

    @classmethod
    def exactly(cls, value: float) -> "Range":
        """A number that is known."""
        return cls(value, value, value)

    def times(self, other: "Range | float") -> "Range":
        """The product, if the two do not depend on each other."""
        o = as_range(other)
        return Range(self.low * o.low, self.likely * o.likely, self.high * o.high)

    def over(self, other: "Range | float") -> "Range":
        """The quotient, if the two do not depend on each other."""
        o = as_range(other)
        return Range(_divide(self.low, o.high), _divide(self.likely, o.likely), _divide(self.high, o.low))

    def plus(self, other: "Range | float") -> "Range":
        """The sum."""
        o = as_range(other)
        return Range(self.low + o.low, self.likely + o.likely, self.high + o.high)

    def least(self, other: "Range | float") -> "Range":
        """The smaller of the two, end by end."""
        o = as_range(other)
        return Range(min(self.low, o.low), min(self.likely, o.likely), min(self.high, o.high))

    def most(self, other: "Range | float") -> "Range":
        """The larger of the two, end by end."""
        o = as_range(other)
        return Range(max(self.low, o.low), max(self.likely, o.likely), max(self.high, o.high))

    def sized(self, unit: str) -> str:
        """Return the text of an amount of any size: ``1,319 TB (1,199 to 1,439)``."""
        size = max((size for size in _PREFIXES if size <= self.likely), default=1.0)
        return self.shown(_PREFIXES[size] + unit, 1 / size)

    def lasting(self) -> str:
        """Return the text of a number of seconds: ``2.50 days (1.25 to 5.21)``."""
        size = max((size for size in _TIMES if 2 * size <= self.likely), default=1e-3)
        return self.shown(_TIMES[size], 1 / size)

    def shown(self, unit: str = "", scale: float = 1.0) -> str:
        """Return the text of the number: three digits, and the interval unless the number is known exactly."""
        low, likely, high = (number(value * scale) for value in self)
        unit = f" {unit}" if unit else ""
        return f"{likely}{unit}" if low == high else f"{likely}{unit} ({low} to {high})"


def as_range(value: Range | float) -> Range:
    """Return a number as one that is known exactly, and a range as it is."""
    return value if isinstance(value, Range) else Range.exactly(value)


def number(value: float) -> str:
    """Return a number with three digits, or all of those before the point."""
    if not math.isfinite(value):
        return "never"
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _divide(a: float, b: float) -> float:
    return a / b if b else math.inf
