"""What a command says and checks in its first second, before it imports PyTorch, Ray or MLflow."""

from bit_ray import store
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.progress import console
from bit_ray.tracking.address import registry_uri, tracking_uri
from bit_ray.tracking.config import RegistryConfig, TrackingConfig
from bit_ray.tracking.listing import find_embedded
from bit_ray.uris import shown
from bit_ray.weights.location import check_there


def look(verb: str, weights: str, *sets: str, tracking: RegistryConfig | TrackingConfig, storage: str) -> None:
    """Check what a command reads from this machine, and print one line that says what it is about to do.

    What lies in object stores and on servers is left to the command itself, which asks for it once.

    Args:
        verb: What is about to be done.
        weights: The model it is done with; empty: it needs no model.
        sets: Shard sets it reads; empty ones are not given.
        tracking: Where registered models are looked up.
        storage: Folder of all runs.

    Raises:
        BitRayError: A set or a model is not there, as the command itself would say it.
    """
    parts = []
    for uri in filter(None, sets):
        size = f" ({read_manifest(uri).num_examples:,} images)" if store.is_local(uri) else ""
        parts.append(f"{uri}{size}")
    if weights.startswith("models:/"):
        find_embedded(registry_uri(tracking_uri(tracking.uri, storage)), weights)
    elif weights:
        check_there(weights)
    what = f"{verb} {weights}" if weights else verb
    console.print(shown(f"{what} on {', '.join(parts)}" if parts else what))
