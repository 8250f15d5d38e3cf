"""Saved models in an object store: each is downloaded once, verified, and kept in this user's cache."""

import errno
import hashlib
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bit_ray import store
from bit_ray.config import MAX_DOCUMENT_BYTES, read_document
from bit_ray.errors import BitRayError, DataError, ModelError, StoreError
from bit_ray.locks import partial, remove_abandoned
from bit_ray.weights.location import DESCRIPTION_FILE
from bit_ray.weights.package import parse_description
from bit_ray.weights.tensor_files import Weights, verify_weights


@dataclass(frozen=True, kw_only=True)
class Digests:
    """Digests of a package's content, SHA-256 in hex."""

    weights: str
    """Of the weights."""
    description: str
    """Of ``model.json``."""


def fetch_package(uri: str, cache: Path | None = None, registered: Digests | None = None) -> Path:
    """Return a local copy of a package, downloaded into the cache unless it is there, verified in full either way.

    Args:
        uri: The package, in an object store.
        cache: The folder of the copies; by default ``models`` in `bit_ray.store.cache_folder`.
        registered: What the package must be; the store is not contacted then if the cache has it.

    Raises:
        ModelError: There is no package at ``uri``, it is damaged or not the registered one, or the cache cannot be
            written.
    """
    data, digests = None, registered
    if digests is None:
        data = read_description(uri)
        digests = _digests(data, uri)
    folder = cache or store.cache_folder() / "models"
    directory = cached_path(folder, digests.weights, digests.description)
    if directory.exists():
        with suppress(BitRayError, OSError):
            weights = check_description(read_document(directory / DESCRIPTION_FILE), str(directory), digests)
            verify_weights(directory, weights.files)
            return directory
        shutil.rmtree(directory, ignore_errors=True)  # damaged on this disk
    remove_abandoned(folder)  # gigabytes of downloads by killed processes
    download_package(uri, directory, registered, data)
    return directory


def download_package(uri: str, directory: Path, registered: Digests | None, data: bytes | None = None) -> None:
    """Copy the files of a package to ``directory`` (absent or empty), which appears complete and verified.

    Args:
        uri: The package, local or in an object store.
        directory: The target.
        registered: What it must be.
        data: Its ``model.json``, if it has been read.

    Raises:
        ModelError: There is no package at ``uri``, it is damaged or not the registered one, or ``directory`` cannot be
            written.
        StoreError: The disk of ``directory`` is full.
    """
    data = data or read_description(uri)
    weights = check_description(data, uri, registered)  # before downloading gigabytes
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with partial(directory, directory=True) as unfinished:
            store.write_bytes(unfinished / DESCRIPTION_FILE, data)
            for file in weights.files:
                store.download_file(store.join(uri, file.file), unfinished / file.file)
            verify_weights(unfinished, weights.files)
            try:
                unfinished.replace(directory)
            except OSError:
                if not (directory / DESCRIPTION_FILE).exists():  # else another process was first
                    raise
    except OSError as error:
        raise ModelError(
            f"{uri}: {directory} cannot be written ({error.strerror or error}); choose a writable folder"
        ) from None
    except (ModelError, DataError) as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.ENOSPC, errno.EDQUOT):
            accepted = f"a disk with room for {weights.num_bytes:,} bytes; make room, or choose another"
            raise StoreError(f"{directory}: no space left; accepted: {accepted}") from None
        raise ModelError(f"{uri}: {error}") from None


def read_description(uri: str) -> bytes:
    """Return the bytes of a package's ``model.json``.

    Raises:
        ModelError: It cannot be read.
    """
    try:
        return store.read_bytes(store.join(uri, DESCRIPTION_FILE), MAX_DOCUMENT_BYTES)
    except DataError as error:
        raise ModelError(f"{error}; accepted: a saved model, with a {DESCRIPTION_FILE}") from error


def check_description(data: bytes, where: str, registered: Digests | None) -> Weights:
    """Check that a ``model.json`` is the registered one, and return what it says about the weights.

    Raises:
        ModelError: It is another one, or is not a description; ``where`` names the package.
    """
    _, weights = parse_description(data, where)
    if registered is None:
        return weights
    found = _digests(data, where)
    remedy = "restore it, or register what is there now"
    for what, given, wanted in (
        ("weights", found.weights, registered.weights),
        (DESCRIPTION_FILE, found.description, registered.description),
    ):
        if given != wanted:
            accepted = f"{wanted[:12]}..., as registered"
            raise ModelError(f"{where}: {what} has SHA-256 {given[:12]}...; accepted: {accepted}; {remedy}")
    return weights


def cached_path(cache: Path, weights: str, description: str) -> Path:
    """Return the path of a package in a cache, by the digests of its weights and of its description.

    The class names may change without the weights, so both are in the name.

    Raises:
        ModelError: The digests name a path outside the cache, whose old content the caller would delete.
    """
    path = cache / f"{weights}-{description[:8]}"
    if path.parent != cache:
        raise ModelError(f"{path}: outside the cache {cache}; accepted: a package named by SHA-256; save it again")
    return path


def _digests(data: bytes, where: str) -> Digests:
    """Return the digests of the package that a ``model.json`` describes."""
    return Digests(weights=parse_description(data, where)[1].sha256, description=hashlib.sha256(data).hexdigest())
