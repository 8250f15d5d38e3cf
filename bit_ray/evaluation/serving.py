"""The old name of `bit_ray.inference.serving`, which MLmodel files of older registered versions give to MLflow."""

from bit_ray.inference.serving import _load_pyfunc as _load_pyfunc
