"""Pass name → class: the built-in table, and the entry-point group ``fxcompress.passes`` for everybody else's."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

from fxcompress.errors import PlanError, did_you_mean, shown
from fxcompress.pass_base import Pass

__all__ = ["GROUP", "components", "find", "passes"]

GROUP = "fxcompress.passes"


@functools.cache
def passes() -> dict[str, type[Pass]]:
    """Every pass that can be named in a plan, built-in ones first.

    An installed package adds its own by an entry point in the group ``fxcompress.passes``: name = the pass's name, value =
    ``module:Class``. A name that is taken, or an object that is not a pass, is refused.
    """
    table: dict[str, type[Pass]] = {}
    for cls in importlib.import_module("fxcompress.passes").PASSES:
        table[cls.name] = cls
    for point in entry_points(group=GROUP):
        cls = point.load()
        if not (isinstance(cls, type) and issubclass(cls, Pass)):
            raise PlanError(f"entry point {point.name!r} of group {GROUP!r} is {cls!r}, which is not a Pass.")
        if point.name in table:
            raise PlanError(f"entry point {point.name!r} ({point.value}) takes the name of a pass that exists.")
        table[point.name] = cls
    return table


def components() -> dict[str, Callable[[Mapping[str, Any]], tuple[Pass, ...]]]:
    """Every component that can be named in a plan: a function from its options to the passes it stands for."""
    found: dict[str, Any] = importlib.import_module("fxcompress.components").components()
    return found


def find(name: str) -> type[Pass]:
    """The pass called ``name``, or PlanError with the closest names."""
    table = passes()
    if name not in table:
        hint = did_you_mean(name, [*table, *components()])
        raise PlanError(f"there is no pass {shown(name)}.{hint} Known: {', '.join(sorted(table))}.")
    return table[name]
