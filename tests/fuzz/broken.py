"""A kind whose code goes wrong in every way that a tier of inputs must notice."""

import os
import time
from functools import partial
from pathlib import Path

from fuzz.kind import Attempt, Case
from fuzz.mutate import Rng, pick

from bit_ray.errors import DataError

WAYS = ("value", "refusal", "lines", "exception", "assertion", "abort", "spin", "wait", "grow", "delete", "create")


class _TwoLines(DataError):
    def __str__(self) -> str:
        return "input: wrong\naccepted: another"


class Kind:
    """One byte string, which is taken, or refused, or worse."""

    cpu_s, memory, canaries = 2.0, 2**26, {"kept/deep.txt": b"x"}

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)

    def case(self, rng: Rng) -> Case:
        """An input that goes one of the ways."""
        way = pick(rng, WAYS)
        return Case({"input": rng.bytes(8)}, partial(self._go, way))

    def _go(self, way: str, place: Path, attempt: Attempt) -> None:
        outside = place.parents[1]
        match way:
            case "refusal":
                raise DataError("input: wrong; accepted: another; correct it")
            case "lines":
                raise _TwoLines
            case "exception":
                {}["no such key"]
            case "assertion":
                raise AssertionError("an answer that is wrong")
            case "abort":
                os.abort()
            case "spin":
                while True:
                    pass
            case "wait":
                time.sleep(3600)
            case "grow":
                b"x" * (self.memory + 2**25)
            case "delete":
                (outside / "canary/kept/deep.txt").unlink()
            case "create":
                (outside / "seeds/new").mkdir()
