"""Arguments and attributes as JSON, and back: numbers, containers, torch's own constants, and operators by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import EllipsisType
from typing import Any

import torch
from torch import fx

from fxcompress.errors import ArtifactError
from fxcompress.graph import spellings

__all__ = ["decode", "encode"]

_Nodes = Mapping[str, fx.Node]


def _torch_name(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _torch_constant(name: str, nodes: _Nodes) -> Any:
    return getattr(torch, name)


_FORMS: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any, _Nodes], Any]]] = {
    "float": (float, repr, lambda held, nodes: float(held)),
    "node": (fx.Node, lambda node: node.name, lambda held, nodes: nodes[held]),
    "tuple": (tuple, lambda value: [encode(v) for v in value], lambda held, nodes: tuple(decode(v, nodes) for v in held)),
    "dict": (
        dict,
        lambda value: [[encode(k), encode(v)] for k, v in value.items()],
        lambda held, nodes: {decode(k, nodes): decode(v, nodes) for k, v in held},
    ),
    "slice": (
        slice,
        lambda value: [encode(v) for v in (value.start, value.stop, value.step)],
        lambda held, nodes: slice(*(decode(v, nodes) for v in held)),
    ),
    "ellipsis": (EllipsisType, lambda value: True, lambda held, nodes: ...),
    "dtype": (torch.dtype, _torch_name, _torch_constant),
    "device": (torch.device, str, lambda held, nodes: torch.device(held)),
    "memory_format": (torch.memory_format, _torch_name, _torch_constant),
    "layout": (torch.layout, _torch_name, _torch_constant),
}
"""The word for a type that JSON has not, what is written of a value, and how that is read with the nodes by name."""


def encode(value: Any) -> Any:
    """A node argument or attribute as JSON. Raises ArtifactError for what has no plain form."""
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, (list, range)):
        return [encode(v) for v in value]
    for word, (kind, write, _) in _FORMS.items():
        if isinstance(value, kind):
            return {word: write(value)}
    name = spellings.target_name(value) if callable(value) else None
    if name is None:
        raise ArtifactError(f"a {type(value).__name__} ({value!r}) has no plain form.")
    return {"operator": name}


def decode(data: Any, nodes: _Nodes | None = None) -> Any:
    """The inverse of :func:`encode`; node references resolve in ``nodes``."""
    if isinstance(data, list):
        return [decode(v, nodes) for v in data]
    if not isinstance(data, dict):
        return data
    if "operator" in data:
        return spellings.target_by_name(data["operator"])
    for word, (kind, _, read) in _FORMS.items():
        if word in data:
            value = read(data[word], nodes or {})
            if isinstance(value, kind):
                return value
    raise ArtifactError(f"the saved model holds {data!r}, which nothing here reads.")
