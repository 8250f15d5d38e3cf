"""The settings of a command as its user types them, so that an error names the flag and not the field."""

import dataclasses
from contextvars import ContextVar
from typing import Any, get_type_hints

from bit_ray.errors import BitRayError

command: ContextVar[type[Any] | None] = ContextVar("command", default=None)
"""Config class of the command that runs in this process."""


def flag(name: str) -> str:
    """Return the flag of a setting by its dotted name."""
    return f"--{name.replace('_', '-')}"


def typed(cls: type[Any], prefix: str = "") -> dict[str, str]:
    """Return dotted name -> what the user types, for all settings of a config: a flag, or a positional's name."""
    hints = get_type_hints(cls)
    names: dict[str, str] = {}
    for field in dataclasses.fields(cls):
        path, kind = f"{prefix}{field.name}", hints[field.name]
        if not field.init:
            continue
        if dataclasses.is_dataclass(kind):
            names |= {path: f"{flag(path)}.*", **typed(kind, f"{path}.")}  # type: ignore[arg-type]
        else:
            negated = "no-" if field.default is True else ""
            names[path] = field.metadata.get("positional", flag(f"{prefix}{negated}{field.name}"))
    return names


def as_typed(error: BitRayError) -> BitRayError:
    """Return the same error with its setting as the user types it; unchanged if the command has no such setting.

    An error may name a setting without the config it is part of, such as ``crop`` for ``rule.crop``: it means the only
    setting of that name. A command's own setting has priority over those of its parts.
    """
    cls = command.get()
    path = error.field.partition("[")[0]  # one value of several
    if cls is None or not path:
        return error
    names = typed(cls)
    found = [names[path]] if path in names else [name for full, name in names.items() if full.endswith(f".{path}")]
    return error.renamed(found[0]) if len(found) == 1 else error
