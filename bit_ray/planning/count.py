"""Counts what one image costs a network, without computing anything. PyTorch only.

``python -m bit_ray.planning.count R50x1 ...`` prints the lines of `bit_ray.planning.costs.NETWORKS`.
"""

import sys

import torch
from torch.utils.flop_counter import FlopCounterMode

from bit_ray.models.zoo import create_model
from bit_ray.planning.costs import CROP, NetworkCosts
from bit_ray.training.memory import kept_elements


def count(model: str) -> NetworkCosts:
    """Return the costs of a network by name, at the table's size of the view.

    Raises:
        ConfigError: There is no such network.
    """
    with torch.device("meta"):
        network = create_model(model, 1).train()
        images = torch.zeros(2, 3, CROP, CROP)
    counter = FlopCounterMode(display=False)
    with counter:
        network(images).sum().backward()
    features = network.num_features
    flops = counter.get_total_flops() / len(images) - 6 * features
    parameters = sum(parameter.numel() for parameter in network.parameters()) - features - 1
    return NetworkCosts(flops / 1e9, kept_elements(model, CROP) / 1e6, parameters, features)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        found = count(name)
        print(f'    "{name}": {found}')
