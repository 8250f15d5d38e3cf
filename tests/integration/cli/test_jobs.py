"""The job files, each as its docstring says and at a laptop's size, on the Ray of this process."""

import json
import os
import re
import runpy
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

import bit_ray
from bit_ray.cli.main import main
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.embedded.glyphs import GlyphSource
from bit_ray.progress import console

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_local")]

JOBS = Path(__file__).resolve().parents[3] / "jobs"
SMALL = [
    *("--model", "R1-1-1-1x0.5", "--recipe.epochs", "1", "--recipe.decay-epochs", "0.5", "--recipe.warmup-steps", "2"),
    *("--recipe.global-batch-size", "30", "--recipe.crop-size", "32", "--runtime.num-workers", "1"),
]
RULE = [
    "--rule.resize",
    "36",
    "--rule.crop",
    "32",
    "--rule.num-steps",
    "3",
    "--rule.batch-size",
    "16",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jobs")
    write_shards(GlyphSource("s", examples_per_class=3), folder / "glyphs", name="glyphs", row_group_size=8)
    write_shards("digits:test", folder / "digits", name="digits")
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

    jft = [
        "--name",
        "dry",
        "--shards",
        "glyphs",
        "--recipe.warmup-steps",
        "0",
        "--runtime.num-workers",
        "4",
        "--dry-run",
    ]
    status, out, err = job("pretrain_jft", *jft)
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


@pytest.mark.timeout(500)
def test_pretrain_finetune_evaluate_predict_and_replay(
    job: Callable[..., tuple[int, str, str]], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    status, out, err = job("pretrain_jft", "--name", "up", "--shards", "glyphs", *SMALL)
    assert (status, err) == (0, "")
    assert "up: step 5/5" in out
    assert "models:/up@champion, version 1" in out

    tuned = [
        "--name",
        "down",
        "--init",
        "models:/up@champion",
        "--shards",
        "digits",
        "--test-shards",
        "digits",
        "--no-random-flip",
    ]
    status, out, err = job("finetune", *tuned, *RULE, "--runtime.num-workers", "1")
    assert (status, err) == (0, "")
    table = dict(row for row in (re.findall(r"[^│]+", line) for line in out.splitlines()) if len(row) == 2)
    table = {name.strip(): value.strip() for name, value in table.items()}
    assert table["registered"] == "models:/down@champion, version 1"
    assert table["num examples"] == "800"

    status, out, err = job("evaluate", "--model", "models:/down@champion", "--shards", "digits")
    assert (status, err) == (0, "")
    for name in ("top 1", "top 5", "cross entropy", "mean per class"):
        assert re.search(rf"│ {name} +│ +{re.escape(table[name])}  \(95 %: \S+ to \S+\) +│", out)

    # The recorded settings, from MLflow and without a flag, are the same run, which is done already.
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/bit_ray_runs/mlflow.db")
    version = client.get_model_version_by_alias("up", "champion")
    recorded = client.download_artifacts(version.run_id, "config.json", str(folder))
    assert json.loads(Path(recorded).read_text())["model"] == "R1-1-1-1x0.5"
    status, out, err = job("pretrain", "--config", recorded)
    assert (status, err) == (0, "")
    assert "up: already finished, " in out
    assert "models:/up@champion, version 1" in out

    assert main(["models", "list"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert re.search(r"│ down │ +1 │ champion │ R1-1-1-1x0.5 │ +10 │", out)
    assert main(["models", "pull", "models:/down@champion", "--output", "pulled"]) == 0
    assert bit_ray.load_model(folder / "pulled").spec.num_classes == 10

    from PIL import Image

    Image.new("L", (20, 20)).save(folder / "gray.png")
    capfd.readouterr()
    assert main(["predict", "gray.png", "--model", "models:/down@champion", "--top-k", "2", "--convert"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    ((name, best),) = bit_ray.load_model(folder / "pulled").predict(folder / "gray.png", top_k=1, convert=True)[0:1][0]
    assert re.search(rf"│ gray.png │ +{name} │ +{best:.1%} │", out)


@pytest.mark.timeout(500)
def test_ctrl_c_and_sigterm_end_a_run_with_one_line_a_checkpoint_and_no_process(folder: Path, tmp_path: Path) -> None:
    command = [
        str(Path(sys.executable).with_name("bit-ray")),
        "pretrain",
        "--name",
        "stopped",
        "--shards",
        str(folder / "glyphs"),
    ]
    endless = [*SMALL, "--recipe.epochs", "100000", "--runtime.log-every-steps", "5"]
    saved = 0
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        out, err = tmp_path / "out.txt", tmp_path / "err.txt"
        with out.open("w") as stdout, err.open("w") as stderr:
            process = psutil.Popen(
                [*command, *endless], cwd=tmp_path, stdout=stdout, stderr=stderr, start_new_session=True
            )
        try:
            while not any(int(step) > saved for step in re.findall(r"step (\d+)/", out.read_text())):
                assert process.poll() is None, err.read_text()
                time.sleep(0.2)
            started = process.children(recursive=True)
            commands = [" ".join(each.cmdline()) for each in started if each.is_running()]
            if number == signal.SIGINT:
                os.killpg(process.pid, number)  # as a terminal does
            else:
                process.send_signal(number)
            assert process.wait(60) == status
        finally:
            if process.is_running():
                process.kill()
        [last] = re.findall(r"^stopped: saved after step (\d+); start it again to go on\n$", err.read_text())
        text = out.read_text()
        assert "Traceback" not in text
        assert "stopped: saving at the next step; once more ends it at once" in text
        if saved:
            assert f"from step {saved}: " in text
            assert "no step lost (the run was started again)" in text
        assert int(last) > saved
        saved = int(last)
        assert (tmp_path / "bit_ray_runs" / "stopped" / f"step-{saved:08d}" / "training.json").exists()
        assert len(started) > 5
        assert any("RayTrainWorker" in command for command in commands)
        assert not any("PreemptionWatcher" in command for command in commands)
        assert psutil.wait_procs(started, timeout=20)[1] == []
