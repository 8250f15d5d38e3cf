"""From a reference to a package directory on this machine, verified to be the registered package."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bit_ray import store
from bit_ray.config import read_document
from bit_ray.errors import ModelError
from bit_ray.tracking.reference import ModelReference
from bit_ray.weights.fetch import Digests, check_description, download_package, fetch_package
from bit_ray.weights.location import DESCRIPTION_FILE


def fetch(reference: ModelReference, cache_dir: Path | None = None) -> Path:
    """Return a local package directory for the reference.

    A local package is not copied: its description must be the registered one, its weights of the registered size;
    ``load_package`` verifies their digest, as always. A remote one is downloaded once, verified in full, into
    ``cache_dir`` (default: see `bit_ray.weights.fetch`).

    Raises:
        ModelError: The package does not exist any more, or is not the registered one.
    """
    if store.is_local(reference.weights_uri):
        directory = Path(store.filesystem(reference.weights_uri)[1])
        _check(directory, reference)
        return directory
    with _named(reference):
        return fetch_package(reference.weights_uri, cache_dir, _digests(reference))


def download(reference: ModelReference, directory: Path) -> None:
    """Copy the files of the package to ``directory`` (absent or empty), which appears complete and verified.

    Raises:
        ModelError: The package cannot be read, or is not the registered one.
    """
    with _named(reference):
        download_package(reference.weights_uri, directory, _digests(reference))


def _check(directory: Path, reference: ModelReference) -> None:
    """Check that the package is the registered one, by its description and the size of its weights."""
    where = f"{reference.uri}: {reference.weights_uri}"
    remedy = "restore it, or register what is there now"
    try:
        weights = check_description(read_document(directory / DESCRIPTION_FILE), where, _digests(reference))
        size = sum((directory / file.file).stat().st_size for file in weights.files)
    except OSError as error:
        raise ModelError(
            f"{where}: cannot be read ({error.strerror}); it was deleted, or is on another machine; {remedy}"
        ) from None
    if size != reference.num_bytes:
        given = f"{weights.file} has {size} bytes"
        raise ModelError(f"{where}: {given}; accepted: {reference.num_bytes}, as registered; {remedy}")


def _digests(reference: ModelReference) -> Digests:
    return Digests(weights=reference.sha256, description=reference.description_sha256)


@contextmanager
def _named(reference: ModelReference) -> Iterator[None]:
    """Make errors begin with the registered name."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{reference.uri}: its package cannot be read: {error}") from None
