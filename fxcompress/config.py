"""Configurations: YAML files of the training framework, and where in them every key stands."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fxcompress.errors import ConfigError, PlanError, brief, shown
from fxcompress.files import read_text
from fxcompress.yaml_text import Lines, parse

__all__ = ["Config", "read_config"]

_LARGEST = 1 << 20


class Config:
    """A configuration as plain data; errors about a path in it name the file and the line.

    ``source``  the file it came from, or an empty string
    ``lines``   the line of every key by its path
    """

    def __init__(self, data: Any, source: str = "", lines: Lines | None = None) -> None:
        if not isinstance(data, Mapping):
            what = "empty" if data is None else f"a {type(data).__name__}"
            raise ConfigError(
                f"{source or 'a configuration'} is {what}; it is a mapping, as in 'compression: {{type: PTQQuantizer}}'."
            )
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
        data, lines = parse(text)
        return Config(data, source, lines)
    except PlanError as error:
        raise ConfigError(f"{source}: {error}") from error


def _read(path: Path) -> str:
    try:
        return read_text(path, _LARGEST)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the configuration {shown(str(path))} cannot be read: {brief(error)}.") from error
