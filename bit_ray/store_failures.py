"""What the failure of a store means: one line with the remedy, or another attempt."""

import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

from bit_ray.errors import DataError, StoreError

T = TypeVar("T")

# How long a read of training data is retried while the store fails, seconds.
PATIENCE_S = float(os.environ.get("BIT_RAY_STORE_PATIENCE_S", "120"))
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 10.0
# A bucket that did not answer in all attempts of a request is asked once per request for so long, or until it answers:
# one behind a network that is cut takes 44 s to fail, and a run that ends has several things to write.
_AWAY_S = 60.0
_away: dict[str, float] = {}
_GOOGLES_FAILURES = ("google::cloud::Status", "I/O operation on closed file")
_NO_BUCKET = re.compile("NO_SUCH_BUCKET|NoSuchBucket")
_NO_TOKEN = "Could not create a OAuth2 access token"
_REFUSALS = re.compile(
    "ExpiredToken|EXPIRED_TOKEN|TokenRefreshRequired|InvalidToken|REQUEST_EXPIRED|REQUEST_TIME_TOO_SKEWED"
    "|RequestTimeTooSkewed|ACCESS_DENIED|SIGNATURE_DOES_NOT_MATCH|INVALID_SIGNATURE|INVALID_ACCESS_KEY_ID"
    "|INVALID_CLIENT_TOKEN_ID|UNRECOGNIZED_CLIENT|MISSING_AUTHENTICATION_TOKEN|PERMISSION_DENIED|UNAUTHENTICATED"
    f"|{_NO_TOKEN}"
)


@contextmanager
def explained(uri: str | Path) -> Iterator[None]:
    """Turn a file system's exception about ``uri`` into a StoreError of one line with the remedy.

    For a malformed URI, into a DataError.
    """
    try:
        yield
    except (OSError, ValueError, pa.ArrowException) as error:
        if _is_of_the_store(error):
            raise failure(uri, error) from error
        if not isinstance(error, ValueError):
            raise
        # pyarrow's ArrowInvalid: a malformed URI, an empty key
        raise DataError(f"{uri}: {' '.join(str(error).split())}; correct the path") from error


def patiently(uri: str | Path, attempt: Callable[[], T], patience_s: float | None = None) -> T:
    """Return the result of ``attempt``, with retries while the store fails for temporary reasons.

    The pauses grow from 0.1 s to 10 s, with jitter, so that many readers do not retry at the same time.

    Args:
        uri: What is read, for messages.
        attempt: Reads; exceptions that are not the store's are not retried.
        patience_s: Seconds after which no new attempt starts; by default PATIENCE_S. A local file has one attempt.

    Raises:
        FileNotFoundError: No such file, at once.
        StoreError: The store refuses, at once; or it still fails after ``patience_s``.
    """
    patience_s = PATIENCE_S if patience_s is None else patience_s
    start = time.monotonic()
    longest = _FIRST_PAUSE_S
    while True:
        try:
            result = attempt()
        except FileNotFoundError:
            raise
        except (OSError, ValueError, pa.ArrowException) as error:
            if not _is_of_the_store(error):
                raise
            pause = random.uniform(longest / 2, longest)
            elapsed = time.monotonic() - start
            if not _may_pass(uri, error) or elapsed + pause > patience_s:
                raise failure(uri, error, f" (tried for {elapsed:.0f} s)" if elapsed > 1 else "") from error
            longest = min(2 * longest, _LONGEST_PAUSE_S)
        else:
            _away.pop(_bucket(uri), None)
            return result
        time.sleep(pause)


def _is_of_the_store(error: Exception) -> bool:
    """Return whether a store or disk has failed.

    For Google's, pyarrow raises whatever the status resembles, and calls a file closed that it could not read.
    """
    return isinstance(error, OSError) or any(sign in str(error) for sign in _GOOGLES_FAILURES)


def failure(uri: str | Path, error: Exception, tried: str = "") -> StoreError:
    """Return the error of one line for a file system's exception about ``uri``."""
    found = StoreError(f"{uri}: {_explanation(uri, error)}{tried}")
    found.passing = _may_pass(uri, error)
    if found.passing:
        _away[_bucket(uri)] = time.monotonic()
    return found


