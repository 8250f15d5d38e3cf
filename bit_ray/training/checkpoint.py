"""Checkpoints of training: a saved model with the optimizer and the position beside it.

A checkpoint is a directory that `bit_ray.models.package` can load as a model, plus ``optimizer.safetensors`` (momentum and
generator state) and ``training.json`` (the plan and the position). Nothing in it is ever unpickled. The position in the
data is one integer, the next step: order, views and MixUp are functions of (seed, step).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from bit_ray.config import from_dict, to_dict
from bit_ray.errors import ModelError
from bit_ray.models.package import ModelSpec, load_package, save_package
from bit_ray.models.resnet import ResNetV2
from bit_ray.training.plan import TrainPlan


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands."""

    next_step: int = 0
    """Optimizer steps done, and the number of the next one."""
    train_s: float = 0.0
    """Seconds spent in training so far, over all starts."""


def save_checkpoint(
    directory: Path,
    model: ResNetV2,
    spec: ModelSpec,
    optimizer: torch.optim.Optimizer,
    plan: TrainPlan,
    progress: Progress,
) -> None:
    """Write a checkpoint into a local directory; the caller moves it to the storage as a whole."""
    names = {p: name for name, p in model.named_parameters()}
    tensors = {
        f"momentum.{names[p]}": state["momentum_buffer"].contiguous().cpu()
        for p, state in optimizer.state.items()
        if state.get("momentum_buffer") is not None
    }
    tensors["rng.torch"] = torch.get_rng_state()
    safetensors.torch.save_file(tensors, directory / "optimizer.safetensors")
    training = {"format": 1, "progress": to_dict(progress), "plan": to_dict(plan), "plan_digest": plan.digest}
    (directory / "training.json").write_text(json.dumps(training, indent=1))
    save_package(directory, model, spec)


def read_training(directory: Path) -> dict[str, Any]:
    """Plan and progress of a checkpoint as plain data.

    Raises:
        ModelError: There is no readable ``training.json``.
    """
    try:
        training = json.loads((directory / "training.json").read_text())
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{directory}: not a training checkpoint ({error}); a directory with training.json; start from another one"
        ) from None
    assert isinstance(training, dict)
    return training


def load_checkpoint(directory: Path, model: ResNetV2, optimizer: torch.optim.Optimizer, plan: TrainPlan) -> Progress:
    """Restore model and optimizer in place, on the device where the model is.

    Raises:
        ModelError: The checkpoint belongs to another plan, or is damaged.
    """
    training = read_training(directory)
    if training["plan_digest"] != plan.digest:
        raise ModelError(
            f"{directory}: written by plan {training['plan_digest'][:12]}, this run's is {plan.digest[:12]}; "
            "a run continues with the settings it began with; use another name for other settings"
        )
    model.load_state_dict(load_package(directory)[0].state_dict())
    try:
        tensors = safetensors.torch.load_file(directory / "optimizer.safetensors")
    except (OSError, safetensors.SafetensorError) as error:
        raise ModelError(f"{directory}/optimizer.safetensors: {error}; start from an earlier checkpoint") from None
    torch.set_rng_state(tensors.pop("rng.torch"))
    for name, p in model.named_parameters():
        if (momentum := tensors.pop(f"momentum.{name}", None)) is not None:
            optimizer.state[p]["momentum_buffer"] = torch.empty_like(p).copy_(momentum)
    if tensors:
        raise ModelError(
            f"{directory}/optimizer.safetensors: unknown entries {sorted(tensors)[:3]}; use another checkpoint"
        )
    return from_dict(Progress, training["progress"])
