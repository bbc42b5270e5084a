"""Reading a node: which operator it is, however it is spelled, and what its arguments mean.

Passes ask :func:`kind` and :func:`read`, never a spelling (:mod:`fxcompress.graph.spellings`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from fxcompress.graph.hooks import has_hooks
from fxcompress.graph.spellings import Op, call_row, layer_row
from fxcompress.graph.tree import submodule

__all__ = [
    "Attr",
    "Call",
    "argument_order",
    "call_arguments",
    "is_layer",
    "kind",
    "lookup",
    "owner_name",
    "read",
    "value_readers",
]


@dataclass(frozen=True)
class Attr:
    """A parameter or buffer of the graph module, by its qualified name."""

    name: str


@dataclass(frozen=True)
class Call:
    """A node read through the op table: ``arguments`` maps canonical names to nodes, literals or :class:`Attr`."""

    node: fx.Node
    op: Op
    arguments: dict[str, Any]

    @property
    def kind(self) -> str:
        """The kind of its operator."""
        return self.op.kind

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name, self.op.defaults.get(name))

    def each(self, name: str, dims: int) -> list[Any]:
        """An argument that stands for all dimensions or for one each (stride, padding), one per dimension; None is 0."""
        value = self[name]
        return list(value) * (dims // len(value)) if isinstance(value, (tuple, list)) else [value or 0] * dims

    @property
    def inputs(self) -> list[fx.Node]:
        """The nodes whose values this call consumes, in order, parameters left out."""
        return [n for n in self.node.all_input_nodes if n.op != "get_attr"]


def lookup(node: fx.Node) -> Op | None:
    """The row of the op table for ``node``, or None where its operator is unknown, as that of a layer with hooks is."""
    if node.op == "call_module":
        return _layer(_submodule(node))
    row = call_row(node)
    return row[0] if row else None


def _layer(module: nn.Module | None) -> Op | None:
    return None if module is None or has_hooks(module) else layer_row(type(module))


def kind(node: fx.Node) -> str:
    """The operator's kind: a row's kind, or ``placeholder``, ``get_attr``, ``output``, ``island``, ``unknown``."""
    if node.op in ("placeholder", "get_attr", "output"):
        return node.op
    found = lookup(node)
    if found is not None:
        return found.kind
    return "island" if node.op == "call_module" else "unknown"


def owner_name(node: fx.Node) -> str:
    """The qualified name of the module that ``node`` belongs to: its target, or the module whose code made the call.

    Where that code computes with the weight of a module inside it (a function that is given ``attention.proj.weight``), the
    call belongs to that inner module.
    """
    if node.op == "call_module":
        return str(node.target)
    stack = node.meta.get("nn_module_stack")
    owner = str(next(reversed(stack.values()))[0]) if stack else ""
    found = lookup(node) if node.op.startswith("call") else None
    if found is not None and found.family in _WEIGHTED:
        inner = [name for name in map(_holder, node.all_input_nodes) if name and (not owner or name.startswith(f"{owner}."))]
        return inner[0] if inner else owner
    return owner


_WEIGHTED = ("contraction", "normalisation", "embedding")


def _holder(node: fx.Node) -> str:
    """The module that holds a fetched tensor, also behind an observer or a dequantize; "" for any other value."""
    if node.meta.get("observer") or getattr(node.target, "namespace", None) == "fxcompress":
        node = node.all_input_nodes[0]
    return str(node.target).rpartition(".")[0] if node.op == "get_attr" else ""


def is_layer(node: fx.Node) -> bool:
    """Whether ``node`` is the work of one layer (a module's call, or a weight's), not a step of a larger module's code."""
    call = read(node) if node.op.startswith("call") else None
    return node.op == "call_module" or (call is not None and call["weight"] is not None)


def value_readers(node: fx.Node) -> list[fx.Node]:
    """The users of a node but those that only ask for its shape or type, which a pass may go past."""
    return [user for user in node.users if not _asks(user, node)]


def _asks(user: fx.Node, node: fx.Node) -> bool:
    found = lookup(user)
    if found is None:
        return False
    if found.kind in _SHAPED_LIKE:
        return user.args[0] is not node
    return found.kind in _QUESTIONS and not (user.target is getattr and user.args[1] in _TENSORS)


_QUESTIONS = ("shape", "getattr", "like", "new", "assert")
_SHAPED_LIKE = ("view_as", "expand_as")
_TENSORS = ("T", "H", "mT", "mH", "data", "real", "imag", "grad")
"""Attributes of a tensor that are tensors."""


def read(node: fx.Node) -> Call | None:
    """``node`` with its arguments under canonical names, or None where the op table has no row for it.

    Module attributes (stride, eps, ...) and functional arguments come out alike; parameters come out as :class:`Attr`,
    whether a module owns them or a ``get_attr`` node fetches them.
    """
    if node.op == "call_module":
        module = _submodule(node)
        op = _layer(module)
        return _read_module(node, module, op) if module is not None and op else None
    row = call_row(node)
    if row is None:
        return None
    op, names = row
    bound = {name: _as_attr(value) for name, value in call_arguments(names, node.args, node.kwargs).items()}
    return Call(node, op, bound)


def argument_order(node: fx.Node) -> tuple[str, ...]:
    """The canonical argument names of a function call, in the order its spelling takes them."""
    row = call_row(node)
    return row[1] if row else ()


def call_arguments(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Positional and keyword arguments under ``names``; a last name ``*x`` gathers the remaining positionals."""
    bound: dict[str, Any] = {}
    for position, name in enumerate(names):
        if name.startswith("*"):
            rest = args[position:]
            bound[name[1:]] = rest[0] if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else tuple(rest)
            break
        if position < len(args):
            bound[name] = args[position]
    bound.update({ALIASES.get(name, name): value for name, value in kwargs.items()})
    return bound


ALIASES = {"axis": "dim", "keepdims": "keepdim"}
"""Argument names that torch takes as numpy spells them."""


def _read_module(node: fx.Node, module: nn.Module, op: Op) -> Call:
    attributes, names = vars(module), op.argument_names
    inputs = [name for name in names if name not in op.tensors and not _has_attribute(attributes, name)]
    bound = call_arguments(tuple(inputs), node.args, node.kwargs)
    for name in names:
        if name in bound or name.startswith("*"):
            continue
        if name in op.tensors:
            present = getattr(module, name, None) is not None
            bound[name] = Attr(f"{node.target}.{name}") if present else None
        elif _has_attribute(attributes, name):
            bound[name] = attributes[name]
    return Call(node, op, bound)


def _has_attribute(attributes: Mapping[str, Any], name: str) -> bool:
    return name in attributes and name != "input"


def _as_attr(value: Any) -> Any:
    """A fetched tensor as :class:`Attr`, also where an observer or fake-quantizer stands between it and its reader."""
    if isinstance(value, fx.Node) and value.meta.get("observer"):
        value = value.args[0] if getattr(value.args[0], "op", None) == "get_attr" else value
    return Attr(str(value.target)) if isinstance(value, fx.Node) and value.op == "get_attr" else value


def _submodule(node: fx.Node) -> nn.Module | None:
    owner = node.graph.owning_module
    return submodule(owner, str(node.target)) if owner is not None else None
