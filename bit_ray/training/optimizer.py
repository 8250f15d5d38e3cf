"""The optimizer of a plan. PyTorch only."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from bit_ray.training.plan import TrainPlan
from bit_ray.training.sharding import local, whole

INITIAL, MOMENTUM = "initial", "momentum_buffer"


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters with the same weight decay."""

    params: list[nn.Parameter]
    weight_decay: float


@dataclass
class SGD:
    """SGD with momentum by PyTorch's fused kernel, on whole tensors or on this worker's shards.

    `torch.optim.SGD` does the same, but knows no shards, and its first use in a process imports PyTorch's compiler,
    which takes 1.5 s of a core.
    """

    groups: tuple[Group, ...]
    """Kernels first."""
    momentum: float
    state: dict[nn.Parameter, dict[str, Tensor]]
    """Of each parameter its momentum and the weights that it decays to, where there are any."""
    lr: float = 0.0
    """Of the next step."""
    found_inf: Tensor | None = field(default=None, init=False)
    """1 where the next step is not to change anything, else 0."""

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for p in self.state:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Update the weights and their momentum, unless ``found_inf`` is set."""
        for group in self.groups:
            params = [p for p in group.params if p.grad is not None]
            if params:
                sgd(
                    [local(p) for p in params],
                    [local(p.grad) for p in params if p.grad is not None],
                    [local(self.state[p][MOMENTUM]) for p in params] if self.momentum else [],
                    fused=True,
                    found_inf=self.found_inf,
                    weight_decay=group.weight_decay,
                    momentum=self.momentum,
                    lr=self.lr,
                    dampening=0.0,
                    nesterov=False,
                    maximize=False,
                )


def build_optimizer(model: nn.Module, plan: TrainPlan) -> SGD:
    """SGD with momentum on what is trained; weight decay on kernels, not norms or biases (big_vision:optax.py).

    If a plan decays to its initial weights, the optimizer's state has them: a copy made here.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    kernels = [p for p in trained if p.ndim > 1]
    others = [p for p in trained if p.ndim <= 1]
    groups = (Group(params=kernels, weight_decay=plan.weight_decay), Group(params=others, weight_decay=0.0))
    # The first step gives the same with zeros as with no momentum, and a skipped step does not leave garbage.
    state = {p: {MOMENTUM: torch.zeros_like(p)} if plan.momentum else {} for p in trained}
    if plan.decay_to_init:
        for p in kernels:
            state[p][INITIAL] = p.detach().clone()
    return SGD(groups, plan.momentum, state)


def initial_weights(model: nn.Module, optimizer: SGD) -> dict[str, torch.Tensor]:
    """The weights that kernels decay to, by name; empty where they decay to zero."""
    return {
        name: optimizer.state[p][INITIAL]
        for name, p in model.named_parameters()
        if INITIAL in optimizer.state.get(p, ())
    }


@torch.no_grad()
def kernel_norm(optimizer: SGD) -> float:
    """L2 norm of the kernels that weight decay acts on, against which Weight Standardization works (paper §4.2).

    Waits for the device, and in a training in shards for the other workers.
    """
    return whole(torch.nn.utils.get_total_norm(optimizer.groups[0].params, foreach=True)).item()


@torch.no_grad()
def pull_to_initial(optimizer: SGD) -> None:
    """Subtract the decay of the initial weights from the gradients, so that SGD decays only the change since then."""
    for group in optimizer.groups:
        for p in group.params:
            if p.grad is not None and (initial := optimizer.state[p].get(INITIAL)) is not None:
                p.grad.sub_(initial, alpha=group.weight_decay)
