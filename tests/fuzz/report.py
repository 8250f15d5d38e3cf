"""What became of the inputs of one kind, and how those that went wrong are told apart."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import bit_ray

_PACKAGE = os.path.dirname(bit_ray.__file__)
_FINDINGS = "findings"

Frame = tuple[str, str]
"""File and function."""


@dataclass
class Finding:
    """Inputs that went wrong in the same way."""

    first: int
    message: str
    files: str
    count: int = 0


@dataclass
class Report:
    """What became of the inputs of one kind."""

    kind: str
    seed: int
    accepted: int = 0
    refused: int = 0
    findings: dict[str, Finding] = field(default_factory=dict)

    @property
    def tried(self) -> int:
        """Inputs in all."""
        return self.accepted + self.refused + sum(finding.count for finding in self.findings.values())

    def __str__(self) -> str:
        """Return what went wrong, and how to see it again."""
        lines = [f"{self.kind}: {len(self.findings)} causes in {self.tried} inputs of seed {self.seed}"]
        for cause, finding in sorted(self.findings.items(), key=lambda item: -item[1].count):
            again = f"pytest tests/fuzz --fuzz-seed {self.seed} --fuzz-input {self.kind}:{finding.first}"
            lines += [f"\n{cause}: {finding.count} inputs", f"  {finding.message}"]
            lines += [f"  again: {again}", f"  files and trace: {finding.files}"]
        return "\n".join(lines)


def record(saved: Path, place: Path, number: int, cause: str, message: str, trace: str) -> None:
    """Note what went wrong, and keep the files in ``place`` of the first input of its kind."""
    kept = saved / "".join(c if c.isalnum() else "-" for c in cause)[:80]
    if not kept.exists():
        shutil.copytree(place, kept) if place.exists() else kept.mkdir()
        (kept / "trace.txt").write_text(trace, errors="backslashreplace")
    found = {"cause": cause, "number": number, "message": message[:300], "files": str(kept)}
    with open(saved / _FINDINGS, "a") as file:
        file.write(json.dumps(found) + "\n")


def findings(saved: Path) -> dict[str, Finding]:
    """What was noted, by cause."""
    path, found = saved / _FINDINGS, {}
    for line in path.read_text().splitlines() if path.exists() else ():
        one = json.loads(line)
        found.setdefault(one["cause"], Finding(one["number"], one["message"], one["files"])).count += 1
    return found


def cause_of(what: str, frames: Sequence[Frame]) -> str:
    """Name a failure by its kind and the innermost function of bit_ray that it came out of, or else of all.

    Args:
        what: Its kind.
        frames: The innermost first.
    """
    for file, function in ours(frames):
        return f"{what} in {os.path.relpath(file, _PACKAGE)} {function}"
    return f"{what} in {os.path.basename(frames[0][0])} {frames[0][1]}" if frames else what


def ours(frames: Sequence[Frame]) -> list[Frame]:
    """Those of bit_ray."""
    return [frame for frame in frames if frame[0].startswith(f"{_PACKAGE}{os.sep}")]


def native_frames(trace: str) -> list[Frame]:
    """Frames in what faulthandler writes, the innermost first; of the thread that failed, if it says which."""
    text = trace.partition("Current thread")[2] or trace
    lines = [line for line in text.split("\n\n")[0].splitlines() if line.startswith('  File "')]
    return [(line.split('"')[1], line.rpartition(" in ")[2]) for line in lines]
