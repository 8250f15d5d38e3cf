"""The strict codec between frozen dataclasses and plain data: JSON documents, digests, dotted replacement.

A configuration is a tree of frozen dataclasses whose fields are declared as ``bool``, ``int``, ``float``, ``str``,
``Literal``, ``tuple``, ``dict[str, ...]``, another dataclass, ``Any`` (plain data) or a union of these. Data that is
read is checked against the declaration and nothing is guessed: an unknown name or a wrong type is an error that names
its position.
"""

import dataclasses
import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from bit_ray.errors import ConfigError, MissingError, brief, did_you_mean

T = TypeVar("T")

DEFAULT_STORAGE = "bit_ray_runs"
"""Folder of runs, shards, data sets and the embedded MLflow store, below the current directory."""
MAX_DOCUMENT_BYTES = 64_000_000
"""Most bytes of a JSON document that is read whole; the description of a model with 21,843 classes has 600,000."""

_SCALARS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text", NoneType: "null"}
# In YAML 1.1 a float needs a dot and a signed exponent, so PyYAML reads `1e-4` as text.
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
_MAX_NAME_BYTES = 200  # file systems allow 255, and a folder that is being made has a longer name


def to_dict(config: Any) -> dict[str, Any]:
    """Return the config as plain JSON-able data: nested dicts in field order, tuples as lists, floats as floats.

    Raises:
        ConfigError: A value set in code is not of its field's declared type.
    """
    plain = _plain(_read(type(config), config, ""), "")
    assert isinstance(plain, dict)
    return plain


