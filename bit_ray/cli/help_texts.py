"""The texts in a config's help: what a field means, its default, and the form of its value."""

import ast
import dataclasses
import inspect
import textwrap
from typing import Any, Literal, get_args, get_origin

_METAVARS = {int: "INT", float: "FLOAT", str: "TEXT"}


def docs_of(cls: type) -> dict[str, str]:
    """Return field name -> the docstring below the field in the source."""
    docs: dict[str, str] = {}
    for base in cls.__mro__[-1:0:-1]:
        if dataclasses.is_dataclass(base):
            docs |= docs_of(base)
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(tree, ast.ClassDef)
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            docs[field.target.id] = tidy(str(text.value.value))
    return docs


def tidy(text: str) -> str:
    """Return a docstring as one line without code marks."""
    return " ".join(text.replace("``", "").split())


def default_hint(value: Any) -> str:
    """Return what the help says of a default; empty for one that says nothing."""
    if value is None or value in ("", []):
        return ""
    items = value if isinstance(value, list) else [value]
    return f"(default: {' '.join(f'{item:g}' if isinstance(item, float) else str(item) for item in items)})"


def metavar(kind: Any) -> str:
    """Return the form of a value of this type."""
    if get_origin(kind) is Literal:
        return f"{{{','.join(map(str, get_args(kind)))}}}"
    if get_origin(kind) is tuple:
        items = get_args(kind)
        return f"{metavar(items[0])} ..." if items[-1] is Ellipsis else " ".join(map(metavar, items))
    return _METAVARS[kind]
