"""Errors for what a user can put right.

Every message is one line: the field, what was given, what is accepted, what to do. The command line and the jobs print
it after ``error:`` and exit with status 2; anything else that escapes is a bug of ours and keeps its traceback.
"""

from typing import Self

from bit_ray.uris import shown


class BitRayError(Exception):
    """Base of all errors that a user can put right; whatever words went into one, it shows no password of a URI."""

    field = ""
    """The setting or value that is wrong, as the message names it; empty where the error was not made by `of`."""
    problem = ""
    """The rest of the message."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(shown(arg) if isinstance(arg, str) else arg for arg in args))

    @classmethod
    def of(cls, field: str, given: object, accepted: str, remedy: str = "correct it") -> Self:
        """Return the error whose message is ``field: given; accepted; remedy``."""
        return cls._at(field, f"{given}; {accepted}; {remedy}")

    def under(self, parent: str) -> Self:
        """Return the same error of a field inside of another, such as ``runtime``; as it is where that is empty."""
        return self.renamed(f"{parent}.{self.field}") if parent else self

    def renamed(self, field: str) -> Self:
        """Return the same error with the name that the caller's user knows the field by; as it is without a field."""
        return self._at(field, self.problem) if self.field else self

    @classmethod
    def _at(cls, field: str, problem: str) -> Self:
        error = cls(f"{field}: {problem}")
        error.field, error.problem = field, problem
        return error

    def __str__(self) -> str:
        """Return one line that can be shown: names of files and classes in it may hold line breaks and worse."""
        text = super().__str__()
        return text if text.isprintable() else "".join(map(_shown, text))


class ConfigError(BitRayError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class MissingError(ConfigError):
    """A setting that has no default and was not given."""


class DataError(BitRayError):
    """A data set, shard, image or label that is missing, damaged or out of range."""


class StoreError(DataError):
    """A disk or object store that fails, is full, refuses or cannot be reached: the data themselves may be sound."""


class DamagedShardError(DataError):
    """A shard that is missing, or not what the manifest says: reading it again will not help, doing without it may."""


class ModelError(BitRayError):
    """Weights, checkpoints or registry entries that are missing, damaged or do not fit."""


class TrackingError(BitRayError):
    """The MLflow server cannot be reached or refuses what was sent."""


def brief(value: object) -> str:
    """What a message shows of a value that was given: its repr, at most 80 characters of it."""
    try:
        text = shown(repr(value))  # before it is cut: half of a password would not be known for one
    except Exception:  # an int of thousands of digits, say
        text = f"some {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def root_cause(error: BaseException) -> BitRayError | None:
    """The user's error inside what Ray wrapped around it on the way from another process, or None."""
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
        hidden = [getattr(e, name, None) for name in ("cause", "_base_exc")]
        pending += [e.__context__, *hidden, *failures.values(), e.__cause__]
    return None


def _shown(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()
