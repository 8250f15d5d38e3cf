"""What may unpickle, or run a program from a file: only what docs/security.md lists; and what it names is there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
# Calls that build objects of any class from bytes, unless they are told not to.
UNPICKLE = re.compile(
    r"([\w.]*\.)?(pickle|_pickle|cloudpickle|dill|joblib|marshal|shelve)\.(load|loads|open|Unpickler)"
    r"|(torch|torch\.(jit|export|package|hub)|numpy|mlflow(\.\w+)*)\.load\w*"
    r"|numpy\.lib\.format\.read_array|pandas\.read_pickle|yaml\.(load|full_load|unsafe_load)(_all)?"
    r"|([\w.]+\.)?(all_gather|gather|broadcast|scatter|recv)_object(_list)?"
)


def calls(source):
    """The calls in a program that unpickle, with the names that its imports give."""
    tree = ast.parse(source)
    named = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            named |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            named |= {alias.asname: alias.name for alias in node.names if alias.asname}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        first, dot, rest = ast.unparse(node.func).partition(".")
        name = named.get(first, first) + dot + rest
        if UNPICKLE.fullmatch(name):
            yield name, {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}


@pytest.mark.parametrize(
    ("program", "name"),
    [
        ("import pickle\npickle.loads(b'')", "pickle.loads"),
        ("from pickle import loads\nloads(b'')", "pickle.loads"),
        ("from ray import cloudpickle as c\nc.load(file)", "ray.cloudpickle.load"),
        ("import torch as t\nt.load('x')", "torch.load"),
        ("import numpy as np\nnp.load('x', allow_pickle=True)", "numpy.load"),
        ("import torch.distributed as dist\ndist.all_gather_object([], 1)", "torch.distributed.all_gather_object"),
    ],
)
def test_a_call_that_unpickles_is_found(program, name):
    assert name in [found for found, _ in calls(program)]


def test_what_unpickles_is_listed_with_its_guard():
    text = (ROOT / "docs" / "security.md").read_text()
    listed = set(re.findall(r"^\| `([\w./]+\.py)`: `([\w.]+)\((.*?)\)` \|", text, re.MULTILINE))
    guards = {("weights_only", "True"), ("allow_pickle", "False")}
    found = set()
    for top in ("bit_ray", "jobs", "clusters"):
        for path in (ROOT / top).rglob("*.py"):
            for name, options in calls(path.read_text()):
                guard = next((f"{k}={v}" for k, v in options.items() if (k, v) in guards), "")
                found.add((str(path.relative_to(ROOT / "bit_ray" if top == "bit_ray" else ROOT)), name, guard))
    assert found == listed


def test_what_the_page_on_security_names_is_there():
    text = (ROOT / "docs" / "security.md").read_text()
    tests = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    kinds = {path.stem for path in (ROOT / "tests" / "fuzz" / "kinds").glob("*.py")}
    assert set(re.findall(r"`(test_\w+)`", text)) <= tests
    assert set(re.findall(r"\| `((?!test_)\w+)` \|$", text, re.MULTILINE)) == kinds
    tried = text.partition("| kind | tried |")[2]
    assert set(re.findall(r"^\| (\w+) \| [\d,]+ \|", tried, re.MULTILINE)) == kinds
    files = set(re.findall(r"`([\w/]+\.(?:py|c))`", text))
    assert files
    assert [file for file in files if not any((ROOT / "bit_ray" / room / file).exists() for room in ("", "data"))] == []
