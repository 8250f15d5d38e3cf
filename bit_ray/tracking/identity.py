"""Which code is running: one line of the identity that every checkpoint, run and registry version carries."""

import hashlib
import subprocess
from functools import cache
from pathlib import Path

import bit_ray


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
        digest = hashlib.sha256()
        for path in sorted(package.rglob("*.py")):
            digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
        return f"{bit_ray.__version__}+src.{digest.hexdigest()[:12]}"


def _git(directory: Path, *arguments: str) -> str:
    command = ["git", "-C", str(directory), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
