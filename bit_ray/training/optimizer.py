"""The optimizer of a plan. PyTorch only."""

import torch
from torch import nn

from bit_ray.training.plan import TrainPlan
from bit_ray.training.sharding import ShardedSGD, whole

INITIAL = "initial"


def build_optimizer(model: nn.Module, plan: TrainPlan, *, sharded: bool = False) -> torch.optim.SGD:
    """SGD with momentum on what is trained; weight decay on kernels, not norms or biases (big_vision:optax.py).

    If a plan decays to its initial weights, the optimizer's state has them: a copy made here.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    kernels = [p for p in trained if p.ndim > 1]
    others = [p for p in trained if p.ndim <= 1]
    groups = [{"params": kernels, "weight_decay": plan.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = (ShardedSGD if sharded else torch.optim.SGD)(groups, lr=0.0, momentum=plan.momentum, fused=True)
    if plan.momentum:
        # The first step gives the same with zeros as with no buffer, and a skipped step does not leave garbage.
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
def kernel_norm(optimizer: torch.optim.Optimizer) -> float:
    """L2 norm of the kernels that weight decay acts on, against which Weight Standardization works (paper §4.2).

    Waits for the device, and in a training in shards for the other workers.
    """
    return whole(torch.nn.utils.get_total_norm(optimizer.param_groups[0]["params"], foreach=True)).item()


@torch.no_grad()
def pull_to_initial(optimizer: torch.optim.Optimizer) -> None:
    """Subtract the decay of the initial weights from the gradients, so that SGD decays only the change since then."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and (initial := optimizer.state[p].get(INITIAL)) is not None:
                p.grad.sub_(initial, alpha=group["weight_decay"])
