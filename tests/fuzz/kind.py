"""What a kind of input is: valid things, damage to them, and what must hold whatever the damage."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from fuzz.mutate import Rng

from bit_ray.errors import BitRayError


class NotOneLine(Exception):
    """A refusal whose message has several lines, or none."""


class Attempt:
    """Calls what may refuse its input."""

    def __init__(self) -> None:
        self.refused = False

    def __call__(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Return what the function returns, None where it refuses; a refusal must have one line."""
        try:
            return function(*args, **options)
        except BitRayError as error:
            if len(str(error).splitlines()) != 1:
                raise NotOneLine(repr(str(error))).with_traceback(error.__traceback__) from None
            self.refused = True
            return None


class Case(NamedTuple):
    """One input."""

    files: Mapping[str, bytes | Path]
    """What it consists of, by path in its folder; a Path is linked."""
    check: Callable[[Path, Attempt], object]
    """Gives the folder to the code, and asserts what must hold of the results."""


class Kind(Protocol):
    """A module ``fuzz.kinds.NAME`` has a class ``Kind`` like this."""

    cpu_s: float
    """Most seconds of computing for one input."""
    memory: int
    """Most bytes that one input may make the process grow by."""
    canaries: Mapping[str, bytes]
    """Files that hostile inputs point at, by path below the canary folder."""

    def __init__(self, folder: Path) -> None:
        """Make valid inputs, in the folder if they are large, or find there what an earlier process made."""

    def case(self, rng: Rng) -> Case:
        """One damaged input."""
