"""Masks secrets in URIs that are shown or recorded: no password, no key, no signature.

A password may contain slashes, spaces and at signs, so its end in a text is not certain. In doubt, too much is masked
rather than too little.
"""

import re
from collections.abc import Mapping
from typing import Any

MASK = "***"

# A possible user after "://": before the first slash, question mark or space there is an @, or a colon and more; and it
# is not masked yet.
_USER = re.compile(rf"://(?!{re.escape(MASK)}@)(?=[^\s/?#]*(?:@|:\S))")
# A setting in a query or a fragment that is named like a secret, as in signed URLs and those of databases.
_SECRET = re.compile(
    r"([?&#;][^\s=&?#]{0,64}(?:key|secret|token|pass|pwd|sig|credential|auth|odbc_connect)[^\s=&?#]{0,64}=)[^\s&]+",
    re.IGNORECASE,
)
_USER_IN_SETTING = re.compile(r"([?&#;][^\s=&?#]{1,64}=)[^\s&]*@")


def shown(text: str) -> str:
    """Return a text with ``***`` for the user, the password and the signature of every URI in it.

    Masked are the text from ``://`` to the last ``@`` of the line, if a user may begin there, and the value of every
    setting that is named like a secret. A user name with a slash or a space, and a password that begins with a space,
    are not found.
    """
    text = "\n".join(map(_without_user, text.split("\n")))
    return _USER_IN_SETTING.sub(rf"\1{MASK}@", _SECRET.sub(rf"\1{MASK}", text))


def shown_in(data: Any) -> Any:
    """Return plain data with `shown` applied to every text in its mappings and lists."""
    if isinstance(data, str):
        return shown(data)
    if isinstance(data, Mapping):
        return {key: shown_in(value) for key, value in data.items()}
    return [shown_in(value) for value in data] if isinstance(data, (list, tuple)) else data


def _without_user(line: str) -> str:
    end = line.rfind("@") + 1
    begin = _USER.search(line, 0, end)
    return f"{line[: begin.end()]}{MASK}@{line[end:]}" if begin else line
