import fnmatch
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
TEXT = (ROOT / "clusters" / "container" / "Containerfile").read_text()
HADOLINT = Path(sys.executable).with_name("hadolint")


def problems(text: str) -> str:
    """What hadolint finds, and what it cannot know."""
    done = subprocess.run([HADOLINT, "--no-color", "-"], input=text, capture_output=True, text=True, check=False)
    found = [done.stdout + done.stderr]
    last = text.split("\nFROM")[-1]
    users = re.findall(r"^USER (\S+)", last, re.MULTILINE)
    if not users or not users[-1].isdigit() or users[-1] == "0":
        found.append("USER: runAsNonRoot wants a number, and not 0")
    if not re.search(r"^ARG BASE=\S+:\d+\.\d+-slim-\w+$", text, re.MULTILINE):
        found.append("BASE: a version of Python on a slim image of a named Debian")
    if re.search(r"pip install (?!.*(--require-hashes|--no-index))", last):
        found.append("packages: locked, by their hashes")
    if re.search(r"(?i)^(ENV|ARG) .*(token|secret|password|key)", text, re.MULTILINE):
        found.append("secrets stay in an image")
    return "".join(found)


def test_nothing_is_wrong_with_the_file() -> None:
    assert problems(TEXT) == ""


@pytest.mark.parametrize(
    ("good", "bad", "problem"),
    [
        ("python:3.12-slim-bookworm\n\n", "python:latest\n\n", "BASE"),
        ("FROM ${BASE} AS build", "FROM debian AS build", "DL3006"),
        ("FROM ${BASE} AS build", "FROM debian:latest AS build", "DL3007"),
        ("USER 1000\n", "", "USER"),
        ("USER 1000\n", "USER root\n", "USER"),
        ("apt-get install -y", "apt-get install", "DL3014"),
        ("COPY bit_ray bit_ray", "ADD bit_ray bit_ray", "DL3020"),
        ("WORKDIR /src", "WORKDIR src", "DL3000"),
        (" --require-hashes", "", "packages: locked"),
        ("RAY_USAGE_STATS_ENABLED=0", "RAY_AUTH_TOKEN=abc", "secrets"),
        ('CMD ["bit-ray", "--help"]', "CMD bit-ray --help", "DL3025"),
        ("RUN useradd", "RUNN useradd", "missing whitespace"),
    ],
)
def test_a_broken_copy_is_refused(good: str, bad: str, problem: str) -> None:
    assert good in TEXT
    assert problem in problems(TEXT.replace(good, bad, 1))


def in_context(path: str) -> bool:
    """Whether .dockerignore lets a file of the repository into the build: the last line that fits decides."""
    kept = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.lstrip("!").rstrip("/").removeprefix("**/")
            parts = path.split("/")
            starts = range(len(parts)) if "**/" in line else [0]
            tails = ["/".join(parts[first:last]) for first in starts for last in range(first + 1, len(parts) + 1)]
            if any(fnmatch.fnmatchcase(tail, pattern) and tail.count("/") == pattern.count("/") for tail in tails):
                kept = line.startswith("!")
    return kept


def test_what_is_copied_is_in_the_context_and_nothing_that_is_secret_or_large() -> None:
    copied = [
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", TEXT, re.MULTILINE)
        for source in line.split()[:-1]
        if (ROOT / source).is_file()
    ]
    assert sorted(copied) == [
        "LICENSE",
        "README.md",
        "clusters/container/requirements.lock",
        "pyproject.toml",
        "setup.py",
    ]
    package = ["bit_ray/cli/main.py", "bit_ray/data/images/_jpeg.c", "bit_ray/studies/report.html.jinja"]
    assert all((ROOT / path).is_file() and in_context(path) for path in [*copied, *package])
    left_out = [
        ".env",
        ".git/config",
        ".ssh/id_ed25519",
        "bit_ray_runs/x/model.safetensors",
        "photos/1.jpg",
        "notes/.env",
    ]
    assert not any(
        map(in_context, [*left_out, "bit_ray/data/images/_jpeg.cpython-312.so", "bit_ray/__pycache__/a.pyc"])
    )
