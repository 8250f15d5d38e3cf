import json
import re
import subprocess
import sys
import time

import pytest

from bit_ray.claim import claimed_run
from bit_ray.cli.main import main
from bit_ray.errors import BitRayError, ModelError
from bit_ray.progress import console
from bit_ray.training.status import run_status, run_statuses

PLAN = {"kind": "pretrain", "model": "R50x1", "schedule": {"num_steps": 1000, "base_lr": 0.1}}
ATTEMPT = {
    "number": 1, "why": "the run begins", "num_workers": 4, "shares": [8, 8, 8, 8], "micro_batch_size": 8,
    "first_step": 0, "steps_lost": 0, "ended": "left", "last_step": 400, "waited_s": 0.0, "starting_s": 10.0,
    "productive_s": 80.0, "replayed_s": 0.0, "wall_s": 100.0,
}  # fmt: skip

NOW = {
    "unix_s": 1.79e9, "step": 410, "num_steps": 1000, "attempt": 2, "num_workers": 3, "num_workers_wanted": 4,
    "goodput": 0.8, "still_s": 7.0, "checkpoint_age_s": 20.0,
    "metrics": {"train/loss": 2.5, "speed/images_per_s": 900.0},
    "workers": [{"rank": 2, "host": "10.0.0.7", "step": 409, "phase": "waiting for data", "seconds": 6.5}],
}  # fmt: skip


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture
def storage(tmp_path):
    for name in ("jft", "done"):
        write(tmp_path / name / "plan.json", {"digest": "0" * 64, "shards": "s3://b/jft", "plan": PLAN})
    write(
        tmp_path / "jft" / "attempts.json", {"attempts": [ATTEMPT, ATTEMPT | {"number": 2, "why": "a node was lost"}]}
    )
    write(tmp_path / "jft" / "now.json", NOW)
    write(tmp_path / "jft" / "step-00000300" / "training.json", {})
    write(tmp_path / "jft" / "step-00000400" / "training.json", {})
    (tmp_path / "jft" / "step-00000500").mkdir()  # without its mark: not complete
    write(tmp_path / "done" / "step-00001000" / "training.json", {})
    write(tmp_path / "done" / "result.json", {})
    write(tmp_path / "mlruns" / "meta.json", {})
    return tmp_path


def test_where_a_run_stands_is_read_from_its_folder_alone(storage):
    status = run_status(str(storage), "jft")
    assert (status.state, status.saved_step, status.num_steps, status.model) == ("stopped", 400, 1000, "R50x1")
    assert status.step == 410  # its checkpoint is older
    assert status.goodput == pytest.approx(0.8)
    with claimed_run(str(storage), "jft"):
        status = run_status(str(storage), "jft")
        assert status.state == "running"
        assert status.holder.startswith("PID ")
    assert run_status(str(storage), "jft").state == "stopped"
    assert run_status(str(storage), "done").state == "finished"


def test_a_damaged_run_does_not_hide_the_others(storage):
    write(storage / "odd" / "plan.json", {"digest": "0" * 64, "shards": "s", "plan": {"kind": 3, "schedule": "long"}})
    found, damaged = run_statuses(str(storage))
    assert [run.name for run in found] == ["done", "jft"]
    [line] = damaged
    assert line.startswith(f"{storage}/odd/plan.json: plan: ")
    with pytest.raises(ModelError, match="no plan.json in it"):
        run_status(str(storage), "mlruns")
    with pytest.raises(BitRayError, match="^storage: .*/nothing has no runs; accepted: the folder of all runs"):
        run_statuses(str(storage / "nothing"))


def test_the_command_prints_all_runs_or_the_attempts_of_one(storage, capsys, monkeypatch):
    monkeypatch.setattr(console, "_width", 200)
    assert main(["status", "--storage", str(storage)]) == 0
    text = capsys.readouterr().out
    assert [line.split("\u2502")[1].strip() for line in text.splitlines() if line.startswith("\u2502")] == [
        "done",
        "jft",
    ]
    assert "410/1,000" in text
    assert "80%" in text
    why = "the loss was 9.1, where at most 3.5 is ordinary"
    write(storage / "jft" / "left_out.json", {"batches": [{"step": 1234, "why": why, "images": ["a", "b"]}]})
    assert main(["status", "jft", "--storage", str(storage)]) == 0
    text = capsys.readouterr().out
    assert re.search(rf"1,234 +\u2502 +2 +\u2502 {why}", text)
    assert text.startswith("jft: stopped, pretrain of R50x1, step 410 of 1,000, saved after 400\n")
    assert "a node was lost" in text
    assert "goodput 80%: 160 s of new steps in 200 s; 2 attempts" in text
    assert "slowest" not in text  # it does not run
    with claimed_run(str(storage), "jft"):
        assert main(["status", "jft", "--storage", str(storage)]) == 0
    text = capsys.readouterr().out
    facts = r"\d+ s ago: attempt 2, 3 of 4 workers, loss 2\.5000, images/s 900, last step 7 s before, goodput 80%"
    assert re.search(facts, text)
    assert "slowest: worker 2 on 10.0.0.7, at step 409, waiting for data, for 6.5 s\n" in text
    assert "warning: its driver does not say any more where it is" in text
    write(storage / "jft" / "now.json", NOW | {"unix_s": time.time()})
    with claimed_run(str(storage), "jft"):
        assert main(["status", "jft", "--storage", str(storage)]) == 0
    assert "warning" not in capsys.readouterr().out
    assert main(["status", "a/b", "--storage", str(storage)]) == 2
    assert capsys.readouterr().err.startswith("error: RUN: given 'a/b'; accepted: text that can name a folder")


def test_it_answers_without_torch_ray_and_mlflow(storage):
    program = "import sys; from bit_ray.cli.main import main; print(main(sys.argv[1:])); print(*sorted(sys.modules))"
    command = [
        sys.executable,
        "-c",
        program,
        "status",
        "jft",
        "--storage",
        str(storage),
        "--address",
        "http://127.0.0.1:9",
    ]
    *text, loaded = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    assert text[0].startswith("jft: stopped")
    assert text[-1] == "0"
    assert "bit_ray.cluster.dashboard" in loaded.split()
    assert {"torch", "ray", "mlflow"}.isdisjoint(loaded.split())
