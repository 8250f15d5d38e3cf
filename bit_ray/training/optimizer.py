"""The optimizer of a plan. PyTorch only."""

import torch
from torch import nn

from bit_ray.training.plan import TrainPlan

INITIAL = "initial"


def build_optimizer(model: nn.Module, plan: TrainPlan) -> torch.optim.SGD:
    """SGD with momentum on what is trained; weight decay on kernels, not norms or biases (big_vision:optax.py).

    The weights that a plan decays to lie in the optimizer's state: those of now.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    kernels = [p for p in trained if p.ndim > 1]
    others = [p for p in trained if p.ndim <= 1]
    groups = [{"params": kernels, "weight_decay": plan.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=plan.momentum, fused=True)
    if plan.momentum:
        # The first step makes the same of zeros as of nothing, and a step that is left out does not leave garbage.
        for p in trained:
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    if plan.decay_to_init:
        for p in kernels:
            optimizer.state[p][INITIAL] = p.detach().clone()
    return optimizer


def initial_weights(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The weights that kernels decay to, by name; empty where they decay to zero."""
    return {name: optimizer.state[p][INITIAL] for name, p in model.named_parameters() if INITIAL in optimizer.state[p]}


@torch.no_grad()
def pull_to_initial(optimizer: torch.optim.Optimizer) -> None:
    """Take the decay of the initial weights out of the gradients, so that SGD decays what has changed since."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and (initial := optimizer.state[p].get(INITIAL)) is not None:
                p.grad.sub_(initial, alpha=group["weight_decay"])
