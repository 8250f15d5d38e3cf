"""A path or a name that is wrong is said before PyTorch, Ray or MLflow is imported."""

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.base import Example

# Any import of what takes seconds ends the program with a traceback.
PROGRAM = """
import sys
class Refused:
    def find_spec(self, name, path=None, target=None):
        assert name not in ("torch", "ray", "mlflow", "pandas"), f"{name} was imported"
sys.meta_path.insert(0, Refused())
from bit_ray.cli.main import main
for line in sys.stdin:
    print("status", main(line.split()), flush=True)
"""

WRONG = {
    "finetune --name a --init absent --shards shards": "absent: no such directory; accepted: a saved model",
    "finetune --name a --init absent.npz --shards shards": "absent.npz: no such file; accepted: BiT weights",
    "finetune --name a --init BiT-M-R50x1.npz --shards shards": "or give the name bit_m_r50x1: it is fetched then",
    "finetune --name a --init bit_m_r50x --shards shards": "did you mean bit_m_r50x",
    "finetune --name a --init models:/photos --shards shards": "mlflow.db: no such file",
    "finetune --name a --init . --shards shards --test-shards absent": "absent: no such path",
    "train . --init absent": "absent: no such directory; accepted: a saved model",
    "train . --init bit_m_r50x": "did you mean bit_m_r50x",
    "train . --init models:/photos@champion": "mlflow.db: no such file",
    "train absent": "absent: no such folder",
    "pretrain --name a --shards absent": "absent: no such path",
    "evaluate --model absent --shards shards": "absent: no such directory",
    "evaluate --model models:/photos --shards absent": "absent: no such path",
    "fewshot --name a --init absent --shards shards --test-shards shards": "absent: no such directory",
    "vtab --name a --init absent": "absent: no such directory",
    "study run recipe --set shards=absent": "absent: no such path",
    "study run recipe --set init=absent": "absent: no such directory",
    "study run decay": "STUDY: decay; accepted: weight-decay, ",
    "study run schedule --axes length=0 --val-shards absent": "absent: no such path",
    "study compare --init absent --tasks shards,shards": "absent: no such directory",
    "study compare --init . --tasks shards,absent,5": "absent: no such path",
    "study report absent": "there is no bit_ray_runs/mlflow.db; accepted: the server, or sqlite:///FILE, that has the",
    "sweep finetune --name a --set shards=absent init=. --space seed=1": "--space: seed; accepted: another setting",
    "sweep finetune --name a --set shards=absent init=. --space rule.dropout=0,1": "absent: no such path",
    "sweep pretrain --name a --set recipe.epochs=1 --space recipe.epochs=1,2": "--set: without shards",
    "runs diagnose absent": "RUN: absent; accepted: the name of a run in bit_ray_runs",
    "status absent": "absent",
    "probe absent shards shards": "absent: no such directory",
    "episodes absent shards": "absent: no such directory",
    "predict absent.jpg --model .": "absent.jpg: no such file; accepted: image files",
    "predict a.jpg b.jpg --model .": "a.jpg: no such file, nor the 1 others",
    "predict absent.jpg --model models:/photos": "mlflow.db: no such file",
    "predict . --output a.csv --model absent": "absent: no such directory",
    "models list": "set the storage to the bit_ray_runs folder that has it",
    "models pull models:/photos --output a": "mlflow.db: no such file",
    "report absent": "absent: no such directory; accepted: a saved model",
    "report models:/photos": "mlflow.db: no such file",
    "demo absent.npz": "absent.npz: no such file; accepted: BiT weights",
    "demo models:/photos@champion": "mlflow.db: no such file",
    "models export absent --output a.onnx --format onnx": "absent: no such directory",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where commands are started, with a shard set."""
    folder: Path = tmp_path_factory.mktemp("first")
    gray = b"P6 8 8 255\n" + bytes(192)
    write_shards(
        [Example(id=str(i), image=gray, labels=(i % 2,)) for i in range(4)],
        str(folder / "shards"),
        name="few",
        class_names=("a", "b"),
    )
    return folder


def program(lines: Iterable[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Carry out commands one after the other in one process."""
    return subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input="".join(f"{line}\n" for line in lines),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def answers(folder) -> dict[str, tuple[str, str]]:
    """Command -> exit status and error, all of one process."""
    done = program(WRONG, folder)
    statuses, errors = re.findall(r"^status (.*)$", done.stdout, re.MULTILINE), done.stderr.splitlines()
    assert done.returncode == 0, done.stderr
    return dict(zip(WRONG, zip(statuses, errors, strict=True), strict=True))


def test_studies_are_listed_without_what_takes_seconds(folder):
    done = program(["study list", "models known"], folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("status 0") == 2
    assert "rule.mixup_alpha: 0, 0.1" in done.stdout


def test_nothing_that_only_reads_makes_a_folder(answers, folder):
    assert [path.name for path in folder.iterdir()] == ["shards"]


@pytest.mark.parametrize("line", WRONG)
def test_what_is_not_there_is_said_at_once(line: str, answers) -> None:
    status, error = answers[line]
    assert status == "2"
    assert error.startswith("error: ")
    assert WRONG[line] in error