def from_dict(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """Build the dataclass ``cls`` from plain data; ``where`` is the dotted path of ``data``, named in errors.

    Raises:
        ConfigError: An unknown or missing name, a wrong type, or a value that the dataclass itself refuses.
    """
    config = _read(cls, data, where)
    assert isinstance(config, cls)
    return config


def from_json(cls: type[T], data: bytes) -> T:
    """Build the dataclass ``cls`` from an untrusted JSON document of at most 64 MB.

    Raises:
        ConfigError: It is not such a document; the message always has at most about 300 characters.
    """
    if len(data) > MAX_DOCUMENT_BYTES:
        raise ConfigError(f"more than {MAX_DOCUMENT_BYTES:,} bytes")
    try:
        plain = json.loads(data)
        json.dumps(plain, ensure_ascii=False).encode()  # a lone surrogate cannot be written
        return from_dict(cls, plain)
    except RecursionError:
        raise ConfigError("lists or mappings nested too deeply") from None
    except ValueError as error:  # ConfigError is one of them
        text = str(error)
        raise ConfigError(text if len(text) <= 300 else f"{text[:297]}...") from None


def read_document(path: Path) -> bytes:
    """Return the bytes of a local file; of one that is too large for `from_json`, only enough to detect that.

    Raises:
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        return file.read(MAX_DOCUMENT_BYTES + 1)


def check_digest(name: str, value: str) -> None:
    """Refuse a value that is not a SHA-256 as hashlib writes it; file names are made from digests in documents.

    Raises:
        ConfigError: It is not one; ``name`` is its name in the message.
    """
    if not re.fullmatch("[0-9a-f]{64}", value):
        raise ConfigError.of(name, f"given {brief(value)}", "a SHA-256 of 64 digits, 0 to 9 and a to f", "")


def check_num_bytes(name: str, value: int) -> None:
    """Refuse a value that is not the size of a file.

    Raises:
        ConfigError: It is not one; ``name`` is its name in the message.
    """
    if not 0 <= value < 2**63:
        raise ConfigError.of(name, f"given {brief(value)}", "the size of a file, 0 or more bytes", "")


def is_plain(text: str) -> bool:
    """Return whether a text has no control characters (including line ends) and no lone surrogates."""
    return not any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text)


def digest(config: Any) -> str:
    """Return the SHA-256, in hex, of the canonical JSON of a config or of plain data: the same for equal configs."""
    plain = to_dict(config) if _is_config(config) else _plain(config, "")
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def replace(config: T, changes: Mapping[str, Any]) -> T:
    """Return the config with fields replaced by dotted name, as in ``{"model.width": 2}``, and checked again once.

    Raises:
        ConfigError: A name that the config does not have, or a value that the field does not accept.
    """
    known = list(_names(config))
    data = to_dict(config)
    for name in sorted(changes, key=lambda name: name.count(".")):  # a parent before its fields
        if name not in known:
            raise _unknown(name, name, known)
        value = changes[name]
        parent, *middle = [data, *name.split(".")]
        for part in middle[:-1]:
            parent = parent[part]
        parent[middle[-1]] = to_dict(value) if _is_config(value) else value
    return from_dict(type(config), data)


def check_folder_name(name: str) -> None:
    """Make sure that a run's name can be a folder name: one level below the storage, on a disk or in a bucket.

    Raises:
        ConfigError: It is empty, ``.`` or ``..``, too long, or has a separator or a character that cannot be printed.
    """
    # A question mark begins the query of a URI.
    if name.strip() and name.isprintable() and not set(name) & set("/\\?") and name not in (".", ".."):
        if len(name.encode()) <= _MAX_NAME_BYTES:
            return
        accepted = f"at most {_MAX_NAME_BYTES} bytes, not {len(name.encode()):,}"
    else:
        accepted = "text that can name a folder, without / \\ ? and control characters"
    raise ConfigError.of("name", f"given {brief(name)}", accepted, "choose another name")


def _read(kind: Any, value: Any, where: str) -> Any:
    """Return ``value``, plain or already built, as the declared ``kind``."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return _plain(value, where)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, value, where)
    if origin in (Union, UnionType):
        return _read_union(arguments, value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) == len(value):
            return tuple(_read(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict and isinstance(value, Mapping):
        return {_read(arguments[0], k, where): _read(arguments[1], v, _join(where, k)) for k, v in value.items()}
    if origin is Literal:
        for accepted in arguments:
            if type(value) is type(accepted) and value == accepted:
                return value
    if kind is float and (number := _float(value)) is not None:
        return number
    if kind is NoneType and value is None:
        return value
    if kind is int and _is_int(value):
        return value
    if kind is str and isinstance(value, str) and is_unicode(value):
        return value
    if kind is bool and isinstance(value, bool):
        return value
    raise _wrong(where, value, _accepted(kind))


def _read_dataclass(cls: type, value: Any, where: str) -> Any:
    kinds = _kinds(cls)
    if type(value) is cls:
        value = {name: getattr(value, name) for name in kinds}
    if not isinstance(value, Mapping):
        raise _wrong(where, value, _accepted(cls))
    for key in value:
        if key not in kinds:
            raise _unknown(_join(where, key), str(key), kinds, where)
    values = {name: _read(kinds[name], item, _join(where, name)) for name, item in value.items()}
    for field in dataclasses.fields(cls):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if field.init and required and field.name not in values:
            accepted = _accepted(kinds[field.name])
            raise MissingError.of(_join(where, field.name), "missing", accepted, "add it")
    try:
        return cls(**values)
    except ConfigError as error:  # its own checks name the field, not the path of the dataclass
        raise error.under(where) from None


def _read_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    nested = [option for option in options if dataclasses.is_dataclass(option) or get_origin(option) in (tuple, dict)]
    if len(nested) == 1 and (isinstance(value, (list, tuple, Mapping)) or _is_config(value)):
        return _read(nested[0], value, where)  # for an error that names the path inside
    # The value's own type first, so that 1 stays an int in `float | int` and "1e-4" a text in `float | str`.
    for option in sorted(options, key=lambda option: option is not type(value)):
        try:
            return _read(option, value, where)
        except ConfigError:
            continue
    raise _wrong(where, value, " or ".join(_accepted(option) for option in options))


def is_unicode(text: str) -> bool:
    """Return whether text can be written: a lone surrogate, which JSON and file names can have, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_int(value: Any) -> bool:
    """Return whether it is an integer of 64 bits; one of thousands of digits could not even be printed."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _float(value: Any) -> float | None:
    """Return a finite float, zero without a sign, or None if ``value`` is not a finite number."""
    text = isinstance(value, str) and _EXPONENT.fullmatch(value)
    if not text and (isinstance(value, bool) or not isinstance(value, (int, float))):
        return None
    try:
        number = float(value) + 0.0
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _plain(value: Any, where: str) -> Any:
    """Return JSON-able data of builtin types, dataclasses and tuples resolved."""
    if _is_config(value):
        return {name: _plain(getattr(value, name), _join(where, name)) for name in _kinds(value.__class__)}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, _join(where, key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float) and (number := _float(value)) is not None:
        return number
    if value is None or isinstance(value, (bool, str)) or _is_int(value):
        return value
    raise _wrong(where, value, "finite numbers, text, true, false, null, and lists and mappings of them")


def _is_config(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


@cache
def _kinds(cls: Any) -> dict[str, Any]:
    """Return field name -> declared type, for the fields that the constructor takes."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _names(config: Any, where: str = "") -> Iterator[str]:
    for name in _kinds(config.__class__):
        yield _join(where, name)
        if _is_config(getattr(config, name)):
            yield from _names(getattr(config, name), _join(where, name))


def _accepted(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind in _SCALARS:
        return _SCALARS[kind]
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return f"a mapping with the settings {', '.join(_kinds(kind))}"
    if origin in (Union, UnionType):
        return " or ".join(_accepted(option) for option in arguments)
    if origin is Literal:
        return " or ".join(repr(value) for value in arguments)
    if origin is dict:
        return "a mapping"
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"a list, each item {_accepted(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}: {', '.join(_accepted(item) for item in arguments)}"
    raise TypeError(f"{kind!r}: not a type that a config field can have")


def _join(where: str, name: Any) -> str:
    name = name if isinstance(name, str) and name.isprintable() and len(name) <= 80 else brief(name)
    return f"{where}.{name}" if where else name


def _wrong(where: str, value: Any, accepted: str) -> ConfigError:
    return ConfigError.of(where or "config", f"given {brief(value)} ({type(value).__name__})", accepted, "")


def _unknown(shown: str, name: str, known: Iterable[str], where: str = "") -> ConfigError:
    hint = did_you_mean(name, known, f"; did you mean {where}{'.' if where else ''}")
    return ConfigError(f"{shown}: unknown setting; accepted: {', '.join(known)}{hint}")
