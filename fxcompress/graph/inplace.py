"""In-place operators become out-of-place where nothing can tell the difference.

A value that is overwritten cannot be observed, tapped or fused safely. Every later reader of the overwritten value is given
the result instead; an input that was overwritten keeps its values. An operator that writes through a view, or into a
parameter, is left as it is.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fxcompress.graph import edit, ops
from fxcompress.graph.shapes import module_of

__all__ = [
    "VIEWS",
    "drop_dead",
    "is_impure",
    "is_in_place",
    "make_functional",
    "origin",
    "overwritten",
    "reuse_memory",
    "writes",
]

_OPERATORS = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
_FAMILIES = ("activation", "pointwise", "normalisation")
VIEWS: tuple[str, ...] = (
    "reshape",
    "flatten",
    "permute",
    "transpose",
    "getitem",
    "slice",
    "select",
    "chunk",
    "split",
    "unbind",
)
VIEWS += ("squeeze", "unsqueeze", "expand", "t", "view_as", "narrow", "identity", "unflatten", "movedim")


def make_functional(module: fx.GraphModule) -> list[str]:
    """Rewrite in-place calls; call sites keep their names. Returns the inputs that are no longer overwritten."""
    inputs = []
    sites = [node for node in module.graph.nodes if is_in_place(node)]
    order = {node: position for position, node in enumerate(module.graph.nodes)} if sites else {}
    shared: set[fx.Node] = set()
    for node in sites:
        if _is_seen_elsewhere(node, order, shared):
            shared.add(node)
    blocked = {node.target for node in shared if node.op == "call_module"}
    for node in sites:
        written = node.all_input_nodes[0]
        if node in shared or (node.op == "call_module" and node.target in blocked):
            continue
        for user in list(written.users):
            if order[user] > order[node]:
                user.replace_input_with(written, node)
        if written.op == "placeholder":
            inputs.append(str(written.target))
        _respell(module, node)
    return inputs


def _is_seen_elsewhere(node: fx.Node, order: dict[fx.Node, int], shared: set[fx.Node]) -> bool:
    """Whether writing into the first input of ``node`` may reach a value that somebody reads under another name.

    What the writes ``shared`` give is such a value.
    """
    written = node.all_input_nodes[0]
    if any(ops.kind(user) in VIEWS and order[user] < order[node] for user in written.users):
        return True
    while ops.kind(written) in VIEWS:
        written = written.all_input_nodes[0]
        if len(written.users) > 1 or written.op == "placeholder":
            return True
    return written.op == "get_attr" or written in shared


def origin(node: fx.Node) -> fx.Node:
    """The value that ``node`` is a view of, or was written into by, or itself."""
    while node.all_input_nodes and (ops.kind(node) in VIEWS or is_in_place(node)):
        node = node.all_input_nodes[0]
    return node


def overwritten(module: fx.GraphModule) -> set[fx.Node]:
    """Values that something is written into later, directly or through a view: what reads them must not be moved."""
    return {origin(node.all_input_nodes[0]) for node in module.graph.nodes if node.all_input_nodes and _mutates(node)}


def is_in_place(node: fx.Node) -> bool:
    """Whether a node writes its result into its first input."""
    op = ops.lookup(node) if node.all_input_nodes else None
    if op is None or op.family not in _FAMILIES:
        return False
    if node.op == "call_module":
        return bool(getattr(module_of(node), "inplace", False))
    call = ops.read(node)
    if node.target in _OPERATORS or (call is not None and call["inplace"] is True):
        return True
    return not _is_operator(node.target) and _name(node.target).endswith("_") and not _name(node.target).endswith("__")


def _is_operator(target: Any) -> bool:
    """Whether a target is of ``operator``, where names end like those of ``and_`` because Python has the plain word."""
    return getattr(target, "__module__", "") == "_operator"


def _name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket.__name__)
    return target if isinstance(target, str) else str(getattr(target, "__name__", ""))


def _respell(module: fx.GraphModule, node: fx.Node) -> None:
    target: Any = node.target
    if node.op == "call_module":
        module.get_submodule(str(target)).inplace = False  # type: ignore[assignment]
    elif target in _OPERATORS:
        node.target = _OPERATORS[target]
    elif node.kwargs.get("inplace") is True:
        node.kwargs = {**node.kwargs, "inplace": False}
    elif node.args[-1] is True:
        node.args = (*node.args[:-1], False)
    elif node.op == "call_method":
        node.target = target.rstrip("_")
    else:
        node.target = _out_of_place(target)


def _out_of_place(target: Any) -> Any:
    if isinstance(target, torch._ops.OpOverload):
        packet = getattr(torch.ops.aten, _name(target).rstrip("_"))
        return getattr(packet, target._overloadname)
    plain = _name(target).rstrip("_")
    return getattr(torch.nn.functional, plain, None) or getattr(torch, plain)


_KEEPS_NO_RESULT = ("batch_norm", "add", "linear", "conv1d", "conv2d", "conv3d")
"""Operators that make a new tensor, and whose gradient does not need it."""


def reuse_memory(module: fx.GraphModule) -> None:
    """Let a ReLU or an addition overwrite a value that nothing else reads: what models in place do, made safe."""
    for node in reversed(list(module.graph.nodes)):
        kind = ops.kind(node)
        if kind not in ("relu", "add") or is_in_place(node):
            continue
        free = [source for source in node.all_input_nodes if _is_free(source)]
        if kind == "relu" and free:
            edit.replace(node, edit.insert_before(node, F.relu, (free[0],), inplace=True))
        elif kind == "add" and free and len(node.all_input_nodes) == len(node.args) == 2 and not node.kwargs:
            other = next(source for source in node.all_input_nodes if source is not free[0])
            edit.replace(node, edit.insert_before(node, _added, (free[0], other)))
    module.recompile()


def _is_free(value: fx.Node) -> bool:
    return len(value.users) == 1 and ops.kind(value) in _KEEPS_NO_RESULT


def _added(into: Tensor, other: Tensor) -> Tensor:
    """The sum, in the memory of ``into`` where it fits."""
    fits = into.shape == torch.broadcast_shapes(into.shape, other.shape) and into.dtype == torch.result_type(into, other)
    return into.add_(other) if fits else into + other


def drop_dead(module: fx.GraphModule) -> None:
    """Remove nodes that do nothing but compute a value that nobody uses."""
    for node in reversed(module.graph.nodes):
        if not node.users and not is_impure(node):
            module.graph.erase_node(node)


def is_impure(node: fx.Node) -> bool:
    """Whether a node may do something besides computing its result: write in place, assert, tap, run code nobody knows."""
    return node.op in ("placeholder", "output") or ops.kind(node) in ("assert", "tap") or writes(node)


def writes(node: fx.Node) -> bool:
    """Whether a node writes into its first input, or runs code that nobody knows and that might."""
    if node.op in ("placeholder", "output", "get_attr"):
        return False
    known = isinstance(node.target, torch._ops.OpOverload) or node.op == "call_method"
    return _mutates(node) or (not known and ops.lookup(node) is None)


def _mutates(node: fx.Node) -> bool:
    """Whether a node is known to write into its first input."""
    if is_in_place(node) or ops.kind(node) in ("setitem", "copy", "fill"):
        return True
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    return node.op == "call_method" and str(node.target).endswith("_") and not str(node.target).endswith("__")
