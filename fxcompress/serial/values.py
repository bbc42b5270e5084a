"""Arguments and attributes as JSON, and back: numbers, containers, torch's own constants, and operators by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from fxcompress.errors import ArtifactError
from fxcompress.graph import spellings

__all__ = ["decode", "encode"]

_TORCH_VALUES: dict[str, tuple[type, Callable[[Any], str], Callable[[str], Any]]] = {
    "dtype": (torch.dtype, lambda v: str(v).removeprefix("torch."), lambda s: getattr(torch, s)),
    "device": (torch.device, str, torch.device),
    "memory_format": (torch.memory_format, lambda v: str(v).removeprefix("torch."), lambda s: getattr(torch, s)),
    "layout": (torch.layout, lambda v: str(v).removeprefix("torch."), lambda s: getattr(torch, s)),
}


def encode(value: Any) -> Any:
    """A node argument or attribute as JSON. Raises ArtifactError for what has no plain form."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple):
        return {"tuple": [encode(v) for v in value]}
    if isinstance(value, (list, range)):
        return [encode(v) for v in value]
    if isinstance(value, dict):
        return {"dict": [[encode(k), encode(v)] for k, v in value.items()]}
    if isinstance(value, slice):
        return {"slice": [encode(v) for v in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    for word, (kind, write, _) in _TORCH_VALUES.items():
        if isinstance(value, kind):
            return {word: write(value)}
    name = spellings.target_name(value) if callable(value) else None
    if name is None:
        raise ArtifactError(f"a {type(value).__name__} ({value!r}) has no plain form.")
    return {"operator": name}


def decode(data: Any, nodes: Mapping[str, fx.Node] | None = None) -> Any:
    """The inverse of :func:`encode`; node references resolve in ``nodes``."""
    if isinstance(data, list):
        return [decode(v, nodes) for v in data]
    if not isinstance(data, dict):
        return data
    if "node" in data:
        return (nodes or {})[data["node"]]
    if "tuple" in data:
        return tuple(decode(v, nodes) for v in data["tuple"])
    if "dict" in data:
        return {decode(k, nodes): decode(v, nodes) for k, v in data["dict"]}
    if "slice" in data:
        return slice(*(decode(v, nodes) for v in data["slice"]))
    if "ellipsis" in data:
        return ...
    if "float" in data:
        return float(data["float"])
    if "operator" in data:
        return spellings.target_by_name(data["operator"])
    for word, (kind, _, read) in _TORCH_VALUES.items():
        if word in data:
            value = read(data[word])
            if isinstance(value, kind):
                return value
    raise ArtifactError(f"the saved model holds {data!r}, which nothing here reads.")
