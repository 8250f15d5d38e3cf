"""The lock file of the images: every package that is needed, in a version that fits, by hashes and from no place."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[3]
LOCK = (ROOT / "clusters/container/requirements.lock").read_text()
NEEDED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


def problems(lock: str, needed: list[str] = NEEDED) -> list[str]:
    """Return what is wrong with a lock file; requirements of requirements are those of what is installed here."""
    found, locked = [], {}
    for entry in re.sub(r"\\\n\s*", " ", lock).splitlines():
        if re.search(r"://|^\s*-| @ ", entry):
            found.append(f"a place: {entry[:60]}")
            continue
        try:
            requirement = Requirement(re.split(r"\s--hash", entry)[0].strip())
        except InvalidRequirement:
            found.append(f"no requirement: {entry[:60]}")
            continue
        hashes = re.findall(r"--hash=(\S+)", entry)
        if not hashes or not all(re.fullmatch(r"sha256:[0-9a-f]{64}", each) for each in hashes):
            found.append(f"no hashes: {requirement.name}")
        if not re.fullmatch(r"==[^*,]+", str(requirement.specifier)):
            found.append(f"no single version: {requirement.name}")
        elif requirement.marker is None or requirement.marker.evaluate():
            locked[canonicalize_name(requirement.name)] = str(requirement.specifier)[2:]
    pending, seen = [("pyproject.toml", text, "") for text in needed], set()
    while pending:
        parent, text, extra = pending.pop()
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        if name not in locked:
            found.append(f"missing: {name}, for {parent}")
            continue
        if not requirement.specifier.contains(Version(locked[name]), prereleases=True):
            found.append(f"{name} {locked[name]} does not fit {parent}, which needs {requirement.specifier}")
        for wanted in {"", *requirement.extras} - {extra for other, extra in seen if other == name}:
            seen.add((name, wanted))
            try:
                installed = distribution(name)
            except PackageNotFoundError:
                continue
            if installed.version == locked[name]:
                pending += [(name, each, wanted) for each in installed.requires or []]
    return sorted(set(found))


def test_the_lock_has_what_the_project_needs():
    assert problems(LOCK) == []
    names = set(re.findall(r"^([a-z0-9-]+)==", LOCK, re.MULTILINE))
    assert {"torch", "nvidia-cublas", "triton", "ray", "mlflow", "pyarrow"} <= names  # torch is that with CUDA
    assert "+cpu" not in LOCK


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda lock: re.sub(r"^torch==.*?\n(?=\S)", "", lock, flags=re.M | re.S), "missing: torch, for "),
        (lambda lock: re.sub(r"^click==.*?\n(?=\S)", "", lock, flags=re.M | re.S), "missing: click, for "),
        (lambda lock: re.sub(r"^ray==\S+", "ray==2.40.0", lock, flags=re.M), "ray 2.40.0 does not fit pyproject.toml"),
        (
            lambda lock: re.sub(r"^(xxhash==\S+ \\\n).*?\n(?=\S)", r"xxhash==4.1.0\n", lock, flags=re.M | re.S),
            "no hash",
        ),
        (lambda lock: lock.replace("sha256:", "md5:", 1), "no hashes: aio"),
        (lambda lock: re.sub(r"^ray==\S+", "ray>=2.60", lock, flags=re.M), "no single version: ray"),
        (lambda lock: "--index-url https://somewhere/simple\n" + lock, "a place: --index-url"),
        (lambda lock: lock + "evil @ https://somewhere/evil.whl\n", "a place: evil @"),
    ],
)
def test_a_lock_that_lacks_something_is_found_out(change, problem):
    changed = change(LOCK)
    assert changed != LOCK
    assert any(found.startswith(problem) for found in problems(changed)), problems(changed)
