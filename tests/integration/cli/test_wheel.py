"""The wheel that ``make wheel`` makes, where no compiler is and no libjpeg."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
DECODE = """
import sys
import numpy, simplejpeg
sys.path.insert(0, sys.argv[1])
from bit_ray.data.images import _jpeg, decode_view
print(_jpeg.__file__)
print(decode_view.FAST_PATH, _jpeg.header(simplejpeg.encode_jpeg(numpy.zeros((20, 30, 3), numpy.uint8)))[:2])
print(sorted({line.split()[-1] for line in open("/proc/self/maps") if "bit_ray.libs/" in line}))
"""


@pytest.mark.usefixtures("extension")  # there is a compiler
def test_the_wheel_decodes_jpeg_files_with_what_is_inside(tmp_path: Path) -> None:
    tree, installed = tmp_path / "tree", tmp_path / "installed"
    for name in ("bit_ray", "pyproject.toml", "setup.py", "LICENSE", "README.md", "Makefile"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        tree.mkdir(exist_ok=True)
        copy(ROOT / name, tree / name)
    for built in tree.rglob("*.so"):
        built.unlink()
    venv = Path(sys.prefix)
    done = subprocess.run(
        ["make", "-o", f"{venv}/.installed-dev", "wheel", f"VENV={venv}"], cwd=tree, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = (tree / "dist").iterdir()
    assert "manylinux" in wheel.name
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(installed), str(wheel)]
    subprocess.run(pip, check=True, cwd=tmp_path)
    [licence] = installed.rglob("LICENSE")
    assert licence.read_text() == (ROOT / "LICENSE").read_text()
    templates = sorted(str(path.relative_to(tree)) for path in (tree / "bit_ray").rglob("*.jinja"))
    assert len(templates) == 4
    assert all((installed / template).is_file() for template in templates)
    environment = {**os.environ, "PATH": "", "PYTHONPATH": ""}
    out = subprocess.run(
        [sys.executable, "-c", DECODE, str(installed)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert out[0].startswith(str(installed))
    assert out[1] == "True (20, 30)"
    assert out[2].startswith(f"['{installed}/bit_ray.libs/libjpeg")
