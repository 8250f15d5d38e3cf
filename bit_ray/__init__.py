"""bit_ray: Big Transfer (BiT) pre-training at scale on Ray, and transfer to any downstream task.

Every public name is here: other modules may move. Names are loaded on first use, so that ``import bit_ray`` needs
neither Ray nor MLflow nor PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bit_ray.autotrain.train import train
    from bit_ray.data.shards.manifest import Manifest, read_manifest
    from bit_ray.data.shards.verify import verify_shards
    from bit_ray.data.shards.write import write_shards
    from bit_ray.data.sources.base import Example
    from bit_ray.data.sources.published.names import open_dataset
    from bit_ray.data.stream.settings import Shuffle
    from bit_ray.errors import BitRayError
    from bit_ray.evaluation.config import EvaluateConfig, ProbeConfig
    from bit_ray.evaluation.evaluate import evaluate
    from bit_ray.evaluation.probe import probe, probe_task
    from bit_ray.evaluation.rank import rank_models
    from bit_ray.inference.classifier import load_model
    from bit_ray.inference.predict import predict_folder
    from bit_ray.models.zoo import create_model
    from bit_ray.recipes.hyperrule import RuleOverrides, hyperrule
    from bit_ray.recipes.upstream import UpstreamRecipe, bit_l, bit_m, bit_s
    from bit_ray.report.config import ModelReportConfig
    from bit_ray.report.write import report_model
    from bit_ray.studies.compare import compare_hyperrule
    from bit_ray.studies.config import FewShotConfig
    from bit_ray.studies.few_shot import fewshot_suite
    from bit_ray.studies.run import run_study
    from bit_ray.studies.study_config import CompareConfig, GridConfig, SweepConfig
    from bit_ray.studies.sweep import run_sweep
    from bit_ray.studies.vtab import vtab_suite
    from bit_ray.studies.vtab_config import VtabConfig
    from bit_ray.training.config import FinetuneConfig, InMemoryRuntime, PretrainConfig, Runtime
    from bit_ray.training.finetune import finetune
    from bit_ray.training.pretrain import pretrain
    from bit_ray.weights.export import load_exported
    from bit_ray.weights.foreign import build_network
    from bit_ray.weights.npz import load_npz, save_npz
    from bit_ray.weights.read import read_weights
    from bit_ray.weights.write import write_weights

__version__ = "0.1.0"
__all__ = [
    "BitRayError",
    "CompareConfig",
    "EvaluateConfig",
    "Example",
    "FewShotConfig",
    "FinetuneConfig",
    "GridConfig",
    "InMemoryRuntime",
    "Manifest",
    "ModelReportConfig",
    "PretrainConfig",
    "ProbeConfig",
    "RuleOverrides",
    "Runtime",
    "Shuffle",
    "SweepConfig",
    "UpstreamRecipe",
    "VtabConfig",
    "bit_l",
    "bit_m",
    "bit_s",
    "build_network",
    "compare_hyperrule",
    "create_model",
    "evaluate",
    "fewshot_suite",
    "finetune",
    "hyperrule",
    "load_exported",
    "load_model",
    "load_npz",
    "open_dataset",
    "predict_folder",
    "pretrain",
    "probe",
    "probe_task",
    "rank_models",
    "read_manifest",
    "read_weights",
    "report_model",
    "run_study",
    "run_sweep",
    "save_npz",
    "train",
    "verify_shards",
    "vtab_suite",
    "write_shards",
    "write_weights",
]

_HOMES = {
    "BitRayError": "bit_ray.errors",
    "CompareConfig": "bit_ray.studies.study_config",
    "EvaluateConfig": "bit_ray.evaluation.config",
    "Example": "bit_ray.data.sources.base",
    "FewShotConfig": "bit_ray.studies.config",
    "FinetuneConfig": "bit_ray.training.config",
    "GridConfig": "bit_ray.studies.study_config",
    "InMemoryRuntime": "bit_ray.training.config",
    "Manifest": "bit_ray.data.shards.manifest",
    "ModelReportConfig": "bit_ray.report.config",
    "PretrainConfig": "bit_ray.training.config",
    "ProbeConfig": "bit_ray.evaluation.config",
    "RuleOverrides": "bit_ray.recipes.hyperrule",
    "Runtime": "bit_ray.training.config",
    "Shuffle": "bit_ray.data.stream.settings",
    "SweepConfig": "bit_ray.studies.study_config",
    "UpstreamRecipe": "bit_ray.recipes.upstream",
    "VtabConfig": "bit_ray.studies.vtab_config",
    "bit_l": "bit_ray.recipes.upstream",
    "bit_m": "bit_ray.recipes.upstream",
    "bit_s": "bit_ray.recipes.upstream",
    "build_network": "bit_ray.weights.foreign",
    "compare_hyperrule": "bit_ray.studies.compare",
    "create_model": "bit_ray.models.zoo",
    "evaluate": "bit_ray.evaluation.evaluate",
    "fewshot_suite": "bit_ray.studies.few_shot",
    "finetune": "bit_ray.training.finetune",
    "hyperrule": "bit_ray.recipes.hyperrule",
    "load_exported": "bit_ray.weights.export",
    "load_model": "bit_ray.inference.classifier",
    "load_npz": "bit_ray.weights.npz",
    "open_dataset": "bit_ray.data.sources.published.names",
    "predict_folder": "bit_ray.inference.predict",
    "pretrain": "bit_ray.training.pretrain",
    "probe": "bit_ray.evaluation.probe",
    "probe_task": "bit_ray.evaluation.probe",
    "rank_models": "bit_ray.evaluation.rank",
    "read_manifest": "bit_ray.data.shards.manifest",
    "read_weights": "bit_ray.weights.read",
    "report_model": "bit_ray.report.write",
    "run_study": "bit_ray.studies.run",
    "run_sweep": "bit_ray.studies.sweep",
    "save_npz": "bit_ray.weights.npz",
    "train": "bit_ray.autotrain.train",
    "verify_shards": "bit_ray.data.shards.verify",
    "vtab_suite": "bit_ray.studies.vtab",
    "write_shards": "bit_ray.data.shards.write",
    "write_weights": "bit_ray.weights.write",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'bit_ray' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
