import copy
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = ROOT / "bit_ray"

# What may import Ray or MLflow when it is imported. All else, a new module too, must do without.
MAY_IMPORT_RAY_OR_MLFLOW = {
    "bit_ray.autotrain.choice",
    "bit_ray.autotrain.finetune",
    "bit_ray.autotrain.starts",
    "bit_ray.autotrain.train",
    "bit_ray.cli.main",
    "bit_ray.cluster.autoscaler",
    "bit_ray.cluster.launcher",
    "bit_ray.cluster.session",
    "bit_ray.data.stream.bench",
    "bit_ray.data.stream.batches",
    "bit_ray.data.stream.readers",
    *(f"bit_ray.studies.{name}" for name in ("catalog", "compare", "conduct", "findings", "grid", "hosted", "inputs")),
    *(f"bit_ray.studies.{name}" for name in ("display", "engine", "grid_report", "run", "sweep", "tuner")),
    "bit_ray.studies.few_shot",
    "bit_ray.studies.vtab",
    "bit_ray.inference.predict",
    "bit_ray.evaluation.evaluate",
    "bit_ray.evaluation.serving",
    "bit_ray.inference.serving",
    "bit_ray.report.page",
    "bit_ray.report.subject",
    "bit_ray.report.gallery",
    "bit_ray.report.write",
    "bit_ray.tracking.logged",
    "bit_ray.tracking.recorded",
    "bit_ray.tracking.registry",
    "bit_ray.tracking.runs",
    "bit_ray.tracking.sending",
    "bit_ray.tracking.server",
    *(f"bit_ray.submission.{name}" for name in ("all_reduce", "first_step", "follow", "node_checks", "nodes")),
    *(f"bit_ray.submission.{name}" for name in ("preflight", "server", "submit")),
    "bit_ray.training.dry_run",
    "bit_ray.training.checkpoint.probes",
    "bit_ray.training.checkpoint.retention",
    "bit_ray.training.finetune",
    "bit_ray.training.driver",
    "bit_ray.training.worker",
    "bit_ray.training.checks",
    "bit_ray.training.pretrain",
    "bit_ray.training.replay",
    "bit_ray.training.reports",
    "bit_ray.training.room",
    "bit_ray.training.stacks",
    "bit_ray.training.attempts",
    "bit_ray.training.group",
    "bit_ray.training.messages",
    "bit_ray.training.collectives",
    "bit_ray.training.pulse",
    "bit_ray.cluster.seats",
}

# What imports them, itself or by others, only when a function of it is called.
MAY_IMPORT_THEM_WHEN_CALLED = {
    "bit_ray.cli.autotrain",
    "bit_ray.cli.models",
    "bit_ray.cli.planning",
    "bit_ray.cli.runs",
    "bit_ray.cli.shards",
    "bit_ray.cli.shards_write",
    "bit_ray.cli.studies",
    "bit_ray.cli.submission",
    "bit_ray.cli.sweeps",
    "bit_ray.cli.training",
    "bit_ray.cluster.tasks",
    "bit_ray.data.shards.verify",
    "bit_ray.data.shards.write",
    "bit_ray.evaluation.probe",
    "bit_ray.evaluation.rank",
    "bit_ray.inference.features",
    "bit_ray.planning.calibrate",
    "bit_ray.studies.diagnose",
    "bit_ray.studies.vtab_shards",
    "bit_ray.tracking.embedded",
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


def lint_imports() -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_pure_modules_can_be_imported_where_ray_and_mlflow_are_not_installed() -> None:
    pure = modules() - MAY_IMPORT_RAY_OR_MLFLOW
    assert {"bit_ray", "bit_ray.models", "bit_ray.recipes", "bit_ray.training.step"} <= pure
    assert failures_without_ray_and_mlflow(pure) == {}


def test_the_check_sees_an_import_of_ray_and_of_mlflow() -> None:
    failures = failures_without_ray_and_mlflow({"bit_ray.data.stream.batches", "bit_ray.tracking.registry"})
    assert failures == {
        "bit_ray.data.stream.batches": "No module named 'ray'",
        "bit_ray.tracking.registry": "No module named 'mlflow'",
    }


def test_import_arrows_hold() -> None:
    done = lint_imports()
    assert done.returncode == 0, done.stdout[-3000:]
    assert "2 kept, 0 broken" in done.stdout


def test_the_drawing_of_the_house_has_the_arrows_of_the_contracts() -> None:
    house, rooms = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    drawn = (ROOT / "CONTRIBUTING.md").read_text().split("The arrows, held by")[1].split("```")[1]
    arrows, _, in_data = drawn.replace(", ", " | ").partition("data: ")
    assert " ".join(arrows.split()).split(" → ") == house["layers"]
    assert in_data.strip().split(" → ") == rooms["layers"]


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    graph = grimp.build_graph("bit_ray", include_external_packages=True, exclude_type_checking_imports=True)
    # MLflow is asked only for a models:/ URI of a server.
    graph.remove_import(importer="bit_ray.tracking.reference", imported="bit_ray.tracking.registry")
    return graph


def reaching_ray_or_mlflow(graph: grimp.ImportGraph) -> set[str]:
    return {
        module
        for module in modules()
        if any(graph.chain_exists(importer=module, imported=package) for package in ("ray", "mlflow"))
    }


def test_no_other_module_imports_ray_or_mlflow_even_when_it_is_called(graph: grimp.ImportGraph) -> None:
    assert reaching_ray_or_mlflow(graph) == MAY_IMPORT_RAY_OR_MLFLOW | MAY_IMPORT_THEM_WHEN_CALLED


def test_a_breach_is_seen(graph: grimp.ImportGraph) -> None:
    breached = copy.deepcopy(graph)
    breached.add_import(importer="bit_ray.data.stream.order", imported="bit_ray.data.stream.batches")
    assert {"bit_ray.data.stream.order", "bit_ray.training.in_memory"} <= reaching_ray_or_mlflow(breached)


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
