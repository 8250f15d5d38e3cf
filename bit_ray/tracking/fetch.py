"""From a reference to a package directory on this machine, with proof that it is what was registered."""

import hashlib
import shutil
from contextlib import suppress
from pathlib import Path

from bit_ray import store
from bit_ray.config import read_document
from bit_ray.errors import DataError, ModelError
from bit_ray.locks import partial, remove_abandoned
from bit_ray.tracking.reference import ModelReference
from bit_ray.tracking.server import one_line
from bit_ray.tracking.spool import cache_directory
from bit_ray.weights.package import DESCRIPTION_FILE, Weights, cached_path, parse_description, verify_weights


def fetch(reference: ModelReference, cache_dir: Path | None = None) -> Path:
    """Return a local package directory for the reference.

    A local package is used where it is: its description must be the registered one, its weights of the registered
    size; their digest is verified by ``load_package``, as always. A remote one is downloaded once, verified in full,
    into ``cache_dir`` (default ``$BIT_RAY_CACHE/models`` or ``~/.cache/bit_ray/models``).

    Raises:
        ModelError: the package is gone, or is not what was registered.
    """
    if store.is_local(reference.weights_uri):
        directory = Path(store.filesystem(reference.weights_uri)[1])
        _check(directory, reference)
        return directory
    cache = cache_dir or cache_directory() / "models"
    directory = cached_path(cache, reference.sha256, reference.description_sha256)
    if directory.exists():
        with suppress(ModelError):
            _check(directory, reference)
            return directory
        shutil.rmtree(directory, ignore_errors=True)
    remove_abandoned(cache)  # gigabytes that a process was fetching when it was killed
    download(reference, directory)
    return directory


def _check(directory: Path, reference: ModelReference) -> None:
    """Check that the package is the registered one, by its description and the size of its weights."""
    where = f"{reference.uri}: {reference.weights_uri}"
    remedy = "restore it, or register what is there now"
    try:
        weights = _described(directory / DESCRIPTION_FILE, reference)
        size = (directory / weights.file).stat().st_size
    except OSError as error:
        raise ModelError(
            f"{where}: cannot be read ({error.strerror}); it was deleted, or lies on another machine; {remedy}"
        ) from None
    if size != reference.num_bytes:
        raise ModelError(f"{where}: {weights.file} of {size} bytes; registered: {reference.num_bytes}; {remedy}")


def _described(path: Path, reference: ModelReference) -> Weights:
    """Return what the description says of the weights, having checked that it is the registered description."""
    data = read_document(path)
    where = f"{reference.uri}: {reference.weights_uri}"
    remedy = "restore it, or register what is there now"
    _, weights = parse_description(data, where)
    if weights.sha256 != reference.sha256:
        raise ModelError(
            f"{where}: weights of SHA-256 {weights.sha256[:12]}...; registered: {reference.sha256[:12]}...; {remedy}"
        )
    digest = hashlib.sha256(data).hexdigest()
    if digest != reference.description_sha256:
        raise ModelError(
            f"{where}: {DESCRIPTION_FILE} of SHA-256 {digest[:12]}...; registered: "
            f"{reference.description_sha256[:12]}...; {remedy}"
        )
    return weights


def download(reference: ModelReference, directory: Path) -> None:
    """Copy the two files of the package to ``directory`` (absent or empty), which appears whole and verified.

    Raises:
        ModelError: the package cannot be read, or is not what was registered.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with partial(directory, directory=True) as unfinished:
        try:
            store.download_file(store.join(reference.weights_uri, DESCRIPTION_FILE), unfinished / DESCRIPTION_FILE)
            weights = _described(unfinished / DESCRIPTION_FILE, reference)  # before gigabytes travel
            store.download_file(store.join(reference.weights_uri, weights.file), unfinished / weights.file)
        except DataError as error:
            raise ModelError(f"{reference.uri}: its package cannot be read: {one_line(error)}") from None
        verify_weights(unfinished / weights.file, weights)
        try:
            unfinished.replace(directory)
        except OSError:
            if not (directory / DESCRIPTION_FILE).exists():  # else another process was first
                raise
