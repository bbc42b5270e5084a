"""Which channel of a value the indices of another belong to, where what stands between the two only moves values."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from torch import Tensor, fx

from fxcompress.graph import ops
from fxcompress.graph.channels.calls import Spelling, evaluate
from fxcompress.graph.channels.labels import Value
from fxcompress.graph.channels.movement import codes
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
    line = np.arange(shape[dim]).reshape([-1 if d == dim % len(shape) else 1 for d in range(len(shape))])
    try:
        moved = _moved(source, codes(line, tuple(shape)), value)
    except Exception:  # an argument that only a real call tells
        return None
    rows = moved.movedim(at, 0).flatten(1)
    found = rows[:, 0]
    return found.long() - 1 if bool((rows == found[:, None]).all()) else None


def _moved(source: fx.Node, numbers: Tensor, value: fx.Node) -> Tensor:
    """What ``value`` makes of ``numbers`` in the place of ``source``."""
    path = [value]
    while path[-1] is not source:
        path.append(path[-1].all_input_nodes[0])
    known = _Known()
    for before, node in itertools.pairwise(reversed(path)):
        numbers = known.call(node, {before.name: numbers})
    return numbers


class _Known(dict[fx.Node, Any]):
    """What nodes are: of a tensor its shape; sizes are computed when they are asked for."""

    def __missing__(self, node: fx.Node) -> Any:
        shape = shape_of(node)
        self[node] = Value(tuple(shape)) if shape is not None else self.call(node, {})
        return self[node]

    def call(self, node: fx.Node, special: dict[str, Any]) -> Any:
        """Make a node's call, with ``special`` operands by name."""
        module = node.graph.owning_module
        assert module is not None
        return evaluate(module, self, Spelling.of(node), "meta", special)
