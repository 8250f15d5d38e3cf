"""The optimizer of a plan. PyTorch only."""

import torch
from torch import nn

from bit_ray.training.plan import TrainPlan


def build_optimizer(model: nn.Module, plan: TrainPlan) -> torch.optim.SGD:
    """SGD with momentum on what is trained; weight decay on kernels, not GroupNorm or biases (big_vision:optax.py)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    kernels = [p for p in trained if p.ndim > 1]
    others = [p for p in trained if p.ndim <= 1]
    groups = [{"params": kernels, "weight_decay": plan.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=plan.momentum, fused=True)
    if plan.momentum:
        # The first step makes the same of zeros as of nothing, and a step that is left out does not leave garbage.
        for p in trained:
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer
