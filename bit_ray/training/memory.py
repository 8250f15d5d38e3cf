"""Memory that training takes, from the network's shape alone. PyTorch only."""

from functools import cache

import torch

from bit_ray.models.zoo import create_model

# What a backward pass allocates on top of the activations that the forward pass keeps.
_BACKWARD = 1.6


@cache
def bytes_per_image(model: str, crop_size: int) -> int:
    """Bytes of one image of a micro-batch in float32: the activations that are kept for the backward pass, and its own.

    Args:
        model: Name of the network.
        crop_size: Side of the view, pixels.
    """
    one, three = (_kept(model, crop_size, count) for count in (1, 3))
    return int(_BACKWARD * (three - one) / 2)


def _kept(model: str, crop_size: int, count: int) -> int:
    """Bytes that autograd keeps of a forward pass of some images; nothing is computed."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # held, so that no other storage gets its number
        return tensor

    with torch.device("meta"):
        network = create_model(model, 1).train()
        images = torch.zeros(count, 3, crop_size, crop_size)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(images)
    return sum(storage.nbytes() for storage in kept.values())
