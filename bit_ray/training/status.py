"""Where runs stand, from their folders alone: it needs no cluster and no MLflow."""

from dataclasses import dataclass

from bit_ray import store
from bit_ray.claim import CLAIM_FILE, holder
from bit_ray.config import from_dict
from bit_ray.errors import BitRayError, ConfigError, ModelError
from bit_ray.run_folder import RunFolder
from bit_ray.run_records import Attempt, LeftOut, Now
from bit_ray.training.goodput import goodput


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """Where one run stands."""

    name: str
    kind: str
    """``pretrain`` or ``finetune``."""
    model: str
    num_steps: int
    saved_step: int
    """Step of its newest checkpoint; 0 without one."""
    finished: bool
    holder: str
    """The process that carries it out, in words; empty if there is none."""
    attempts: tuple[Attempt, ...]
    """As of its newest checkpoint, while it runs."""
    left_out: tuple[LeftOut, ...]
    """Batches that it does not train on."""
    now: Now | None = None
    """What its driver last said; None for a run of an earlier version."""

    @property
    def step(self) -> int:
        """Steps that it is known to have taken."""
        return self.num_steps if self.finished else max(self.saved_step, self.now.step if self.now else 0)

    @property
    def state(self) -> str:
        """One word."""
        return "finished" if self.finished else "running" if self.holder else "stopped"

    @property
    def goodput(self) -> float:
        """Share of its seconds in which steps were taken that had not been taken before."""
        return goodput(self.attempts).share


def run_status(storage: str, name: str) -> RunStatus:
    """Read where a run stands.

    Raises:
        BitRayError: There is no such run, or its record is damaged.
    """
    folder = RunFolder.of(storage, name)
    plan = _planned(folder)
    return RunStatus(
        name=name,
        kind=plan.kind,
        model=plan.model,
        num_steps=plan.schedule.num_steps,
        saved_step=folder.newest_checkpoint(),
        finished=store.exists(folder.result),
        holder=holder(store.join(folder.uri, CLAIM_FILE)),
        attempts=folder.attempts(),
        left_out=folder.left_out(),
        now=folder.where(),
    )


@dataclass(frozen=True, kw_only=True)
class _Schedule:
    num_steps: int


@dataclass(frozen=True, kw_only=True)
class _Planned:
    """What is shown of a plan. `TrainPlan` itself knows networks, and PyTorch takes seconds to import."""

    kind: str
    model: str
    schedule: _Schedule


def _planned(folder: RunFolder) -> _Planned:
    plan = folder.record().plan
    try:
        return from_dict(
            _Planned,
            {
                "kind": plan.get("kind"),
                "model": plan.get("model"),
                "schedule": {"num_steps": dict(plan.get("schedule", {})).get("num_steps")},
            },
        )
    except (ConfigError, TypeError, ValueError) as error:
        raise ModelError(f"{folder.plan}: plan: {str(error)[:300]}; restore the file") from None


def run_statuses(storage: str) -> tuple[list[RunStatus], list[str]]:
    """Read where all runs in a storage stand, by name; also return one line for each whose record is damaged.

    Raises:
        ConfigError: There is no such storage.
    """
    names = store.list_tree(storage, recursive=False)[1]
    if not names:
        raise ConfigError.of("storage", f"{storage} has no runs", "the folder of all runs", "correct it")
    found, damaged = [], []
    for name in names:
        if store.exists(RunFolder.of(storage, name).plan):
            try:
                found.append(run_status(storage, name))
            except BitRayError as error:
                damaged.append(str(error))
    return found, damaged
