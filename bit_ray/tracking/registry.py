"""The model registry, by reference: a version names the saved model in the storage where it already is.

MLflow gets a few kilobytes: the model card, the MLmodel file, and ``reference.json`` with the package's URI, its
description (``model.json``) and the digest of its weights. The MLmodel file has the signature and the
``python_function`` flavor, by which MLflow itself loads and serves the model. Registering never reads the weights and
never stores them twice; loading a version reads them from their original URI and verifies the digest.
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bit_ray import store
from bit_ray.errors import ConfigError, DataError, ModelError, TrackingError, one_line
from bit_ray.tracking import address, server
from bit_ray.tracking.card import CARD_FILE, MARK, description, model_card
from bit_ray.tracking.fetch import download
from bit_ray.tracking.listing import ListedModel, chosen, in_order, listed, no_such_name, parsed
from bit_ray.tracking.logged import log_reference, read_reference
from bit_ray.tracking.reference import ModelReference, check_package_uri, find
from bit_ray.uris import shown, shown_in
from bit_ray.weights.location import DESCRIPTION_FILE
from bit_ray.weights.package import ModelSpec, parse_description
from bit_ray.weights.tensor_files import Weights

# isort: split
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

log = logging.getLogger(__name__)

_MISSING = ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND")


@dataclass(frozen=True, kw_only=True)
class RegisteredModel:
    """A registered version."""

    name: str
    version: int
    alias: str
    weights_uri: str
    sha256: str
    num_bytes: int


def check_name(name: str, alias: str) -> None:
    """Check a registry name and alias before the training.

    Raises:
        ConfigError: MLflow would refuse one of them.
    """
    if not re.fullmatch(r"[\w][\w. -]*", name):
        raise ConfigError.of("name", repr(name), "letters, digits, _ . - and spaces", "choose another name")
    if not re.fullmatch(r"[\w-]+", alias) or re.fullmatch(r"(?i)v\d+|latest|\d+", alias):
        accepted = "letters, digits, _ and -, but not a number, v1, v2 ... or latest"
        raise ConfigError.of("alias", repr(alias), accepted, "choose another alias")


def register(
    package_uri: str, *, name: str, alias: str, tracking_uri: str, run_id: str | None = None
) -> RegisteredModel:
    """Register the saved model at ``package_uri`` under a name, and point the alias at the new version.

    Only ``model.json`` and the size of the weights file are read. The model card becomes the version's description and
    ``README.md`` next to the weights; see `bit_ray.tracking.card`. A package that is registered already gets no second
    version; the alias moves to the existing one.

    Raises:
        ConfigError: MLflow would refuse the name or alias, or the URI may not be in a registry.
        ModelError: There is no complete package at ``package_uri``.
        TrackingError: The server cannot be reached or refuses.
    """
    check_name(name, alias)
    uri = address.tracking_uri(tracking_uri)
    package_uri = store.absolute(package_uri)
    check_package_uri(package_uri)
    if uri.startswith("http") and store.is_local(package_uri):
        log.warning("%s is a local path: models:/%s@%s will load on this machine only", package_uri, name, alias)
    data, spec, weights = _read_package(package_uri)
    client = server.connect(uri)
    digest = hashlib.sha256(data).hexdigest()
    tags = {
        **{f"bit_ray.{key}": shown(value) for key, value in spec.provenance.items()},
        "bit_ray.weights_uri": package_uri,
        "bit_ray.sha256": weights.sha256,
        "bit_ray.num_bytes": str(weights.num_bytes),
        "bit_ray.description_sha256": digest,
        "bit_ray.model": spec.model,
        "bit_ray.num_classes": str(spec.num_classes),
    }
    try:
        version = _find_version(client, name, tags)
        if version is None:
            card = _card(client, name, alias, spec, weights, run_id)
            reference = {
                "name": name,
                "package_uri": package_uri,
                "description_sha256": digest,
                "description": _shown_description(data),
            }
            model_id = log_reference(client, name, spec, reference, run_id)
            version = _create_version(client, name, model_id, tags, run_id, description(card))
            _write_card(package_uri, card)
        client.set_registered_model_alias(name, alias, version)
    except MlflowException as error:
        raise TrackingError(
            f"{name}: cannot be registered ({one_line(error)}); {package_uri} is complete: repair what the registry "
            "says, and start again"
        ) from None
    return RegisteredModel(
        name=name,
        version=int(version),
        alias=alias,
        weights_uri=package_uri,
        sha256=weights.sha256,
        num_bytes=weights.num_bytes,
    )


def registered_packages(tracking_uri: str, run_id: str) -> set[str]:
    """Return the URIs of the saved models of a run that registered versions refer to.

    Raises:
        TrackingError: The server cannot be reached or refuses.
    """
    client = server.connect(address.tracking_uri(tracking_uri))
    try:
        versions = _all_pages(client.search_model_versions, f"tag.`bit_ray.run_id` = '{run_id}'")
    except MlflowException as error:
        raise TrackingError(f"{shown(client.tracking_uri)}: {one_line(error)}") from None
    return {version.tags["bit_ray.weights_uri"] for version in versions if "bit_ray.weights_uri" in version.tags}


def resolve(uri: str, tracking_uri: str | None = None) -> ModelReference:
    """Look up ``models:/NAME@ALIAS``, ``models:/NAME/VERSION`` or, for the newest version, ``models:/NAME``.

    The registry is ``tracking_uri``, else ``MLFLOW_TRACKING_URI``, else ``bit_ray_runs/mlflow.db``.

    Raises:
        ModelError: No such name, alias or version, or one that bit_ray did not register.
        TrackingError: The server cannot be reached, or no registry is named.
    """
    name = parsed(uri)[0]
    client = server.connect(address.registry_uri(tracking_uri))
    return read_reference(client, name, _look_up(client, uri))


def pull(uri: str, output_dir: str | Path, tracking_uri: str | None = None) -> Path:
    """Copy a registered model's package to a new directory, verified, completely or not at all.

    Raises:
        ModelError: As ``resolve`` and ``fetch``, or ``output_dir`` is not empty.
    """
    directory = Path(output_dir).absolute()
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise ModelError(f"{output_dir}: not empty; accepted: a new or empty directory; choose another")
    download(find(uri, tracking_uri), directory)
    return directory


def list_models(tracking_uri: str | None = None) -> list[ListedModel]:
    """Return all versions that bit_ray registered, by name, newest first.

    Raises:
        TrackingError: The server cannot be reached or refuses.
    """
    client = server.connect(address.registry_uri(tracking_uri))
    try:
        aliases: dict[tuple[str, int], list[str]] = {}
        for model in _all_pages(client.search_registered_models):
            for alias, number in model.aliases.items():
                aliases.setdefault((model.name, int(number)), []).append(alias)
        versions = _all_pages(client.search_model_versions)
    except MlflowException as error:
        raise TrackingError(f"{shown(client.tracking_uri)}: {one_line(error)}") from None
    rows = [
        listed(version.name, int(version.version), aliases, version.tags, version.creation_timestamp)
        for version in versions
    ]
    return in_order([row for row in rows if row is not None])


def _read_package(package_uri: str) -> tuple[bytes, ModelSpec, Weights]:
    """Return the bytes of ``model.json`` and the parsed content, after checking the size of the weights file."""
    file_uri = store.join(package_uri, DESCRIPTION_FILE)
    try:
        data = store.read_bytes(file_uri)
        spec, weights = parse_description(data, file_uri)
        sizes = store.file_sizes([store.join(package_uri, file.file) for file in weights.files])
    except DataError as error:
        raise ModelError(f"{package_uri}: no readable saved model ({one_line(error)})") from None
    for file, size in zip(weights.files, sizes, strict=True):
        if size != file.num_bytes:
            found = "missing" if size is None else f"{size} bytes"
            raise ModelError(
                f"{package_uri}: {file.file}: {found}; accepted: {file.num_bytes} bytes, as in {DESCRIPTION_FILE}; "
                "save it again"
            )
    return data, spec, weights


def _shown_description(data: bytes) -> dict[str, Any]:
    """Return the content of ``model.json``, without the passwords of URIs in it."""
    description: dict[str, Any] = json.loads(data)
    spec = description["spec"]
    told = {name: shown_in(spec[name]) for name in ("recipe", "provenance") if name in spec}
    return {**description, "spec": {**spec, **told}}


def _find_version(client: MlflowClient, name: str, tags: dict[str, str]) -> str | None:
    """Return the version of this name that already points to the same package."""
    same = ("bit_ray.weights_uri", "bit_ray.description_sha256")
    for version in _all_pages(client.search_model_versions, f"name='{name}'"):
        if all(version.tags.get(key) == tags[key] for key in same):
            return str(version.version)
    return None


def _card(client: MlflowClient, name: str, alias: str, spec: ModelSpec, weights: Weights, run_id: str | None) -> str:
    data = client.get_run(run_id).data if run_id is not None else None
    params, metrics = (data.params, data.metrics) if data is not None else ({}, {})
    return model_card(name, spec, weights, alias=alias, params=params, metrics=metrics)


def _write_card(package_uri: str, card: str) -> None:
    """Put the card next to the weights, unless another README.md is there or the folder is not writable."""
    file_uri = store.join(package_uri, CARD_FILE)
    try:
        if store.exists(file_uri) and not store.read_bytes(file_uri).startswith(MARK.encode()):
            log.warning(
                "%s is not a card of bit_ray and is not changed; the card is the version's description", file_uri
            )
        else:
            store.write_bytes(file_uri, card.encode())
    except DataError as error:
        log.warning("%s: the card is only in the registry: %s", file_uri, one_line(error))


def _create_version(
    client: MlflowClient, name: str, model_id: str, tags: dict[str, str], run_id: str | None, text: str
) -> str:
    with suppress(MlflowException):  # the name exists already; anything else shows in the next call
        client.create_registered_model(name)
    logged = client.get_logged_model(model_id)
    if client.tracking_uri.startswith("http"):
        where = {"source": f"models:/{model_id}", "model_id": model_id}
    else:
        # With a database, MLflow would look up the model's id in its global tracking URI, not in this one.
        where = {"source": logged.artifact_location}
    # Every version is ready at once; waiting for it would add a line to the log.
    version = client.create_model_version(
        name, run_id=run_id, tags=tags, description=text, await_creation_for=0, **where
    )
    if not client.tracking_uri.startswith("http"):  # as a server does
        pages = json.dumps([{"name": name, "version": version.version}])
        client.set_logged_model_tags(model_id, {"mlflow.modelVersions": pages})
    return str(version.version)


def _look_up(client: MlflowClient, uri: str) -> str:
    """Return the number of the version that the URI names; the error lists those that exist."""
    name, alias, _ = parsed(uri)
    try:
        aliases = dict(client.get_registered_model(name).aliases)
        numbers: list[str] = []
        if alias is None:
            quote = '"' if "'" in name else "'"
            versions: list[ModelVersion] = _all_pages(client.search_model_versions, f"name={quote}{name}{quote}")
            numbers = [str(version.version) for version in versions]
    except MlflowException as error:
        if error.error_code not in _MISSING:
            raise ModelError(f"{uri}: {one_line(error)}") from None
        names = [model.name for model in _all_pages(client.search_registered_models)]
        raise no_such_name(uri, names) from None
    return chosen(uri, aliases, numbers)


def _all_pages(search: Callable[..., Any], query: str | None = None) -> list[Any]:
    found, token = [], None
    while True:
        page = search(query, page_token=token) if token else search(query)
        found.extend(page)
        token = page.token
        if not token:
            return found
