"""What a command says and checks in its first second, before it imports PyTorch, Ray or MLflow."""

from bit_ray import store
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.progress import console
from bit_ray.tracking.address import registry_uri, tracking_uri
from bit_ray.tracking.config import RegistryConfig, TrackingConfig
from bit_ray.uris import shown
from bit_ray.weights.location import check_there


def look(
    verb: str, weights: str, *sets: str, tracking: RegistryConfig | TrackingConfig, storage: str, quiet: bool = False
) -> None:
    """Check what a command reads from this machine, and print one line that says what it is about to do.

    What lies in object stores and on servers is left to the command itself, which asks for it once.

    Args:
        verb: What is about to be done.
        weights: The model it is done with; empty: none.
        sets: Shard sets it reads; empty ones are not given.
        tracking: Where registered models are looked up.
        storage: Folder of all runs.
        quiet: Print nothing.

    Raises:
        BitRayError: a set or a model is not there, as the command itself would say it.
    """
    words = [f"{verb} {weights}" if weights else verb]
    for i, uri in enumerate(filter(None, sets)):
        if store.is_local(uri):
            manifest = read_manifest(uri)
            words.append(f"{'on ' if i == 0 else ''}{uri} ({manifest.num_examples:,} images)")
        else:
            words.append(uri)
    if weights.startswith("models:/"):
        registry_uri(tracking_uri(tracking.uri, storage))
    elif weights:
        check_there(weights)
    if not quiet:
        console.print(shown(", ".join(words).replace(", on ", " on ")))
