"""From config dataclasses to command-line flags: tyro reads and explains the flags, `bit_ray.config` checks the values.

A value from a flag or a file passes the same strict codec and fails with the same message. Imports neither PyTorch nor
Ray nor MLflow, so that ``--help`` is fast.
"""

import contextlib
import dataclasses
import inspect
import io
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from bit_ray.cli.help_texts import default_hint, docs_of, metavar, tidy
from bit_ray.cli.typed import command, flag
from bit_ray.config import from_dict, to_dict
from bit_ray.config_files import read_mapping
from bit_ray.errors import ConfigError, MissingError, did_you_mean
from bit_ray.recipes.upstream import RECIPES
from bit_ray.tracking.config import TrackingConfig

T = TypeVar("T")


_CONFIG_HELP = "JSON or YAML file of settings, such as the config.json of a run in MLflow; flags override it."
_RECIPE_HELP = "Start from what the paper says for BiT-S, BiT-M or BiT-L; --recipe.* flags change it."
_UNSET = object()


def positional(metavar: str) -> dict[str, str]:
    """Return the metadata of a dataclass field that is a positional argument instead of a flag."""
    return {"positional": metavar}


def parse(cls: type[T], args: Sequence[str], *, prog: str, **defaults: Any) -> T:
    """Build a config: flags over ``--recipe`` over ``--config FILE`` over ``defaults`` over the config's own defaults.

    Raises:
        ConfigError: One line, for an unknown flag, a refused value, or a missing required one.
        SystemExit: With status 0, after ``--help``.
    """
    command.set(cls)
    args = _words_last(cls, args)
    settings = _merged(_defaults(cls), {name: _plain(value) for name, value in defaults.items()})
    path = _take(args, "--config", prog) if _is_run(cls) else None
    if path is not None:
        settings = _merged(settings, read_mapping(path))
    if _has_recipe(settings) and (name := _take(args, "--recipe", prog)) is not None:
        if name not in RECIPES:
            raise ConfigError(f"--recipe: {name}; accepted: {', '.join(RECIPES)}; choose one")
        settings["recipe"] = to_dict(RECIPES[name]())
    given = _read_flags(cls, args, prog, settings)
    if path is not None:
        _check_file(
            cls, path, _merged({name: value for name, value in given.items() if name not in settings}, settings)
        )
    settings = _merged(settings, given)
    for field in _fields(cls):
        if field.name not in settings:
            shown = field.metadata.get("positional", flag(field.name))
            raise ConfigError(
                f"{shown}: missing; accepted: {docs_of(cls).get(field.name, '').rstrip('.')}; see {prog} --help"
            )
    return from_dict(cls, settings)


def _words_last(cls: type, args: Sequence[str]) -> list[str]:
    """Return the arguments with the words that are no flag's values after ``--``, as positionals are read at one point.

    Of a flag with several values NAME=VALUE, a word of another form is none.
    """
    kinds = {flag(field.name): get_type_hints(cls)[field.name] for field in _fields(cls)}
    flags: list[str] = []
    words: list[str] = []
    takes, pairs = 0.0, False
    for i, arg in enumerate(args):
        if arg == "--":
            words += args[i + 1 :]
            break
        if arg.startswith("-"):
            kind = kinds.get(arg, tuple)  # of a flag in a group the parser knows best
            several = tuple in (kind, get_origin(kind))
            takes = 0 if kind is bool or arg.startswith("--no-") or "=" in arg else math.inf if several else 1
            pairs = several and "=" in "".join(args[i + 1 : i + 2])
            flags.append(arg)
        elif takes and not (pairs and "=" not in arg):
            takes -= 1
            flags.append(arg)
        else:
            words.append(arg)
    return [*flags, "--", *words] if words else list(args)


def _fields(cls: Any) -> list["dataclasses.Field[Any]"]:
    """Return the fields that can be set."""
    return [field for field in dataclasses.fields(cls) if field.init]


