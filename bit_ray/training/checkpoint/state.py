"""Checkpoints of training: a saved model with the optimizer and the position next to it.

A checkpoint is a directory that `bit_ray.weights.package` can load as a model, plus ``optimizer.safetensors`` and
``training.json`` (the plan and the position). ``optimizer.safetensors`` has momentum, the weights that weight decay
pulls to, generator state, and adapters, which the model has merged into its kernels. Nothing in it is ever unpickled.
The workers of a training in shards write a file of each kind each, with some of the tensors whole: any number of
workers reads them, in shards or not.
The position in the data is one integer, the next step: order, views, MixUp and dropout are functions of (seed, step).
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch

from bit_ray import store
from bit_ray.config import from_json, read_document, to_dict
from bit_ray.data.stream.requests import BadExample
from bit_ray.errors import ConfigError, ModelError
from bit_ray.locks import scratch_directory
from bit_ray.models.network import Network
from bit_ray.run_folder import TRAINING_FILE
from bit_ray.training.optimizer import MOMENTUM, SGD, initial_weights
from bit_ray.training.parts import adapter_tensors, load_merged, merged
from bit_ray.training.plan import TrainPlan
from bit_ray.training.sharding import fill
from bit_ray.weights.package import ModelSpec, load_package, write_package
from bit_ray.weights.tensor_files import MAX_PARTS, TensorFile, verify_weights, write_tensors

OPTIMIZER_FILE = "optimizer.safetensors"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was reported after a step."""

    step: int
    metrics: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far a run has trained."""

    next_step: int = 0
    """Optimizer steps done, and the number of the next one."""
    train_s: float = 0.0
    """Seconds spent in training so far, over all starts."""
    bad_images: tuple[BadExample, ...] = ()
    """Images that could not be read so far."""
    recent: tuple[float, ...] = ()
    """Losses of the last steps, by which a `bit_ray.training.healing.Healer` judges the next one."""
    unrecorded: tuple[Report, ...] = ()
    """The last reports: a driver that is killed may not have recorded them."""


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord:
    """The content of ``training.json``."""

    format: Literal[1] = 1
    progress: Position
    plan_digest: str
    plan: dict[str, Any]
    metrics: dict[str, float] = field(default_factory=dict)
    """What was reported at its step; older checkpoints have none."""
    optimizer: tuple[TensorFile, ...] = ()
    """The files that ``optimizer.safetensors`` was written in, if it is not one."""

    def __post_init__(self) -> None:
        if len(self.optimizer) > MAX_PARTS:
            raise ConfigError.of("optimizer", f"{len(self.optimizer):,} files", f"at most {MAX_PARTS:,}")


def checkpoint_tensors(model: Network, optimizer: SGD) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return what a checkpoint consists of, by name: the state of the training, and the model; not copied.

    In a training in shards they are this worker's.
    """
    state = _state(model, optimizer) | adapter_tensors(model) | {"rng.torch": torch.get_rng_state()}
    return state, {name: tensor.detach() for name, tensor in merged(model).state_dict().items()}


def write_checkpoint(
    directory: Path,
    state: Mapping[str, torch.Tensor],
    model: Mapping[str, torch.Tensor],
    spec: ModelSpec,
    plan: TrainPlan,
    position: Position,
    metrics: Mapping[str, float],
) -> None:
    """Write the tensors of `checkpoint_tensors` into a local directory, ``training.json`` last."""
    write_tensors(directory / OPTIMIZER_FILE, state)
    write_package(directory, model, spec)
    write_checkpoint_record(directory, plan, position, metrics)


def write_checkpoint_record(
    directory: Path,
    plan: TrainPlan,
    position: Position,
    metrics: Mapping[str, float],
    optimizer: tuple[TensorFile, ...] = (),
) -> None:
    """Write ``training.json``, with which a checkpoint is complete."""
    record = CheckpointRecord(
        progress=position, plan_digest=plan.digest, plan=to_dict(plan), metrics=dict(metrics), optimizer=optimizer
    )
    (directory / TRAINING_FILE).write_text(json.dumps(to_dict(record), indent=1))


def save_checkpoint(
    directory: Path,
    model: Network,
    spec: ModelSpec,
    optimizer: SGD,
    plan: TrainPlan,
    position: Position,
) -> None:
    """Write a checkpoint into a local directory; the caller moves the directory to the storage."""
    write_checkpoint(directory, *checkpoint_tensors(model, optimizer), spec, plan, position, {})


