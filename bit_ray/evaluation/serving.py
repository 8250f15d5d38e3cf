"""The old name of `bit_ray.inference.serving`: MLmodel files of versions registered under it give it to MLflow."""

from bit_ray.inference.serving import _load_pyfunc as _load_pyfunc
