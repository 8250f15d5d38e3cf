"""Which code is running: one line of the identity that every checkpoint, run and registry version carries."""

import hashlib
import os
import subprocess
from functools import cache
from pathlib import Path

import bit_ray
from bit_ray.errors import ConfigError

SUBMITTED_CODE = "BIT_RAY_CODE"
"""Environment variable of a submitted job: the `code_digest` of the machine that it was submitted from."""


@cache
def code_revision() -> str:
    """Return the git commit of this package, with ``-dirty`` where its files differ from it.

    Outside a git work tree (an installed wheel, or a Ray working directory, which has no ``.git``) it is
    ``VERSION+src.DIGEST``. The digest is over the package's source files, so that a change still shows.
    """
    package = Path(bit_ray.__file__).parent
    try:
        _git(package, "ls-files", "--error-unmatch", "__init__.py")  # not only below another project's work tree
        commit = _git(package, "rev-parse", "HEAD")
        return f"{commit}-dirty" if _git(package, "status", "--porcelain", "--", ".") else commit
    except (OSError, subprocess.SubprocessError):
        return f"{bit_ray.__version__}+src.{code_digest()}"


@cache
def code_digest() -> str:
    """Return a digest of the package's source files, 12 hexadecimal digits."""
    package = Path(bit_ray.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def check_code(where: str) -> None:
    """Refuse to run other code than the one that a job was submitted with.

    Args:
        where: This process, for the message.

    Raises:
        ConfigError: It is other code. Nothing is known of a job that `bit-ray submit` did not submit.
    """
    submitted = os.environ.get(SUBMITTED_CODE, "")
    if submitted and submitted != code_digest():
        folder = Path(bit_ray.__file__).parent
        raise ConfigError(
            f"{where}: runs bit_ray with the source digest {code_digest()}, from {folder}; accepted: {submitted}, "
            "which was submitted; remove the other bit_ray from PYTHONPATH on this node, and submit again"
        )


def _git(directory: Path, *arguments: str) -> str:
    command = ["git", "-C", str(directory), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
