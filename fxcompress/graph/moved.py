"""Which channel a value's indices belong to, behind operators that only move values: those are run on channel numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.graph import ops
from fxcompress.graph.shapes import module_of, shape_of

__all__ = ["channel_map", "moved_from", "moved_to"]

_MOVERS = (
    "flatten",
    "unflatten",
    "reshape",
    "view_as",
    "permute",
    "transpose",
    "t",
    "movedim",
    "squeeze",
    "unsqueeze",
    "identity",
)


def _moves(node: fx.Node) -> bool:
    """Whether a node has every value of its input once, in another shape."""
    call = ops.read(node) if node.op.startswith("call") else None
    if call is None or not isinstance(call["input"], fx.Node):
        return False
    if call.kind == "dropout":
        return (module_of(node).training if node.op == "call_module" else call["training"]) is False
    return call.kind in _MOVERS or (call.kind == "getattr" and call["name"] in ("T", "mT"))


def moved_from(value: fx.Node) -> fx.Node:
    """The node whose values ``value`` has, moved; ``value`` itself where it moves none."""
    while _moves(value):
        value = value.all_input_nodes[0]
    return value


def moved_to(value: fx.Node) -> fx.Node | None:
    """The one node that computes with the values of ``value``, moved or not; None where there are several."""
    while len(readers := ops.value_readers(value)) == 1:
        if not _moves(readers[0]):
            return readers[0]
        value = readers[0]
    return None


def channel_map(source: fx.Node, dim: int, value: fx.Node, at: int) -> Tensor | None:
    """The index along dimension ``dim`` of ``source`` of each index along ``at`` of ``value``, which moves its values.

    None where shapes are not known, or an index along ``at`` has values of several.
    """
    shape = shape_of(source)
    if shape is None or not -len(shape) <= dim < len(shape):
        return None
    numbers = torch.arange(shape[dim], dtype=torch.int32)
    spread = numbers.reshape([-1 if d == dim % len(shape) else 1 for d in range(len(shape))]).expand(shape).contiguous()
    try:
        moved = _run(value, {source: spread})
    except Exception:  # an argument that only a real call tells
        return None
    rows = moved.movedim(at, 0).flatten(1)
    found: Tensor = rows[:, 0]
    return found.long() if bool((rows == found[:, None]).all()) else None


def _run(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    """What ``node`` is; tensors that are not ``known`` tell no more than their shape."""
    if node in known:
        return known[node]
    shape = shape_of(node)
    if shape is not None and not _moves(node):
        return torch.empty(shape, device="meta")
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: _run(source, known))
    if node.op == "call_module":
        return module_of(node)(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]
