from pathlib import Path

from bit_ray.run_folder import RunFolder
from bit_ray.run_records import Start


def start(first_step: int, precision: str = "fp32") -> Start:
    assert precision in ("fp32", "bf16")
    return Start(first_step=first_step, device="cpu", precision=precision, num_workers=2, micro_batch_size=8)


def test_a_folder_has_the_same_name_from_any_directory(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = RunFolder.of("runs", "a")
    monkeypatch.chdir("/")
    assert folder.plan == f"{tmp_path}/runs/a/plan.json"
    assert folder.score("svhn") == f"{tmp_path}/runs/a/scores/svhn.json"


def test_checkpoints_are_those_that_hold_the_file(tmp_path: Path):
    folder = RunFolder(str(tmp_path))
    for name in ("step-00000020", "step-00000005", "nonfinite-step-00000007", "step-5"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "training.json").touch()
    Path(folder.checkpoint(30)).mkdir()
    assert folder.checkpoints("training.json") == [5, 20]
    assert Path(folder.nonfinite(7)).is_dir()


def test_a_start_replaces_those_whose_steps_were_lost(tmp_path: Path):
    folder = RunFolder(str(tmp_path))
    assert folder.starts() == ()
    for first_step in (0, 10, 20):
        folder.record_start(start(first_step))
    folder.record_start(start(10, "bf16"))
    assert [(known.first_step, known.precision) for known in folder.starts()] == [(0, "fp32"), (10, "bf16")]