def read_checkpoint_record(directory: Path) -> CheckpointRecord:
    """Read what a checkpoint says of the run.

    Raises:
        ModelError: There is no checkpoint, or its record is damaged.
    """
    try:
        return from_json(CheckpointRecord, read_document(directory / TRAINING_FILE))
    except (OSError, ConfigError) as error:
        raise ModelError(
            f"{directory}: not a training checkpoint ({error}); accepted: a directory with {TRAINING_FILE}; "
            "start from another one"
        ) from None


@contextmanager
def fetched(uri: str) -> Iterator[Path]:
    """Yield the local directory of a checkpoint, or a copy of a remote one."""
    if store.is_local(uri):
        yield Path(store.filesystem(uri)[1])
        return
    with scratch_directory() as directory:
        # Below it: in its place the copy would have no lock, and another process would remove it as abandoned.
        local = directory / "checkpoint"
        store.download_directory(uri, local)
        yield local


def load_checkpoint(directory: Path, model: Network, optimizer: SGD, plan: TrainPlan) -> Position:
    """Restore model and optimizer in place, on the device where the model is.

    Raises:
        ModelError: The checkpoint belongs to another plan, or is damaged.
    """
    training = read_checkpoint_record(directory)
    if training.plan_digest != plan.digest:
        raise ModelError(
            f"{directory}: written by plan {training.plan_digest[:12]}; accepted: the plan of this run, "
            f"{plan.digest[:12]}; use another name for other settings"
        )
    if not 0 <= training.progress.next_step <= plan.schedule.num_steps:
        given = f"{directory}: progress.next_step: {training.progress.next_step}"
        raise ModelError(f"{given}; accepted: 0 to {plan.schedule.num_steps}; start from an earlier checkpoint")
    state, adapters = _state(model, optimizer), adapter_tensors(model)
    shapes = {name: tensor.shape for name, tensor in (state | adapters).items()}
    tensors = _read_state(directory, training, shapes | {"rng.torch": torch.get_rng_state().shape})
    network, spec = load_package(directory)
    if (spec.model, spec.num_classes) != (plan.model, plan.num_classes):
        given = f"{directory}: {spec.model} with {spec.num_classes} classes"
        accepted = f"the network of this run, {plan.model} with {plan.num_classes}"
        raise ModelError(f"{given}; accepted: {accepted}; start from an earlier checkpoint")
    try:
        torch.set_rng_state(tensors("rng.torch"))
    except (TypeError, RuntimeError):
        path = directory / OPTIMIZER_FILE
        raise ModelError(f"{path}: rng.torch is no generator's state; start from an earlier checkpoint") from None
    load_merged(model, network.state_dict(), {name: tensors(name) for name in adapters})
    for name, buffer in state.items():
        fill(buffer, tensors(name))
    return training.progress


def _read_state(
    directory: Path, training: CheckpointRecord, shapes: Mapping[str, torch.Size]
) -> Callable[[str], torch.Tensor]:
    """Return what reads a tensor of the training's state by name, from wherever it is; whole parts are not read.

    Raises:
        ModelError: A file is damaged, or has other tensors or shapes than these.
    """
    verify_weights(directory, training.optimizer, TRAINING_FILE)
    places: dict[str, Any] = {}
    remedy = "start from an earlier checkpoint"
    for file in [part.file for part in training.optimizer] or [OPTIMIZER_FILE]:
        path = directory / file
        try:
            opened = safetensors.safe_open(path, framework="pt")
            found = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118 - not a dict
        except (OSError, safetensors.SafetensorError) as error:
            raise ModelError(f"{path}: cannot be read ({error}); {remedy}") from None
        if twice := places.keys() & found.keys():
            raise ModelError(f"{path}: {min(twice)!r} is in another part as well; {remedy}")
        for name, shape in found.items():
            if name in shapes and shape != list(shapes[name]):
                raise ModelError(f"{path}: {name} is {shape}; accepted: {list(shapes[name])}; {remedy}")
        places |= dict.fromkeys(found, opened)
    if odd := places.keys() ^ shapes.keys():
        path = directory / OPTIMIZER_FILE
        raise ModelError(f"{path}: missing or unknown entries {sorted(odd)[:3]}; {remedy}")
    return lambda name: places[name].get_tensor(name)


def _state(model: Network, optimizer: SGD) -> dict[str, torch.Tensor]:
    """Momentum buffers and the weights that it decays to, by name, if the optimizer has them."""
    initial = {f"initial.{name}": tensor for name, tensor in initial_weights(model, optimizer).items()}
    return initial | {
        f"momentum.{name}": optimizer.state[p][MOMENTUM]
        for name, p in model.named_parameters()
        if MOMENTUM in optimizer.state.get(p, ())
    }
