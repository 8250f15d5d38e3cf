"""Which file system serves a URI, with which endpoint and credentials."""

import os
import re
import socket
from functools import lru_cache
from pathlib import Path
from typing import Any

from pyarrow import fs as pafs

from bit_ray.errors import DataError, StoreError
from bit_ray.store_failures import endpoint, explained, is_away, no_credentials
from bit_ray.uris import MASK

_REMOTE = ("s3", "gs")
_PUBLIC = "anonymous@"
"""Prefix of a Google bucket that is read without a key."""
_GIVE_KEYS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS",
}
_METADATA_HOST = "metadata.google.internal"
"""Name of what gives machines in Google's cloud their credentials; it is known nowhere else."""
_VARIABLES = ("AWS_", "GOOGLE_", "CLOUD_STORAGE_")
# Further attempts of each single request, 25 ms to 3 s apart: at 20 % failures one request in 10,000,000 fails, and a
# store that refuses to connect fails after 6 s.
_ATTEMPTS = 9
# For how long Google's library, whose own limit is 15 minutes, tries a request again; and where nothing answers.
_GOOGLE_S, _GOOGLE_AWAY_S = 60, 5


def scheme_of(uri: str | Path) -> str:
    """Return ``file``, ``s3`` or ``gs``.

    Raises:
        DataError: The URI has another scheme.
    """
    scheme, separator, _ = str(uri).partition("://")
    scheme = scheme.lower() if separator else "file"
    if scheme not in ("file", *_REMOTE):
        raise DataError(f"{uri}: scheme {scheme}://; accepted: a local path, file://, s3:// or gs://; correct the path")
    return scheme


def is_local(uri: str | Path) -> bool:
    """Return whether the URI is a path on this machine, with or without ``file://``."""
    return scheme_of(uri) == "file"


def filesystem(uri: str | Path) -> tuple[pafs.FileSystem, str]:
    """Return the file system that serves the URI, and the path inside it.

    An S3 endpoint comes from ``AWS_ENDPOINT_URL`` or from the URI (``s3://bucket/key?endpoint_override=host:port``).
    A public Google bucket is read without credentials as ``gs://anonymous@bucket/path``.

    Raises:
        DataError: The scheme is not one of file, s3 and gs, the bucket is not named, or there is a key in the URI.
        StoreError: There are no credentials for Google's store.
    """
    text = str(uri)
    check_uri(text)
    scheme = scheme_of(text)
    if scheme == "file":
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(text.removeprefix("file://")))
    rest, _, query = text.partition("://")[2].partition("?")
    path = rest.strip("/")
    if not path:
        raise DataError(f"{text}: no bucket; accepted: {scheme}://bucket/path; add the bucket")
    if scheme == "s3":
        _check_endpoint()
        # Stores older than AWS's trailing checksums (Ceph, MinIO, rclone) answer them with HTTP 411.
        os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    environment = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith(_VARIABLES)))
    with explained(text):
        return _remote(scheme, path.split("/", 1)[0], query, environment, is_away(text)), path.removeprefix(_PUBLIC)


def check_uri(uri: str | Path) -> None:
    """Refuse a URI with a key or a password in it: it would be recorded, logged and shown.

    Raises:
        DataError: It has a key or a password, or the scheme is not one of file, s3 and gs.
    """
    text = str(uri)
    scheme = scheme_of(text)
    if scheme == "file":
        return
    rest, _, query = text.partition("://")[2].partition("?")
    bucket = rest.strip("/").split("/", 1)[0]
    if re.search("[@:]", bucket.removeprefix(_PUBLIC) if scheme == "gs" else bucket) or "@" in query:
        given = f"{scheme}://{MASK}" + (f"@{text.rpartition('@')[2]}" if "@" in text else "")
        raise DataError(
            f"{given}: a key or a password in a URI, which would be recorded; accepted: {scheme}://bucket/path; "
            f"{_GIVE_KEYS[scheme]}"
        )


def join(uri: str | Path, *parts: str) -> str:
    """Return the URI of something inside the directory ``uri``, keeping a query such as ``?endpoint_override=...``."""
    base, mark, query = str(uri).partition("?") if not is_local(uri) else (str(uri), "", "")
    return "/".join([base.rstrip("/"), *(part.strip("/") for part in parts)]) + mark + query


def absolute(uri: str | Path) -> str:
    """Return the URI in a form that is also valid in a process with another working directory.

    Raises:
        DataError: The scheme is not one of file, s3 and gs, or there is a key in the URI.
    """
    check_uri(uri)
    return filesystem(uri)[1] if is_local(uri) else str(uri).rstrip("/")


def _check_endpoint() -> None:
    """Refuse an endpoint with a password in it, which no store accepts and every message of the library repeats."""
    given = endpoint()
    if "@" in given:
        raise DataError(
            f"AWS_ENDPOINT_URL: {MASK}@{given.rpartition('@')[2]}: a user in it; accepted: http(s)://host:port; "
            f"{_GIVE_KEYS['s3']}"
        )


def _check_google_credentials(bucket: str) -> None:
    """Refuse to look for credentials where there are none, which takes Google's library a minute."""
    own = os.path.expanduser("~/.config/gcloud/application_default_credentials.json")  # of `gcloud auth`
    if os.environ.get("GOOGLE_APPLICATION_CREDENTIALS") or os.path.exists(own):
        return
    try:
        socket.getaddrinfo(os.environ.get("GCE_METADATA_ROOT") or _METADATA_HOST, 80)
    except OSError:
        raise StoreError(f"gs://{bucket}: {no_credentials('none are given')}") from None


@lru_cache(maxsize=64)
def _remote(scheme: str, authority: str, query: str, environment: tuple[Any, ...], away: bool) -> pafs.FileSystem:
    if scheme == "gs" and not authority.startswith(_PUBLIC):
        _check_google_credentials(authority)
    if scheme == "gs" and "retry_limit_seconds" not in query:
        query = "&".join(filter(None, (query, f"retry_limit_seconds={_GOOGLE_AWAY_S if away else _GOOGLE_S}")))
    # Only the bucket goes through the URL parser: keys may have spaces and percent signs.
    files = pafs.FileSystem.from_uri(f"{scheme}://{authority}" + (f"?{query}" if query else ""))[0]
    if scheme != "s3":
        return files
    # from_uri reads AWS_ENDPOINT_URL and finds the bucket's region, but its retries cannot be set, and it retries only
    # a refused connection. Its pickle has the values that it found.
    options = {name: value for name, value in files.__reduce__()[1][0].items() if value not in (None, "", -1.0)}
    del options["proxy_options"]  # from_uri sets none, and empty ones are refused
    retries = pafs.AwsDefaultS3RetryStrategy(max_attempts=0 if away else _ATTEMPTS)
    return pafs.S3FileSystem(**options, retry_strategy=retries)
