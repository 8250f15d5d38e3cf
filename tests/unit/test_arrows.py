import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "bit_ray"

# What may import Ray or MLflow when it is imported. All else, a new module too, must do without.
MAY_IMPORT_RAY_OR_MLFLOW = {
    "bit_ray.cli",
    "bit_ray.cluster",
    "bit_ray.data.bench",
    "bit_ray.data.stream",
    "bit_ray.studies.few_shot",
    "bit_ray.studies.vtab",
    "bit_ray.evaluation.predict",
    "bit_ray.evaluation.features",
    "bit_ray.evaluation.probing",
    "bit_ray.evaluation.rank",
    "bit_ray.evaluation.run",
    "bit_ray.evaluation.serving",
    "bit_ray.tracking.fetch",
    "bit_ray.tracking.reference",
    "bit_ray.tracking.registry",
    "bit_ray.tracking.runs",
    "bit_ray.tracking.sending",
    "bit_ray.tracking.server",
    "bit_ray.training.dry_run",
    "bit_ray.training.checkpoint_probes",
    "bit_ray.training.finetune",
    "bit_ray.training.launch",
    "bit_ray.training.loop",
    "bit_ray.training.preflight",
    "bit_ray.training.pretrain",
    "bit_ray.training.replay",
    "bit_ray.training.reports",
}

IMPORT_EACH = """
import importlib, json, sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in ("ray", "mlflow") else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
failures = {}
for name in json.loads(sys.argv[1]):
    try:
        importlib.import_module(name)
    except ImportError as error:
        failures[name] = str(error)
print(json.dumps(failures))
"""


def modules() -> set[str]:
    paths = [path.relative_to(ROOT).with_suffix("") for path in PACKAGE.rglob("*.py")]
    return {".".join(path.parts).removesuffix(".__init__") for path in paths}


def run_python(*arguments: str) -> str:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    ).stdout


def failures_without_ray_and_mlflow(names: set[str]) -> dict[str, str]:
    failures: dict[str, str] = json.loads(run_python("-c", IMPORT_EACH, json.dumps(sorted(names))))
    return failures


def lint_imports(config: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--config", str(config)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_pure_modules_can_be_imported_where_ray_and_mlflow_are_not_installed() -> None:
    pure = modules() - MAY_IMPORT_RAY_OR_MLFLOW
    assert {"bit_ray", "bit_ray.models", "bit_ray.recipes", "bit_ray.training.step"} <= pure
    assert failures_without_ray_and_mlflow(pure) == {}


def test_the_check_sees_an_import_of_ray_and_of_mlflow() -> None:
    failures = failures_without_ray_and_mlflow({"bit_ray.data.stream", "bit_ray.tracking.registry"})
    assert failures == {
        "bit_ray.data.stream": "No module named 'ray'",
        "bit_ray.tracking.registry": "No module named 'mlflow'",
    }


def test_import_arrows_hold() -> None:
    done = lint_imports(ROOT / "pyproject.toml")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "2 kept, 0 broken" in done.stdout


def test_import_arrows_see_a_breach(tmp_path: Path) -> None:
    breach = "[importlinter]\nroot_package = bit_ray\ninclude_external_packages = true\n[importlinter:contract:1]\n"
    breach += "name = breach\ntype = forbidden\nsource_modules = bit_ray.data.stream\nforbidden_modules = ray\n"
    (tmp_path / "config.ini").write_text(breach)
    done = lint_imports(tmp_path / "config.ini")
    assert done.returncode == 1
    assert "bit_ray.data.stream is not allowed to import ray" in done.stdout


def test_the_contract_of_pure_modules_lists_no_module_that_may_import_ray() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = config["tool"]["importlinter"]["contracts"]
    pure = set(next(contract for contract in contracts if contract["type"] == "forbidden")["source_modules"])
    assert pure <= modules() - MAY_IMPORT_RAY_OR_MLFLOW


def test_import_bit_ray_loads_neither_torch_nor_ray_nor_mlflow() -> None:
    loaded = run_python("-c", "import sys, bit_ray; print(*sorted(sys.modules))").split()
    assert "bit_ray" in loaded
    assert {"torch", "numpy", "ray", "mlflow", "yaml"}.isdisjoint(loaded)


@pytest.mark.parametrize("name", ["bit_ray.models", "bit_ray.recipes", "bit_ray.training.step"])
def test_what_runs_with_pytorch_alone_loads_neither_ray_nor_mlflow(name: str) -> None:
    loaded = run_python("-c", f"import sys, {name}; print(*sorted(sys.modules))").split()
    assert name in loaded
    assert {"ray", "mlflow"}.isdisjoint(loaded)


def test_package_files_are_empty() -> None:
    full = [path for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE and path.read_text().strip()]
    assert full == []
