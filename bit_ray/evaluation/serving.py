"""The old name of `bit_ray.inference.serving`, which MLmodel files of versions registered before 2026-11-28 give MLflow.

Nothing else may use it.
"""

from bit_ray.inference.serving import _load_pyfunc as _load_pyfunc
