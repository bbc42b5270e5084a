"""Configurations: YAML files of the training framework, and where in them every key stands."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fxcompress.errors import ConfigError, PlanError
from fxcompress.options import fault, unknown
from fxcompress.plan import read_yaml

__all__ = ["KEYS", "Config", "read_config"]

KEYS = ("compression", "model", "data", "validation")
"""What a configuration file may hold at its top beside the sections of the training framework around it."""

_LARGEST = 1 << 20


class Config:
    """A configuration as plain data; errors about a path in it name the file and the line.

    ``source``  the file it came from, or an empty string
    ``lines``   the line of every key by its path
    """

    def __init__(self, data: Any, source: str = "", lines: Mapping[tuple[str | int, ...], int] | None = None) -> None:
        if not isinstance(data, Mapping):
            raise ConfigError(f"{source or 'a configuration'} is a {type(data).__name__}; it is a mapping.")
        self.data, self.source, self.lines = dict(data), source, dict(lines or {})

    def placed(self, error: ConfigError) -> ConfigError:
        """``error`` with the file and line of its path in front."""
        if not self.source:
            return error
        path = error.path
        while path and path not in self.lines:
            path = path[:-1]
        line = f", line {self.lines[path]}" if path in self.lines else ""
        made = ConfigError(f"{self.source}{line}: {error}")
        made.path = error.path
        return made


def read_config(config: Any) -> Config:
    """A configuration from a mapping, a file's path, or YAML text.

    The text is plain data: tags, aliases and duplicate keys are refused. Raises ConfigError naming the line.
    """
    if isinstance(config, Config):
        return config
    if isinstance(config, Mapping):
        return Config(config)
    if not isinstance(config, (str, os.PathLike)):
        raise ConfigError(f"a configuration is a mapping, a path or YAML text, not a {type(config).__name__}.")
    is_text = isinstance(config, str) and "\n" in config
    source = "the configuration" if is_text else str(config)
    text = str(config) if is_text else _read(Path(config))
    try:
        return Config(read_yaml(text), source, _lines(text))
    except PlanError as error:
        raise ConfigError(f"{source}: {error}") from error


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _LARGEST:
            raise ConfigError(f"{str(path)!r} has more than {_LARGEST >> 20} MiB; that is no configuration.")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"the configuration {str(path)!r} cannot be read: {error}.") from error


def _lines(text: str) -> dict[tuple[str | int, ...], int]:
    found: dict[tuple[str | int, ...], int] = {}

    def walk(node: Any, path: tuple[str | int, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                inner = (*path, key.value)
                found[inner] = key.start_mark.line + 1
                walk(value, inner)
        elif isinstance(node, yaml.SequenceNode):
            for number, value in enumerate(node.value):
                found[(*path, number)] = value.start_mark.line + 1
                walk(value, (*path, number))

    walk(yaml.compose(text, yaml.SafeLoader), ())
    return found


def section(config: Mapping[str, Any], key: str, path: tuple[str | int, ...] = ()) -> dict[str, Any]:
    """A mapping inside a configuration."""
    value = config.get(key)
    if not isinstance(value, Mapping):
        raise fault((*path, key), f"is {value!r}; it is a mapping.")
    for name in value:
        if not isinstance(name, str):
            raise unknown(name, {}, (*path, key))
    return dict(value)
