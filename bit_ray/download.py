"""Files from web servers: a download continues after a stop, is checked, and gets its name when it is whole."""

import base64
import hashlib
import os
import re
import urllib.error
import urllib.request
from email.message import Message
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO

from bit_ray.errors import one_line
from bit_ray.locks import locked
from bit_ray.progress import console, track

_TIMEOUT_S = 60.0
_CHUNK = 2**20


def download(url: str, target: Path, *, md5: str = "", wait_s: float = 0.0) -> None:
    """Fetch a file that is not there yet; continue the download of an earlier, interrupted call.

    Args:
        url: Where it is.
        target: What it becomes.
        md5: Of the whole file, hex; empty: the one that the server states, if any.
        wait_s: How long to wait for another process that fetches it, seconds.

    Raises:
        ConfigError: Another process is fetching it.
        OSError: The server cannot be reached, does not have the file, stops in the middle or sends another file; or the
            disk is full. What has come is kept, unless it is another file.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = target.with_name(f".{target.name}.lock")
    with locked(lock, f"{target} is being downloaded", remedy="wait for it", wait_s=wait_s):
        if target.is_file():  # downloaded meanwhile
            return
        partial = target.with_name(f".{target.name}.partial")
        with partial.open("ab") as file:
            try:
                headers = _append(url, file)
            except (OSError, HTTPException) as error:
                got = file.seek(0, os.SEEK_END)
                if not got:
                    partial.unlink()
                kept = f" ({got:,} bytes are kept; the same command continues)" if got else ""
                raise OSError(f"{_reason(error)}{kept}") from error
        stated = re.search(r"md5=([\w+/=]+)", headers.get("x-goog-hash", ""))
        accepted = md5 or (base64.b64decode(stated[1]).hex() if stated else "")
        with partial.open("rb") as whole:
            found = hashlib.file_digest(whole, "md5").hexdigest()
        if accepted and found != accepted:
            partial.unlink()
            raise OSError(f"MD5 {found}; accepted: {accepted}, as published; nothing was kept, download it again")
        partial.replace(target)


def _append(url: str, file: BinaryIO) -> Message:
    """Append the missing bytes, and return the headers of the answer."""
    done = file.seek(0, os.SEEK_END)
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == 416 and done:  # nothing is missing
            return error.headers
        raise
    with response:
        if done and response.status != 206:  # the server begins at the start
            file.truncate(0)
            done = 0
        length = response.headers.get("Content-Length", "")
        if length and not length.isdecimal():
            raise HTTPException(f"the server reports a length of {length[:80]!r}")
        console.print(f"{url}: downloading" + (f" {int(length) / 1e6:,.1f} MB" if length else ""))
        total = done + int(length or 0)
        with track(url.rpartition("/")[2], -(-total // _CHUNK) if length else None, "MiB") as advance:
            advance(done // _CHUNK)
            while data := response.read(_CHUNK):
                file.write(data)
                advance(1)
        missing = total - file.seek(0, os.SEEK_END)
        if length and missing > 0:
            raise HTTPException(f"the connection ended {missing:,} bytes early")
        return response.headers


def _reason(error: BaseException) -> str:
    """Return what went wrong in few words."""
    cause = error.reason if type(error) is urllib.error.URLError else error
    if isinstance(cause, TimeoutError):
        return f"no answer within {_TIMEOUT_S:.0f} s"
    return one_line(cause) if isinstance(cause, BaseException) else str(cause)
