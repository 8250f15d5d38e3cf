"""Configs as JSON and YAML files; a file is written complete or not at all."""

import json
from pathlib import Path
from typing import Any, TypeVar

import yaml

from bit_ray.config import from_dict, to_dict
from bit_ray.errors import ConfigError, brief
from bit_ray.locks import whole

T = TypeVar("T")


def read_config(cls: type[T], path: str | Path) -> T:
    """Read a config from a ``.json``, ``.yaml`` or ``.yml`` file.

    Raises:
        ConfigError: One line that starts with the path, for a missing or malformed file or a refused setting.
    """
    data = _read_file(Path(path))
    try:
        return from_dict(cls, data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Read the settings of a ``.json``, ``.yaml`` or ``.yml`` file as plain data, not yet checked against a config.

    Raises:
        ConfigError: One line that starts with the path, for a missing or malformed file.
    """
    data = _read_file(Path(path))
    if not isinstance(data, dict):
        given = f"config: given {brief(data)} ({type(data).__name__})"
        raise ConfigError(f"{path}: {given}; accepted: a mapping of settings")
    return data


def write_config(config: Any, path: str | Path) -> None:
    """Write a config as JSON or YAML by the path's suffix; the file appears complete or not at all."""
    path = Path(path)
    if _suffix(path) == ".json":
        text = json.dumps(to_dict(config), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    else:
        text = yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
    try:
        with whole(path) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); choose a writable folder") from None


def _read_file(path: Path) -> Any:
    suffix = _suffix(path)
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text, object_pairs_hook=_unique) if suffix == ".json" else yaml.load(text, _StrictLoader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; accepted: a .json, .yaml or .yml file; check the path") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); accepted: a readable file; check it") from None
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: not valid {suffix[1:].upper()} ({reason}); correct the file") from None
    return data


def _suffix(path: Path) -> str:
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise ConfigError(f"{path}: unknown kind of file; accepted: .json, .yaml or .yml; rename it")
    return path.suffix


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{max(names, key=names.count)!r} is given twice")
    return result


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader that also refuses a name given twice, and aliases, which can grow or nest without limit."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"alias *{self.peek_event().anchor}; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        _unique([(key.value, None) for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
        return super().construct_mapping(node, deep)
