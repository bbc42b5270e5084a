"""Choosing layers by name: a qualified name takes the module and everything below it; glob patterns work."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from fxcompress.errors import ConfigError, did_you_mean

__all__ = ["Selection", "listed", "matches"]


def listed(option: str, names: Iterable[str]) -> list[str]:
    """The names given as ``option``; ConfigError for anything but a sequence of strings, a single string included."""
    if isinstance(names, str) or not isinstance(names, Iterable) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{option} is {names!r}; it is a list of layer names or patterns.")
    return list(names)


@dataclass(frozen=True)
class Selection:
    """Which layers are chosen: those ``include`` matches (None: all) that ``exclude`` does not."""

    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()

    def __contains__(self, layer: str) -> bool:
        if any(matches(pattern, layer) for pattern in self.exclude):
            return False
        return self.include is None or any(matches(pattern, layer) for pattern in self.include)

    def check(self, model: nn.Module) -> None:
        """Raise ConfigError for a pattern that matches no module of ``model``, with the closest names."""
        names = [name for name, _ in model.named_modules() if name]
        for pattern in (*(self.include or ()), *self.exclude):
            if not any(matches(pattern, name) for name in names):
                raise ConfigError(f"no layer is called {pattern!r}.{did_you_mean(pattern, names)}")


def matches(pattern: str, layer: str) -> bool:
    """Whether ``pattern`` names ``layer`` or a module around it."""
    parts = layer.split(".")
    prefixes: Iterable[str] = (".".join(parts[: end + 1]) for end in range(len(parts)))
    return any(fnmatch.fnmatchcase(prefix, pattern) for prefix in prefixes)
