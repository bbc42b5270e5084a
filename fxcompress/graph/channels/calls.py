"""The calls of a graph: how they are written, what people name them by, and what they give on empty tensors.

What was found out about a call is known of all of its spelling (:class:`Readings`).
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxcompress.graph import ops
from fxcompress.graph.channels.labels import Value, map_values
from fxcompress.graph.shapes import module_of
from fxcompress.graph.tree import submodule

__all__ = [
    "Known",
    "Readings",
    "Spelling",
    "enumerate_operands",
    "evaluate",
    "is_pointwise",
    "operand_names",
    "operator_name",
    "place",
    "plain",
]


@dataclass(frozen=True)
class Spelling:
    """A call as a graph writes it."""

    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, node: fx.Node) -> Spelling:
        """As the node is written now."""
        return cls(node.op, node.target, node.args, dict(node.kwargs))


def plain(env: Mapping[fx.Node, Any], structure: Any, device: str, special: Mapping[str, Any]) -> Any:
    """Nodes replaced by ``special`` values by name, or by what ``env`` holds, values as :func:`_blank` tensors."""

    def look(node: fx.Node) -> Any:
        if node.name in special:
            return special[node.name]
        return map_values(lambda v: _blank(v, node, device), env[node])

    return fx.node.map_arg(structure, look)


def _blank(value: Value, node: fx.Node, device: str) -> torch.Tensor:
    """An empty tensor of this shape; integers are zeros, so that they can be indices."""
    dtype = getattr(node.meta.get("tensor_meta"), "dtype", torch.float32)
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        return torch.empty(value.shape, dtype=torch.float32, device=device)
    return torch.zeros(value.shape, dtype=dtype, device=device)


def evaluate(
    module: fx.GraphModule, env: Mapping[fx.Node, Any], call: Spelling, device: str, special: Mapping[str, Any]
) -> Any:
    """Make a call on :func:`plain` operands."""
    args, kwargs = plain(env, (call.args, call.kwargs), device, special)
    if call.op == "call_module":
        part = submodule(module, str(call.target))
        assert part is not None
        return part(*args, **kwargs)
    target = getattr(torch.Tensor, str(call.target)) if call.op == "call_method" else call.target
    return target(*args, **kwargs)


def operand_names(node: fx.Node, source: Any) -> list[str]:
    """The names of the nodes that stand for ``source`` among a node's operands."""
    return [n.name for n in node.all_input_nodes if n is source or _fetches(n, source)]


def _fetches(node: fx.Node, source: Any) -> bool:
    return isinstance(source, ops.Attr) and node.op == "get_attr" and str(node.target) == source.name


def is_pointwise(node: fx.Node) -> bool:
    """Whether torch tags an operator that the op table does not know as elementwise."""
    if isinstance(node.target, torch._ops.OpOverload):
        return torch.Tag.pointwise in node.target.tags
    name = operator_name(node) if node.op in ("call_function", "call_method") else ""
    packet = getattr(torch.ops.aten, name.removeprefix("special_").strip("_"), None) if name else None
    return packet is not None and any(torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads())


def enumerate_operands(node: fx.Node) -> list[tuple[str, Any]]:
    """The arguments of a call by the names of their places."""
    return [*((str(place), value) for place, value in enumerate(node.args)), *node.kwargs.items()]


def operator_name(node: fx.Node) -> str:
    """The name people know an operator by."""
    if node.op == "call_module":
        return type(module_of(node)).__name__
    if isinstance(node.target, (str, torch._ops.OpOverload)):
        return str(node.target)
    return str(getattr(node.target, "__name__", node.target))


def place(node: fx.Node) -> str:
    """The name people know a node by: its layer, or the node in the layer whose code made it."""
    if node.op == "call_module":
        return str(node.target)
    owner = ops.owner_name(node)
    return f"{owner}:{node.name}" if owner else node.name


Known = dict[Any, Any]
"""What was asked of a call → the answer."""


class Readings:
    """What was found out about calls: those of one spelling do the same, and the blocks of a network repeat them."""

    def __init__(self) -> None:
        self._known: dict[Any, Known] = {}

    def of(self, node: fx.Node, env: Mapping[fx.Node, Any], operands: Container[str]) -> Known:
        """What is known of calls that do the same as ``node`` to the nodes called ``operands``; more may be put in."""
        target = _layer(module_of(node)) if node.op == "call_module" else node.target
        look: Any = lambda source: Value if source.name in operands else env[source]  # noqa: E731
        given: Any = fx.node.map_arg((node.args, node.kwargs), look)
        if target is None or not all(map(_is_plain, pytree.tree_leaves(given))):
            return {}
        return self._known.setdefault((node.op, target, repr(given)), {})


def _layer(part: Any) -> Any:
    """A layer's class and options; None for one that holds tensors or layers."""
    options = {name: value for name, value in vars(part).items() if name not in _OF_ANY_LAYER}
    holds = part._parameters or part._buffers or part._modules
    return None if holds or not all(map(_is_plain, pytree.tree_leaves(options))) else (type(part), repr(options))


_OF_ANY_LAYER = frozenset(vars(nn.Module())) - {"training"}
_PLAIN = (int, float, str, type(None), type(...), torch.dtype)


def _is_plain(value: Any) -> bool:
    """Whether a value is told by what it is written as; the class of values stands for an operand."""
    if isinstance(value, slice):
        return all(map(_is_plain, (value.start, value.stop, value.step)))
    return value is Value or isinstance(value, _PLAIN)
