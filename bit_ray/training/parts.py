"""How much of a network is trained: all of it, or a part of it. PyTorch only.

A frozen tensor needs no gradient and no momentum. If no layer before a trained one is trained, autograd stores nothing
for those layers: the forward pass is cheaper, and the same to the last bit.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bit_ray.models.network import Network
from bit_ray.models.zoo import create_model
from bit_ray.training.config import parse_train
from bit_ray.training.sharding import fill


class LowRank(nn.Module):
    """A kernel plus a product of two thin matrices (Hu et al., arXiv 2106.09685), which starts at zero.

    The product is added to the raw kernel, before Weight Standardization, so that the sum is an ordinary kernel and
    merging changes nothing. It has no scale factor: ``down`` starts with orthonormal rows. So the first step of SGD
    moves the kernel as full training would, projected onto ``rank`` random directions of the kernel's inputs, and the
    HyperRule's learning rate keeps its meaning.

    Args:
        kernel: ``[O, I, H, W]``.
        rank: Rows of ``down``; at most O and I * H * W are used.
    """

    def __init__(self, kernel: Tensor, rank: int) -> None:
        super().__init__()
        num_outputs, num_inputs = len(kernel), kernel[0].numel()
        rank = min(rank, num_outputs, num_inputs)
        self.up = nn.Parameter(kernel.new_zeros(num_outputs, rank))
        self.down = nn.Parameter(kernel.new_empty(rank, num_inputs))
        if not kernel.is_meta:
            nn.init.orthogonal_(self.down)

    def forward(self, kernel: Tensor) -> Tensor:
        """Return the sum, ``[O, I, H, W]`` in channels_last memory format."""
        num_outputs, num_inputs, height, width = kernel.shape
        with torch.autocast(kernel.device.type, enabled=False):  # merge exactly what was trained
            update = self.up @ self.down
        return kernel + update.view(num_outputs, height, width, num_inputs).permute(0, 3, 1, 2)


def set_trainable(model: Network, train: str) -> None:
    """Freeze what is not trained; to train adapters, add one to every convolution.

    Args:
        model: All of it trainable.
        train: See `bit_ray.training.config.parse_train`. The head is always trained; with ``stages:K`` also the norm
            after the last stage. A frozen BatchNorm keeps its statistics, too.
    """
    part, number = parse_train(train)
    if part == "all":
        return
    parts, convolutions = model.parts(), model.convolutions()
    trained: list[nn.Module] = [parts.head]
    if part == "stages":
        trained += [*parts.stages[-number:], parts.norm]
    elif part == "norm_bias":
        trained += model.norms()
    model.requires_grad_(False)
    for module in trained:
        module.requires_grad_(True)
    if part == "adapters":
        for convolution in convolutions:
            adapter = LowRank(torch.as_tensor(convolution.weight), number)
            # "unsafe" only skips a trial run.
            parametrize.register_parametrization(convolution, "weight", adapter, unsafe=True)


def has_adapters(model: nn.Module) -> bool:
    """Whether a kernel still has an unmerged adapter."""
    return any(parametrize.is_parametrized(module) for module in model.modules())


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Frozen kernels and their adapters by name, which merged weights do not separate; empty without adapters."""
    return {name: tensor for name, tensor in model.state_dict().items() if ".parametrizations." in name}


def load_merged(model: Network, merged: dict[str, Tensor], adapters: dict[str, Tensor]) -> None:
    """Restore a model in place, in shards or not, from its merged weights and its `adapter_tensors`."""
    for name, tensor in model.state_dict().items():  # with adapters, it has no merged kernels
        fill(tensor, (merged | adapters)[name])


@torch.no_grad()
def merged(model: Network) -> Network:
    """An ordinary network that computes the same, adapters added to their kernels; the model itself without them."""
    if not has_adapters(model):
        return model
    tensors = {name: tensor for name, tensor in model.state_dict().items() if ".parametrizations." not in name}
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            tensors[f"{name}.weight"] = torch.as_tensor(module.weight)
    with torch.device("meta"):
        plain = model.config.build()
    plain.load_state_dict(tensors, assign=True)
    return plain


def merge_adapters(model: Network) -> None:
    """Add adapters to their kernels permanently, in place."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def count_parameters(model: str, num_classes: int, train: str) -> tuple[int, int]:
    """Count of parameters that a run trains, and of those of the resulting network."""
    with torch.device("meta"):
        network = create_model(model, num_classes)
        total = sum(p.numel() for p in network.parameters())
        set_trainable(network, train)
    return sum(p.numel() for p in network.parameters() if p.requires_grad), total
