"""Prometheus's own checks of the files in ``clusters/``; test_job_submit.py has them find the metrics of a run."""

import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.prometheus
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for file in ("clusters/prometheus.yml", "clusters/alerts.yml", "tests/assets/alerts_test.yml"):
        shutil.copy(ROOT / file, tmp_path)
    (tmp_path / "auth_token").write_text("token\n")
    return tmp_path


def promtool(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def test_the_configuration_is_valid_and_a_broken_copy_is_not(folder: Path) -> None:
    done = promtool(folder, "check", "config", "prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 rules found" in done.stdout
    change(folder / "prometheus.yml", "http_sd_configs", "http_sd_config")
    assert promtool(folder, "check", "config", "prometheus.yml").returncode != 0


def test_the_rules_are_valid_and_a_broken_copy_is_not(folder: Path) -> None:
    done = promtool(folder, "check", "rules", "alerts.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    change(folder / "alerts.yml", "max by (run) (", "max by run (")
    assert promtool(folder, "check", "rules", "alerts.yml").returncode != 0


def test_the_alerts_fire_when_they_should(folder: Path) -> None:
    done = promtool(folder, "test", "rules", "alerts_test.yml")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("still_s) > 300", "still_s) > 1300"),
        ("run_workers) > 0", "run_workers) >= 0"),
        ("goodput) < 0.8", "goodput) < 0.4"),
        ("bad_images) > 0", "bad_images) > 5"),
        ("age_s) > 1800", "age_s) > 100"),
        ("max by (ip)", "min by (ip)"),
    ],
)
def test_a_changed_alert_is_noticed(folder: Path, old: str, new: str) -> None:
    change(folder / "alerts.yml", old, new)
    assert "FAILED" in promtool(folder, "test", "rules", "alerts_test.yml").stderr
