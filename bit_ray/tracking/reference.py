"""What the registry has instead of a model: ``reference.json``. MLflow is imported only if it is needed to find it."""

import re
from dataclasses import dataclass
from pathlib import Path

from bit_ray import store
from bit_ray.config import check_digest, check_num_bytes, from_json, is_plain, read_document
from bit_ray.errors import BitRayError, ConfigError, DataError, ModelError, one_line
from bit_ray.tracking.address import registry_uri
from bit_ray.tracking.listing import find_embedded
from bit_ray.uris import shown
from bit_ray.weights.package import Description, ModelSpec

REFERENCE_FILE = "reference.json"

_MAX_URI = 4096  # Linux's limit for a path; a store's limit for a key is 1,024 bytes


@dataclass(frozen=True, kw_only=True)
class ModelReference:
    """What a version points to: a package directory and the content that it must have."""

    name: str
    version: int
    weights_uri: str
    sha256: str
    num_bytes: int
    description_sha256: str
    spec: ModelSpec

    def __post_init__(self) -> None:
        check_digest("sha256", self.sha256)
        check_digest("description_sha256", self.description_sha256)
        check_num_bytes("num_bytes", self.num_bytes)
        check_package_uri(self.weights_uri)

    @property
    def uri(self) -> str:
        """Its name in messages."""
        return f"models:/{self.name}/{self.version}" if self.version else f"models:/{self.name}"


@dataclass(frozen=True, kw_only=True)
class _Document:
    """The content of ``reference.json``."""

    name: str = "unnamed"
    package_uri: str
    description_sha256: str
    description: Description

    def __post_init__(self) -> None:
        # Characters that MLflow refuses in the name of a model, or that would break the line of a message.
        if not self.name.strip() or {"/", ":"} & {*self.name} or len(self.name) > 256 or not is_plain(self.name):
            raise ConfigError.of("name", f"given {self.name[:80]!r}", "the name of a registered model")


def check_package_uri(uri: str, field: str = "package_uri") -> None:
    """Refuse what may not be in a registry as the URI of a package; ``field`` is its name in the message.

    A user who loads a version reads from this URI with his own keys. So it may contain no keys, which all could read,
    and no query, which could name another server to send the user's keys to.

    Raises:
        ConfigError: It is neither an absolute local path nor a bucket and a path in it, or has other parts.
    """
    if len(uri) > _MAX_URI:
        raise ConfigError.of(field, f"{len(uri):,} characters", f"at most {_MAX_URI:,}")
    given = f"given {shown(uri)!r}"
    if not is_plain(uri):
        raise ConfigError.of(field, given, "text without control characters")
    if uri.startswith(("/", "file:///")):
        return
    match = re.fullmatch(r"(?:s3|gs)://([^/?]+)(?:/[^?]*)?(\?.*)?", uri)
    if match is None:
        raise ConfigError.of(field, given, "an absolute local path, s3://bucket/path or gs://bucket/path")
    try:
        store.check_uri(uri)
    except DataError as error:
        raise ConfigError(str(error)).about(field) from None
    if match[2]:
        accepted, remedy = "a URI without a query", "leave the query out, and set AWS_ENDPOINT_URL instead"
        raise ConfigError.of(field, given, accepted, remedy)
    if not re.fullmatch(r"(?:anonymous@)?[\w.-]+", match[1], re.ASCII):
        raise ConfigError.of(field, given, "the name of a bucket, of letters, digits, . _ and -")


def find(uri: str, tracking_uri: str | None = None) -> ModelReference:
    """Look up ``models:/NAME@ALIAS`` and the like, as `bit_ray.tracking.registry.resolve`, which this needs less often.

    An embedded store is read without MLflow, whose import takes seconds; what is not as expected is left to it.

    Raises:
        ModelError: no such name, alias or version, or one that bit_ray did not register.
        TrackingError: the server cannot be reached, or none is named.
    """
    found = find_embedded(registry_uri(tracking_uri), uri)
    if found is not None and store.is_local(found.source):
        try:
            data = read_document(Path(store.filesystem(found.source)[1], REFERENCE_FILE))
        except (OSError, BitRayError):
            pass
        else:
            return parse_reference(data, found.name, found.version)
    from bit_ray.tracking.registry import resolve

    return resolve(uri, tracking_uri)


def parse_reference(data: bytes, name: str = "", version: int = 0) -> ModelReference:
    """Read the bytes of a ``reference.json``; name and version are for messages, the name by default its own.

    Raises:
        ModelError: They are not such a file.
    """
    try:
        document = from_json(_Document, data)
        name = name or document.name
        return ModelReference(
            name=name,
            version=version,
            weights_uri=document.package_uri,
            sha256=document.description.weights.sha256,
            num_bytes=document.description.weights.num_bytes,
            description_sha256=document.description_sha256,
            spec=document.description.spec,
        )
    except ConfigError as error:
        raise ModelError(
            f"models:/{name}/{version}: {REFERENCE_FILE} is damaged ({one_line(error)}); accepted: one that bit_ray "
            "wrote; register the model again"
        ) from None
