"""The job files: what each says of itself, the main job from shards to predictions, and others on what it has made.

``test_job_submit.py`` runs ``pretrain_jft.py``, ``ground/test_secrets.py`` a whole ``pretrain.py``.
"""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image

import bit_ray
from bit_ray.cli.main import main
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.embedded.glyphs import GlyphSource
from bit_ray.progress import console

pytestmark = pytest.mark.cluster

JOBS = Path(__file__).resolve().parents[3] / "jobs"
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
RULE = ["--rule.resize", "36", "--rule.crop", "32", "--rule.num-steps", "3", "--rule.batch-size", "16"]
# The main job at a tenth of its size.
QUICK = [
    *(
        "--upstream",
        "glyphs:s",
        "--recipe.epochs",
        "0.5",
        "--recipe.decay-epochs",
        "0.25",
        "--recipe.warmup-steps",
        "3",
    ),
    *("--shots", "1", "2", "--scratch-lrs", "0.03", "--rule.num-steps", "8", "--rule.batch-size", "16"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jobs")
    write_shards(GlyphSource("s", examples_per_class=3), folder / "glyphs", name="glyphs", row_group_size=8)
    return folder


@pytest.fixture
def job(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run a job file as ``python jobs/NAME.py ARGUMENTS`` in the folder: exit status, stdout, stderr."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(console, "_width", 200)

    def run(name: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", [str(JOBS / f"{name}.py"), *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(JOBS / f"{name}.py"), run_name="__main__")
        assert isinstance(stop.value.code, int)
        return stop.value.code, *capfd.readouterr()

    return run


@pytest.mark.parametrize("name", sorted(path.stem for path in JOBS.glob("*.py")))
def test_a_job_is_a_docstring_with_its_command_and_one_call(
    name: str, job: Callable[..., tuple[int, str, str]]
) -> None:
    text = (JOBS / f"{name}.py").read_text()
    assert f"python jobs/{name}.py" in text.split('"""')[1]
    status, out, err = job(name, "--help")
    assert (status, err) == (0, "")
    assert out.startswith("usage: python ")


@pytest.mark.parametrize("name", ["pretrain_jft", "pretrain", "finetune", "evaluate"])
def test_the_flags_in_a_jobs_docstring_are_its_own(name: str, job: Callable[..., tuple[int, str, str]]) -> None:
    docstring = (JOBS / f"{name}.py").read_text().split('"""')[1].replace("\\\n", " ")
    known = set(re.findall(r"--[\w.-]+", job(name, "--help")[1]))
    commands = [line for line in docstring.splitlines() if f"python jobs/{name}.py" in line]
    assert commands
    for command in commands:
        given = [word for word in shlex.split(command.partition(".py")[2]) if word.startswith("--")]
        assert given
        assert set(given) <= known


def test_a_dry_run_prints_the_plan_and_leaves_nothing(job: Callable[..., tuple[int, str, str]], folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    status, out, err = job(
        "pretrain_jft", "--name", "dry", "--shards", "glyphs", "--recipe.warmup-steps", "1", "--dry-run"
    )
    assert (status, out) == (2, "pretrain on glyphs (150 images)\n")
    assert err.startswith(
        "error: --recipe.warmup-steps: 1; accepted: 0 to 0, because 40 epochs of 150 images are 1 steps of 4096; lower "
    )

    jft = ["--name", "dry", "--shards", "glyphs", "--recipe.warmup-steps", "0", "--runtime.num-workers", "4"]
    status, out, err = job("pretrain_jft", *jft, "--dry-run")
    assert (status, err) == (0, "")
    shown = " ".join(out.replace("│", " ").split())
    assert re.search(r"model R152x4, 9\d\d,\d{3},\d{3} parameters", shown)
    # 936 million parameters leave this machine's memory little room for images.
    split = re.search(r"4 workers x (\d+) micro-batches x (\d+) images", shown)
    assert split is not None
    assert int(split[1]) * int(split[2]) == 1024
    memory = re.search(r"memory about ([\d.]+) GB for each of 4 workers, (\d+) images at a time", shown)
    assert memory is not None
    assert float(memory[1]) > 936e6 * 3 * 4 / 1e9
    assert memory[2] == split[2]
    assert "512 lanes" in shown
    assert sorted(folder.rglob("*")) == before


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The main job, in processes of its own: the folder that it ran in, stdout, stderr."""
    folder = tmp_path_factory.mktemp("quickstart")
    command = [sys.executable, str(JOBS / "quickstart.py"), *QUICK]
    done = subprocess.run(
        command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=580, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, done.stdout, done.stderr


@pytest.mark.timeout(600)
def test_the_main_job_runs_end_to_end(quickstart: tuple[Path, str, str]) -> None:
    folder, out, err = quickstart
    for table in ("Top-1 on 800 test digits, median of 5 draws", "Predictions from the registry", "Registered", "Time"):
        assert table in out
    assert "Traceback" not in err

    runs = folder / "bit_ray_runs"
    for picture in ("few_shot.png", "predictions.png"):
        with Image.open(runs / picture) as image:
            assert min(image.size) > 300
    for k in (1, 2):
        for seed in range(5):
            index = json.loads((runs / "digits-few-shot" / "subsets" / f"{k}-per-class-seed-{seed}.json").read_text())
            assert len(index["ids"]) == 10 * k
    scores = json.loads((runs / "digits" / "result.json").read_text())["metrics"]
    assert scores["test/num_examples"] == 800
    assert scores["test/top_1"] > 0.5  # chance is 0.1

    # What it says to type next works as it stands, in any folder.
    commands = out.split("Next, for example:\n")[1].split("  mlflow ui")[0]
    assert commands.startswith("  source ")
    environment = {**ENVIRONMENT, "PATH": "/usr/bin:/bin", "COLUMNS": "400"}  # no path in the table is broken
    typed = subprocess.run(
        ["bash", "-e"],
        input=commands,
        cwd="/",
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert typed.returncode == 0, typed.stderr
    assert "digits-test-00000.png" in typed.stdout
    assert "glyphs-s" in typed.stdout


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_started_here")
def test_its_models_are_fine_tuned_evaluated_replayed_listed_pulled_and_asked(
    job: Callable[..., tuple[int, str, str]],
    quickstart: tuple[Path, str, str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = quickstart[0]
    monkeypatch.chdir(folder)
    digits = "bit_ray_runs/shards/digits-test"
    tuned = ["--name", "down", "--init", "models:/glyphs-s@champion", "--shards", digits, "--test-shards", digits]
    tuned += ["--no-random-flip"]
    status, out, err = job("finetune", *tuned, *RULE, "--runtime.num-workers", "1")
    assert (status, err) == (0, "")
    table = dict(row for row in (re.findall(r"[^│]+", line) for line in out.splitlines()) if len(row) == 2)
    table = {name.strip(): value.strip() for name, value in table.items()}
    assert table["registered"] == "models:/down@champion, version 1"
    assert table["num examples"] == "800"
    assert re.search(r"^Pictures: \S+/artifacts/evaluation$", out, re.MULTILINE)
    assert re.search(r"^MLflow:   http://127\.0\.0\.1:5000/#/experiments/\d+/runs/\w{32}$", out, re.MULTILINE)

    status, out, err = job("evaluate", "--model", "models:/down@champion", "--shards", digits)
    assert (status, err) == (0, "")
    for name in ("top 1", "top 5", "cross entropy", "mean per class"):
        assert re.search(rf"│ {name} +│ +{re.escape(table[name])}  \(95 %: \S+ to \S+\) +│", out)

    # The recorded settings, from MLflow and without a flag, are the same run, which is done already.
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/bit_ray_runs/mlflow.db")
    version = client.get_model_version_by_alias("glyphs-s", "champion")
    recorded = client.download_artifacts(version.run_id, "config.json", str(folder))
    assert json.loads(Path(recorded).read_text())["model"] == "R1-1-1-1x0.5"
    status, out, err = job("pretrain", "--config", recorded)
    assert (status, err) == (0, "")
    assert "glyphs-s: already finished, " in out
    assert "models:/glyphs-s@champion, version 1" in out

    assert main(["models", "list"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert re.search(r"│ down +│ +1 │ champion │ R1-1-1-1x0.5 │ +10 │", out)
    assert main(["models", "pull", "models:/down@champion", "--output", "pulled"]) == 0
    assert bit_ray.load_model(folder / "pulled").spec.num_classes == 10

    Image.new("L", (20, 20)).save(folder / "gray.png")
    capfd.readouterr()
    assert main(["predict", "gray.png", "--model", "models:/down@champion", "--top-k", "2", "--convert-images"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    ((name, best),) = bit_ray.load_model(folder / "pulled").predict(folder / "gray.png", top_k=1, convert=True)[0:1][0]
    assert re.search(rf"│ gray.png │ +{name} │ +{best:.1%} │", out)
