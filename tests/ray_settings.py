"""Which environment variables the installed Ray reads."""

from collections.abc import Iterable
from pathlib import Path

import ray

PLACES = ("_private", "_raylet.so", "autoscaler", "dashboard", "scripts")


def unknown_to_ray(names: Iterable[str]) -> set[str]:
    """Return those of the names that stand nowhere in Ray."""
    root, left = Path(ray.__file__).parent, set(names)
    for place in PLACES:
        for path in sorted((root / place).rglob("*.py")) if (root / place).is_dir() else [root / place]:
            if left:
                text = path.read_bytes()
                left -= {name for name in left if name.encode() in text or name.removeprefix("RAY_").encode() in text}
    return left
