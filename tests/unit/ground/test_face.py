import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bit_ray

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_every_public_name_is_there_and_is_listed():
    assert set(bit_ray.__all__) == set(bit_ray._HOMES)
    for name in bit_ray.__all__:
        assert getattr(bit_ray, name).__name__ == name
    assert set(bit_ray.__all__) <= set(dir(bit_ray))
    with pytest.raises(AttributeError, match="'bit_ray' has no attribute 'nothing'"):
        bit_ray.nothing  # noqa: B018


def test_importing_the_package_loads_nothing_heavy():
    heavy = ("ray", "mlflow", "torch", "pyarrow", "numpy", "PIL")
    code = f"import bit_ray, json, sys; print(json.dumps([name for name in {heavy} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_for_users_need_only_public_names(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bit_ray"):
                assert node.module == "bit_ray"
                assert {alias.name for alias in node.names} <= set(bit_ray.__all__)
            elif isinstance(node, ast.Import):
                assert not any(alias.name.startswith("bit_ray.") for alias in node.names)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "bit_ray":
                assert node.attr in bit_ray.__all__


def test_python_appears_on_the_pages():
    assert sum(page.read_text().count("```python") for page in PAGES) > 6
