"""The structure of nested containers as text, read back without importing what the text names."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from torch.utils import _pytree as pytree

__all__ = ["read_spec"]

_FACTORIES = ("list", "dict", "set", "int", "float")


def read_spec(text: str) -> pytree.TreeSpec:
    """The structure that torch's ``treespec_dumps`` wrote; ValueError where the text is another, or names code.

    torch imports the module of an enum and of a defaultdict's factory, whichever the text names.
    """
    try:
        _check(json.loads(text)[1])
        return pytree.treespec_loads(text)
    except (LookupError, TypeError, AttributeError, NotImplementedError, RecursionError, AssertionError) as error:
        raise ValueError(f"no structure of containers ({error})") from error


def _check(entry: Any) -> None:
    context = entry["context"]
    if isinstance(context, str):
        with suppress(json.JSONDecodeError):  # the name of a class, which torch looks up among those it knows
            json.loads(context, object_hook=_without_enums)
    if isinstance(context, dict) and "default_factory_module" in context:
        factory = f"{context['default_factory_module']}.{context['default_factory_name']}"
        if factory not in [f"builtins.{name}" for name in _FACTORIES]:
            raise ValueError(f"it names {factory!r}, which is code and not read")
    for child in entry["children_spec"]:
        _check(child)


def _without_enums(found: dict[str, Any]) -> dict[str, Any]:
    if "__enum__" in found:
        raise ValueError("it names an enum, which is code and not read")
    return found
