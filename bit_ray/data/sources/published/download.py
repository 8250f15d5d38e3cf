"""Download of a publisher's file: continued after a stop, checked, and under its final name only when complete."""

import fcntl
import hashlib
import logging
import os
import shutil
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

from bit_ray import store
from bit_ray.errors import DataError

log = logging.getLogger(__name__)

_TIMEOUT_S = 60
_COPY_BYTES = 2**20


def download(url: str, target: Path, *, md5: str) -> None:
    """Fetch a file; continue the download of an earlier, interrupted call.

    Raises:
        DataError: The server cannot be reached, does not have the file, stops in the middle, or sends another file than
            the one with this MD5; or another process is fetching it.
    """
    partial = target.with_name(f".{target.name}.partial")
    with store.explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(f"{target}: another process is downloading it; wait for it") from None
            try:
                _fetch(url, file.fileno())
            except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
                reason = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
                got = file.seek(0, os.SEEK_END)
                if not got:
                    partial.unlink()
                kept = f" ({got:,} bytes are kept; the same command continues)" if got else ""
                raise DataError(
                    f"{url}: cannot be downloaded: {reason}{kept}; check the network, or fetch it elsewhere and put it "
                    f"at {target}"
                ) from None
        with open(partial, "rb") as whole:
            found = hashlib.file_digest(whole, "md5").hexdigest()
        if found != md5:
            partial.unlink()
            raise DataError(f"{url}: MD5 {found}; accepted: {md5}, as published; download it again")
        os.replace(partial, target)


def _fetch(url: str, fd: int) -> None:
    """Append the missing bytes to the open file."""
    done = os.fstat(fd).st_size
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is missing
            return
        raise
    with response, os.fdopen(os.dup(fd), "ab") as file:
        if done and response.status != 206:  # the server begins at the start
            file.truncate(0)
        expected = response.headers.get("Content-Length")
        if expected is not None and not expected.isdecimal():
            raise HTTPException(f"the server reports a length of {expected[:80]!r}")
        log.info("%s: downloading%s", url, f" {int(expected) / 1e6:,.1f} MB" if expected else "")
        shutil.copyfileobj(response, file, _COPY_BYTES)
        file.flush()
        got = os.fstat(fd).st_size - (done if response.status == 206 else 0)
    if expected is not None and got < int(expected):
        raise HTTPException(f"the connection ended {int(expected) - got:,} bytes early")
