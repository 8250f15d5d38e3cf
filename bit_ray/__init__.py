"""bit_ray: Big Transfer (BiT) pre-training at scale on Ray, and transfer to any downstream task.

The names below are loaded on first use, so that ``import bit_ray`` needs neither Ray nor MLflow.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bit_ray.evaluation.classifier import load_model
    from bit_ray.evaluation.predict import predict_folder
    from bit_ray.models.npz import load_npz, save_npz
    from bit_ray.models.zoo import create_model
    from bit_ray.recipes.hyperrule import hyperrule

__version__ = "0.1.0"
__all__ = ["create_model", "hyperrule", "load_model", "load_npz", "predict_folder", "save_npz"]

_HOMES = {
    "create_model": "bit_ray.models.zoo",
    "hyperrule": "bit_ray.recipes.hyperrule",
    "load_model": "bit_ray.evaluation.classifier",
    "load_npz": "bit_ray.models.npz",
    "predict_folder": "bit_ray.evaluation.predict",
    "save_npz": "bit_ray.models.npz",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'bit_ray' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