def is_away(uri: str | Path) -> bool:
    """Return whether the bucket of ``uri`` has just failed for something that may pass, and has not answered since."""
    return time.monotonic() - _away.get(_bucket(uri), -_AWAY_S) < _AWAY_S


def _bucket(uri: str | Path) -> str:
    scheme, _, rest = str(uri).partition("://")
    return f"{scheme}://{rest.partition('?')[0].partition('/')[0]} {endpoint()}"


def _may_pass(uri: str | Path, error: Exception) -> bool:
    lasting = isinstance(error, FileNotFoundError | PermissionError) or _refusal(error) or _NO_BUCKET.search(str(error))
    return not (_is_local(uri) or lasting)


def _explanation(uri: str | Path, error: Exception) -> str:
    text = " ".join(str(error).split())
    if google := re.search(r"google::cloud::Status\((.*)", text):
        return _googles_explanation(google[1], error)
    where = endpoint() or "the store"
    if _NO_BUCKET.search(text):
        return "no such bucket; create it or correct the name"
    if isinstance(error, FileNotFoundError):
        return "no such file, directory or bucket; check the path"
    if isinstance(error, PermissionError):
        return "permission denied; check the owner and mode of the path"
    if refusal := _refusal(error):
        return (
            f"refused by {where} ({refusal}); check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the rights of the "
            "key, renew expired credentials, and start again: a run continues where it stopped"
        )
    if "NETWORK_CONNECTION" in text or "curlCode" in text:
        return f"{where} cannot be reached; check AWS_ENDPOINT_URL and the network"
    if re.search("HTTP status 5[0-9][0-9]|SLOW_DOWN|INTERNAL_FAILURE|SERVICE_UNAVAILABLE", text):
        return f"{where} answers with errors again and again ({text}); repair the store and start again"
    if "411" in text or "MissingContentLength" in text:
        return "the store does not support trailing checksums; set AWS_REQUEST_CHECKSUM_CALCULATION=when_required"
    return f"cannot be read or written ({text})"


def _googles_explanation(status: str, error: Exception) -> str:
    """Return what to do about a ``google::cloud::Status``, ``CODE: ... last message of WORDS error_info={...}``."""
    message = re.sub(r"^.*last message of | error_info=.*", "", status)
    message = message.rpartition("underlying error message was: ")[2][:300]
    if isinstance(error, FileNotFoundError):
        if "CreateResumableUpload" in status:  # nothing but the bucket has to be there
            return "no such bucket; create it or correct the name"
        return "no such file, directory or bucket; check the path"
    if _NO_TOKEN in status:
        return no_credentials(message)
    if refusal := _refusal(error):
        return (
            f"refused by Google Cloud Storage ({refusal}); check GOOGLE_APPLICATION_CREDENTIALS and the roles of the "
            "account, renew expired credentials, and start again: a run continues where it stopped"
        )
    if re.search(r"CURL error \[(5|6|7|28|35)\]", message):
        return f"Google Cloud Storage cannot be reached ({message}); check the network"
    return f"Google Cloud Storage fails again and again ({message}); wait until it works, and start again"


def _refusal(error: Exception) -> str | None:
    """Return the words of the store's refusal, or None: a permanent failure, unlike 408, 429 and 5xx."""
    text = str(error)
    named = _REFUSALS.search(text)
    status = re.search(r"HTTP status (4\d\d)", text)
    # The answer to a HEAD has no text, and AWS answers an expired token with 400.
    if named is None and (status is None or status[1] in ("404", "408", "411", "416", "429")):
        return None
    return named[0] if named else f"HTTP status {status[1]}" if status else None


def no_credentials(why: str) -> str:
    """Return what to do where there are no credentials for Google's store."""
    return (
        f"no credentials for Google Cloud Storage ({why}); set GOOGLE_APPLICATION_CREDENTIALS to a key file, "
        "run `gcloud auth application-default login`, or write 'anonymous@' before the name of a public bucket"
    )


def endpoint() -> str:
    """Return the S3 endpoint that the environment names; empty without one."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def _is_local(uri: str | Path) -> bool:
    scheme, separator, _ = str(uri).partition("://")
    return not separator or scheme.lower() == "file"
