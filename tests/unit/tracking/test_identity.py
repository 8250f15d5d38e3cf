import shutil
import subprocess
import sys
from pathlib import Path

import bit_ray

PACKAGE = Path(bit_ray.__file__).parent


def revision(directory: Path) -> str:
    """The code revision that a fresh process finds for the copy of the package in ``directory``."""
    code = "from bit_ray.tracking.identity import code_revision; print(code_revision())"
    command = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(directory)!r}); {code}"]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=directory).stdout.strip()


def copy_package(directory: Path) -> Path:
    for name in ("__init__.py", "tracking/__init__.py", "tracking/identity.py"):
        (directory / "bit_ray" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PACKAGE / name, directory / "bit_ray" / name)
    return directory


def git(directory: Path, *arguments: str) -> str:
    command = ["git", "-C", str(directory), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_a_work_tree_gives_the_commit_and_says_when_it_was_changed(tmp_path: Path):
    copy_package(tmp_path)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "all")
    commit = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / ".git" / "info" / "exclude").write_text("__pycache__\n")
    (tmp_path / "results.txt").write_text("beside the package")
    assert revision(tmp_path) == commit
    (tmp_path / "bit_ray" / "progress.py").write_text("# new\n")
    assert revision(tmp_path) == f"{commit}-dirty"


def test_without_git_the_revision_follows_the_source(tmp_path: Path):
    copy_package(tmp_path)
    before = revision(tmp_path)
    assert before.startswith(f"{bit_ray.__version__}+src.")
    assert revision(tmp_path) == before
    (tmp_path / "bit_ray" / "progress.py").write_text("# new\n")
    assert revision(tmp_path) != before


def test_an_installation_below_another_work_tree_is_not_that_revision(tmp_path: Path):
    git(tmp_path, "init", "-q")
    (tmp_path / "own.txt").write_text("x")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "own")
    copy_package(tmp_path / "site-packages")
    assert revision(tmp_path / "site-packages").startswith(f"{bit_ray.__version__}+src.")
