"""Errors that a user can fix.

Every message is one line: the field, what was given, what is accepted, what to do. The command line and the jobs print
it after ``error:``, with the field as the flag that the user types, and exit with status 2. Any other exception is a
bug of ours and keeps its traceback.
"""

import copy
import difflib
from collections.abc import Iterable
from typing import Any, Self

from bit_ray.uris import shown


class BitRayError(Exception):
    """Base of all errors that a user can fix; passwords of URIs in the text are never shown."""

    field = ""
    """The setting or value that is wrong, as the message names it; empty if the error was not made by `of`."""
    problem = ""
    """The message after the field."""
    subject = ""
    """What comes before the field, such as the name of a task; empty if `about` did not add it."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(shown(arg) if isinstance(arg, str) else arg for arg in args))

    def __reduce__(self) -> tuple[object, ...]:
        """Copy and pickle the finished message: a subclass may make it from other arguments."""
        return _restored, (type(self), self.args, self.__dict__)

    @classmethod
    def of(cls, field: str, given: object, accepted: str = "", remedy: str = "correct it") -> Self:
        """Return the error whose message is ``field: given; accepted: accepted; remedy``, without what is empty."""
        parts = (str(given), f"accepted: {accepted}" if accepted else "", remedy)
        return cls.__new__(cls)._with(field=field, problem="; ".join(filter(None, parts)))

    def under(self, parent: str) -> Self:
        """Return the same error for a field inside another, such as ``runtime``; unchanged if that is empty."""
        if not parent:
            return self
        return self.renamed(f"{parent}.{self.field}") if self.field else self.about(parent)

    def renamed(self, field: str) -> Self:
        """Return the same error with the field's name as the user knows it; unchanged without a field."""
        return self._with(field=field) if self.field else self

    def about(self, subject: str) -> Self:
        """Return the same error with ``subject: `` before its message; unchanged if it is there already."""
        if subject in (self.subject, self.field):
            return self
        if not self.field:
            return self._with(field=subject, problem=str(self))
        return self._with(subject=f"{subject}: {self.subject}" if self.subject else subject)

    def _with(self, **parts: str) -> Self:
        error = copy.copy(self)
        error.__dict__.update(parts)
        error.args = (shown(": ".join(filter(None, (error.subject, error.field, error.problem)))),)
        return error

    def __str__(self) -> str:
        """Return one line that can be printed: file and class names in it may have control characters."""
        text = super().__str__()
        return text if text.isprintable() else "".join(map(_shown, text))


class ConfigError(BitRayError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class MissingError(ConfigError):
    """A setting that has no default and was not given."""


class DataError(BitRayError):
    """A data set, shard, image or label that is missing, damaged or out of range."""


class StoreError(DataError):
    """A disk or object store that fails, is full, refuses or cannot be reached: the data itself may be intact."""

    passing = False
    """Whether it may work again without anybody's help, as an object store that cannot be reached."""


class DamagedShardError(DataError):
    """A shard that is missing, or not what the manifest says: reading it again does not help, skipping it may."""


class ModelError(BitRayError):
    """Weights, checkpoints or registry entries that are missing, damaged or do not fit."""


class StoppedError(KeyboardInterrupt):
    """The process was asked to end by a signal, and has saved what it could.

    Args:
        number: Of the signal.
        text: What to tell the user.
    """

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.status = 128 + number
        """Exit status, as a shell reports it."""


class TrackingError(BitRayError):
    """The MLflow server cannot be reached or refuses what was sent."""


def one_line(error: BaseException) -> str:
    """Return an error's text as one line of at most 300 characters, without the statement of a database."""
    text = shown(" ".join(str(error).partition("\n[SQL: ")[0].split())) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


def brief(value: object) -> str:
    """Return a given value as a message shows it: at most 80 characters of its repr."""
    try:
        text = shown(repr(value))  # before it is cut: half of a password would not be recognised
    except Exception:  # such as for an int of thousands of digits
        text = f"some {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def did_you_mean(given: str, known: Iterable[str], before: str = "; did you mean ", after: str = "?") -> str:
    """Return a hint at the known name that is nearest to the given one; empty if none is near."""
    near = difflib.get_close_matches(given, list(known), n=1)
    return f"{before}{near[0]}{after}" if near else ""


def connection_reason(error: BaseException, patience_s: float) -> str:
    """Return why a server cannot be reached, in few words; empty for what is not a failed connection.

    Args:
        error: What the library for HTTP or for sockets raised.
        patience_s: Seconds for which it waited.
    """
    text = str(error).lower()
    reasons = {
        "refused": "connection refused",
        "resolve": "unknown host name",
        "name or service not known": "unknown host name",
        "timed out": f"no answer within {patience_s:.0f} s",
        "unreachable": "network unreachable",
        "certificate": "its TLS certificate is not trusted",
        "aborted": "the connection was closed",
        "reset": "the connection was closed",
    }
    return next((reason for sign, reason in reasons.items() if sign in text), "")


def root_cause(error: BaseException) -> BitRayError | None:
    """Return the user's error inside Ray's exception from another process, or None."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        e = pending.pop()
        if e is None or id(e) in seen:
            continue
        seen.add(id(e))
        # Ray also makes classes at run time that inherit from the cause's class but print a remote traceback.
        if isinstance(e, BitRayError) and type(e).__module__.startswith("bit_ray."):
            # Our messages have one line; Ray Data appends advice on its retries.
            e.args = (Exception.__str__(e).partition("\n")[0], *e.args[1:])
            return e
        failures = getattr(e, "worker_failures", None) or {}
        hidden = [getattr(e, name, None) for name in ("cause", "_base_exc", "controller_failure")]
        pending += [e.__context__, *hidden, *failures.values(), e.__cause__]
    return None


def _restored(cls: type[BitRayError], args: tuple[object, ...], state: dict[str, Any]) -> BitRayError:
    error = cls.__new__(cls, *args)
    error.__dict__.update(state)
    return error


def _shown(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()