def _has_recipe(settings: Mapping[str, Any]) -> bool:
    """Return whether a recipe, with all its settings, is part of the config."""
    return isinstance(settings.get("recipe"), Mapping)


def _is_run(cls: type) -> bool:
    """Return whether its runs are recorded, so that one can be replayed."""
    return get_type_hints(cls).get("tracking") is TrackingConfig


def _check_file(cls: type, path: str, settings: Mapping[str, Any]) -> None:
    """Refuse wrong values in a file with the file's name, even if flags replace them."""
    try:
        from_dict(cls, settings)
    except MissingError:
        pass  # a flag may set it
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _read_flags(cls: type, args: list[str], prog: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that the flags set, as nested plain data."""
    shape = _flag_class(cls, settings, top=True)
    errors = io.StringIO()
    helping = any(arg in ("-h", "--help") for arg in args)
    try:
        with (
            contextlib.redirect_stderr(errors),
            _columns(None if helping else 1000),  # wide, so that no message is broken into lines
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # the placeholder of an unset value has no type
            parsed: Any
            parsed, unknown = tyro.cli(
                shape, prog=prog, args=args, return_unknown_args=True, config=(tyro.conf.FlagCreatePairsOff,)
            )
    except SystemExit as stop:
        if stop.code == 0:
            raise
        lines = [line.strip("│╭╮╰╯─ ") for line in errors.getvalue().splitlines()]
        reason = next(filter(None, lines[1:]), "flags cannot be read").rstrip(".")
        raise ConfigError(f"{reason}; see {prog} --help") from None
    if unknown:
        for_job = "those of the job come after --; " if hasattr(parsed, "job") else ""
        _refuse_unknown(unknown[0].split("=")[0], prog, list(_flags(parsed)), for_job)
    return _given(parsed)


def _refuse_unknown(name: str, prog: str, known: list[str], hint: str) -> NoReturn:
    if not name.startswith("-"):
        raise ConfigError(f"{name}: not expected here; accepted: flags, each with its value; see {prog} --help")
    hint = did_you_mean(name, known, "did you mean ", "? ") or hint
    raise ConfigError(f"{name}: unknown flag; {hint}see {prog} --help")


def _flag_class(cls: type, settings: Mapping[str, Any], *, top: bool = False) -> type:
    """Return a dataclass with the fields of ``cls``, whose leaves tyro does not convert."""
    hints, docs = get_type_hints(cls), docs_of(cls)
    required, leaves, groups = [], [], []
    # A config's own fields come before its inherited ones.
    own = list(cls.__annotations__)
    for field in sorted(_fields(cls), key=lambda field: own.index(field.name) if field.name in own else len(own)):
        name, kind = field.name, hints[field.name]
        if dataclasses.is_dataclass(kind):
            nested = _flag_class(kind, settings.get(name, {}))  # type: ignore[arg-type]
            groups.append(
                (
                    name,
                    Annotated[nested, tyro.conf.arg(help=docs.get(name, ""))],
                    dataclasses.field(default_factory=nested),
                )
            )
        elif kind is bool:
            hint = "(on by default)" if settings[name] else ""
            about = tyro.conf.arg(help=docs.get(name, ""), help_behavior_hint=hint)
            leaves.append((name, Annotated[bool, about], settings[name]))
        elif name in settings:
            leaves.append((name, _leaf(field, kind, docs.get(name, ""), default_hint(settings[name])), _UNSET))
        else:
            required.append((name, _leaf(field, kind, docs.get(name, ""), "(required)"), _UNSET))
    if top and _has_recipe(settings):
        leaves.insert(0, ("recipe_name", _shown_only("recipe", f"{{{','.join(RECIPES)}}}", _RECIPE_HELP), _UNSET))
    if top and _is_run(cls):
        leaves.insert(0, ("config_file", _shown_only("config", "FILE", _CONFIG_HELP), _UNSET))
    made = dataclasses.make_dataclass(cls.__name__, [*required, *leaves, *groups], kw_only=True)
    made.__doc__ = tidy(inspect.getdoc(cls) or "")
    return made


def _leaf(field: "dataclasses.Field[Any]", kind: Any, text: str, hint: str) -> Any:
    bare = _without_none(kind)
    items = get_args(bare) if get_origin(bare) is tuple else ()
    shown_as = field.metadata.get("positional")
    spec: PrimitiveConstructorSpec[Any] = PrimitiveConstructorSpec(
        nargs="*" if items and items[-1] is Ellipsis else len(items) or 1,
        metavar=shown_as or metavar(bare),
        instance_from_str=lambda tokens: _from_text(kind, tokens),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [],
    )
    about = tyro.conf.arg(help=text, help_behavior_hint=hint, metavar=spec.metavar)
    return Annotated[(Any, spec, about, *((tyro.conf.Positional,) if shown_as else ()))]


def _shown_only(name: str, metavar: str, text: str) -> Any:
    """Return the type of a flag that `parse` has read already, for its line in the help."""
    return Annotated[str, tyro.conf.arg(name=name, metavar=metavar, help=text, help_behavior_hint="")]


def _from_text(kind: Any, tokens: Sequence[str]) -> Any:
    """Convert the text to plain data if it has the right form; otherwise it stays text, which the codec refuses."""
    if NoneType in get_args(kind) and list(tokens) == ["none"]:
        return None
    kind = _without_none(kind)
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        return [_from_text(kinds[0 if kinds[-1] is Ellipsis else i], [token]) for i, token in enumerate(tokens)]
    if kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(tokens[0])
    return tokens[0]


def _given(parsed: Any) -> dict[str, Any]:
    values = {field.name: getattr(parsed, field.name) for field in dataclasses.fields(parsed)}
    return {
        name: _given(value) if dataclasses.is_dataclass(value) else value
        for name, value in values.items()
        if value is not _UNSET
    }


def _flags(parsed: Any, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(parsed):
        value = getattr(parsed, field.name)
        if dataclasses.is_dataclass(value):
            yield from _flags(value, f"{prefix}{field.name}.")
        else:
            name = field.name.removesuffix("_file").removesuffix("_name") if not prefix else field.name
            yield flag(f"{prefix}{'no-' if value is True else ''}{name}")


def _take(args: list[str], flag: str, prog: str) -> str | None:
    """Remove a flag and its value from the arguments; the last one counts."""
    value = None
    while (at := next((i for i, arg in enumerate(args) if arg == flag or arg.startswith(f"{flag}=")), -1)) >= 0:
        arg = args.pop(at)
        if arg == flag and at == len(args):
            raise ConfigError(f"{flag}: no value; see {prog} --help")
        value = args.pop(at) if arg == flag else arg.removeprefix(f"{flag}=")
    return value


@contextlib.contextmanager
def _columns(width: int | None) -> Iterator[None]:
    """Set the width of tyro's text."""
    before = os.environ.get("COLUMNS")
    if width is not None:
        os.environ["COLUMNS"] = str(width)
    try:
        yield
    finally:
        if width is not None:
            os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before


def _defaults(cls: Any) -> dict[str, Any]:
    """Return the defaults of a config as plain data, without its required fields."""
    result = {}
    for field in _fields(cls):
        if field.default is not dataclasses.MISSING:
            result[field.name] = _plain(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            result[field.name] = _plain(field.default_factory())
    return result


def _plain(value: Any) -> Any:
    return to_dict(value) if dataclasses.is_dataclass(value) else list(value) if isinstance(value, tuple) else value


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge both, field by field; the second has priority."""
    both = {**below, **above}
    for name, value in above.items():
        if isinstance(value, Mapping) and isinstance(below.get(name), Mapping):
            both[name] = _merged(below[name], value)
    return both


def _without_none(kind: Any) -> Any:
    options = [option for option in get_args(kind) if option is not NoneType]
    return options[0] if get_origin(kind) in (Union, UnionType) else kind
