"""Choosing layers: by qualified name, glob, regular expression or type. What is chosen takes everything below it."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, Field
from torch import nn

from fxcompress.errors import ConfigError, did_you_mean
from fxcompress.graph.tree import parts

__all__ = ["Layer", "Selection", "classes_of", "listed", "matches", "resolved", "resolved_step"]

T = TypeVar("T")

TYPE, EXPRESSION = "type:", "re:"

OPTIONS = ("include_layers", "exclude_layers", "layers", "overrides", "whole_groups")
"""Options of passes that choose layers: sequences of patterns, or mappings by pattern."""


class Typed(str):
    """``type:Conv2d`` for one model: it reads as it was written, and knows the layers of that type."""

    names: frozenset[str]


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

    def on(self, model: nn.Module) -> Selection:
        """The same selection, with the layers of ``model`` that have the types it names.

        Raises ConfigError for a pattern that matches nothing in ``model``, with the closest names.
        """
        chosen = Selection(resolved(self.include, model), resolved(self.exclude, model))
        patterns = (*(chosen.include or ()), *chosen.exclude)
        names = [name for name in parts(model) if name] if patterns else []
        for pattern in patterns:
            if not isinstance(pattern, Typed) and not any(matches(pattern, name) for name in names):
                how = "has a name that fits" if pattern.startswith(EXPRESSION) else "is called"
                raise ConfigError(f"no layer {how} {pattern!r}.{did_you_mean(pattern, names)}")
        return chosen

    def check(self, model: nn.Module) -> None:
        """Raise what :meth:`on` raises."""
        self.on(model)


def matches(pattern: str, layer: str) -> bool:
    """Whether ``pattern`` chooses ``layer`` or a module around it."""
    parts = layer.split(".")
    return any(_fits(pattern, ".".join(parts[: end + 1])) for end in range(len(parts)))


def _fits(pattern: str, name: str) -> bool:
    if isinstance(pattern, Typed):
        return name in pattern.names
    if pattern.startswith(TYPE):
        raise ConfigError(f"{pattern!r} chooses layers by type, and nobody said of which model.")
    if pattern.startswith(EXPRESSION):
        return _expression(pattern).fullmatch(name) is not None
    return fnmatch.fnmatchcase(name, pattern)


@functools.cache
def _expression(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern.removeprefix(EXPRESSION))
    except re.error as error:
        raise ConfigError(f"{pattern!r} is no regular expression: {error}.") from error


def resolved(patterns: T, model: nn.Module) -> T:
    """Patterns (a sequence, a mapping by pattern, or None) of which those by type know the layers of ``model``.

    Raises ConfigError for a type that no layer of ``model`` has, with the closest ones.
    """
    given: Any = patterns
    if not given or not any(pattern.startswith(TYPE) for pattern in given):
        return patterns
    classes = classes_of(model)
    if isinstance(given, Mapping):
        return {_typed(pattern, classes): value for pattern, value in given.items()}  # type: ignore[return-value]
    return tuple(_typed(pattern, classes) for pattern in given)  # type: ignore[return-value]


def _typed(pattern: str, classes: Mapping[str, tuple[str, ...]]) -> str:
    if not pattern.startswith(TYPE):
        return pattern
    wanted, found = pattern.removeprefix(TYPE), Typed(pattern)
    found.names = frozenset(
        name for name, known in classes.items() if any(fnmatch.fnmatchcase(cls, wanted) for cls in known)
    )
    if not found.names:
        known = sorted({f"{TYPE}{cls}" for names in classes.values() for cls in names})
        raise ConfigError(f"no layer has the type of {pattern!r}.{did_you_mean(pattern, known)}")
    return found


def classes_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Layer → the names of its class and of the classes that is derived from, as they were when the model was traced."""
    found: dict[str, tuple[str, ...]] = dict(getattr(model, "meta", {}).get("classes", {}))
    for name, part in parts(model).items():
        if name and name not in found:
            found[name] = tuple(c.__name__ for c in type(part).__mro__ if issubclass(c, nn.Module) and c is not nn.Module)
    return found


def resolved_step(step: T, model: nn.Module) -> T:
    """A pass whose options that choose layers by type know those of ``model``."""
    given = {name: getattr(step, name) for name in OPTIONS if getattr(step, name, None)}
    found = {name: resolved(patterns, model) for name, patterns in given.items()}
    changed = {name: patterns for name, patterns in found.items() if patterns is not given[name]}
    return dataclasses.replace(step, **changed) if changed else step  # type: ignore[type-var]


def _well_formed(pattern: str) -> str:
    if pattern.startswith(EXPRESSION):
        try:
            _expression(pattern)
        except ConfigError as error:
            raise ValueError(str(error)) from error
    return pattern


EXAMPLES = ["layer4", "layer*.conv1", "re:layer[34]", "type:Conv2d"]

Layer = Annotated[str, AfterValidator(_well_formed), Field(examples=EXAMPLES)]
"""A name, a glob, ``re:`` and a regular expression that fits the whole name, or ``type:`` and the (glob of a) class."""
