"""The headers of a tar file: where each regular file in it is.

Formats are the old one, POSIX ustar and pax, and GNU's (POSIX pax(1); GNU tar's manual, "Basic Tar Format"). Every
number is checked before it is used. Python's tarfile reads extended headers of any size, and some of them in quadratic
time.
"""

import io
from collections.abc import Iterator
from typing import NamedTuple

_BLOCK = 512
_MAX_FILES = 2**25
# A name has at most 4,096 bytes; other content, attributes of files, is skipped.
_MAX_EXTENSION = 2**20

_REGULAR = (b"0", b"\0", b"7")
_NO_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, directories, pipes, with any claimed size
_LONG_NAME, _LONG_LINK, _SPARSE = b"L", b"K", b"S"
_PAX, _PAX_OF_ALL = (b"x", b"X"), b"g"


class TarError(ValueError):
    """Bytes that are not a complete tar file, or one of a kind that cannot be read in place."""


class Extent(NamedTuple):
    """A regular file: ``length`` bytes from byte ``offset`` on."""

    name: str
    offset: int
    length: int


def regular_files(file: io.BufferedIOBase, num_bytes: int) -> Iterator[Extent]:
    """Iterate over the regular files of a tar file, in their order.

    Args:
        file: Read and sought forwards from byte 0 on; between two steps the caller may read the file that was found.
        num_bytes: Its number of bytes; a member beyond it is an error.

    Raises:
        TarError: Not a tar file, damaged, cut short, with a sparse file, or with 2^25 or more files.
    """
    at = count = 0
    extensions: dict[str, bytes] = {}  # content of the headers before a file's own header
    while True:
        file.seek(at)
        header = _exactly(file, _BLOCK, "it has no end mark")
        if header == bytes(_BLOCK):
            return
        _check_sum(header)
        kind, at = header[156:157], at + _BLOCK
        length = _size(header)
        if kind in _NO_DATA or (kind == b"\0" and header[:100].rstrip(b"\0").endswith(b"/")):
            extensions = {}
            continue
        is_extension = kind in (*_PAX, _PAX_OF_ALL, _LONG_NAME, _LONG_LINK)
        if "size" in extensions and not is_extension:
            length = _number(extensions["size"], 10)
        if at + length > num_bytes:
            raise TarError(f"it is truncated: {length:,} bytes from byte {at:,} on, of {num_bytes:,}")
        if is_extension:
            if length > _MAX_EXTENSION:
                raise TarError(f"a header of {length:,} bytes")
            data = _exactly(file, length, "it is truncated in a header")
            extensions |= {"path": data.split(b"\0")[0]} if kind == _LONG_NAME else {}
            extensions |= _records(data) if kind in _PAX else {}
            if kind == _PAX_OF_ALL and _records(data).keys() & {"path", "size"}:
                raise TarError("a header for all files with a path or a size")
        else:
            if kind == _SPARSE or any(key.startswith("GNU.sparse.") for key in extensions):
                raise TarError("a sparse file, with its holes left out")
            if kind in _REGULAR:
                count += 1
                if count == _MAX_FILES:
                    raise TarError(f"{_MAX_FILES:,} files")
                name = extensions.get("path") or _name(header)
                yield Extent(name.decode("utf-8", "surrogateescape"), at, length)
            extensions = {}
        at += -(-length // _BLOCK) * _BLOCK


def _exactly(file: io.BufferedIOBase, num_bytes: int, else_say: str) -> bytes:
    data = file.read(num_bytes) or b""
    if len(data) < num_bytes:
        raise TarError(else_say)
    return data


def _check_sum(header: bytes) -> None:
    """The sum of the header's bytes, with spaces for its own eight; some programs add signed bytes."""
    unsigned = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    found = _number(header[148:156].strip(b" \0"), 8)
    if found not in (unsigned, unsigned - 256 * sum(byte > 127 for byte in header[:148] + header[156:])):
        raise TarError("a header with a wrong checksum")


def _size(header: bytes) -> int:
    field = header[124:136]
    if not field[0] & 0x80:
        return _number(field.strip(b" \0") or b"0", 8)
    if field[0] != 0x80:  # GNU's numbers in base 256, this one negative or beyond any disk
        raise TarError("a file with an invalid size")
    return int.from_bytes(field[1:], "big")


def _number(text: bytes, base: int) -> int:
    # Not only int(), which accepts signs, underscores and other alphabets, and is slow for a long text.
    if not text.isdigit() or len(text) > 20:
        raise TarError(f"an invalid number: {text[:20]!r}")
    try:
        return int(text, base)
    except ValueError:
        raise TarError(f"an invalid number: {text!r}") from None


def _name(header: bytes) -> bytes:
    name, prefix = header[:100].split(b"\0")[0], header[345:500].split(b"\0")[0]
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _records(data: bytes) -> dict[str, bytes]:
    """Read ``LENGTH KEY=VALUE`` records, each of LENGTH bytes, with a line break at its end."""
    found: dict[str, bytes] = {}
    at = 0
    while at < len(data) and data[at]:
        space = data.find(b" ", at, at + 20)
        length = _number(data[at:space], 10) if space >= 0 else 0
        key, equals, value = data[space + 1 : at + length].partition(b"=")
        if not equals or not value.endswith(b"\n") or at + length > len(data):
            raise TarError("an invalid extended header")
        found[key.decode("utf-8", "replace")] = value[:-1]
        at += length
    return found
